"""Tensors stored in safetensors files, read a bounded chunk at a time.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length of a JSON header, the
header, then the tensors' bytes, row-major, without holes or overlaps. Written out here instead of using the package
because its reader maps the whole file and reports one fault at a time; a hostile header must not cost memory either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.errors import CheckpointError

CHUNK_BYTES = 16 << 20
"""Most bytes of a tensor held at a time."""

_LONGEST_HEADER = 100 << 20
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READABLE = _FLOATS | {"F8_E4M3": torch.float8_e4m3fn}
"""8-bit floats mean something only together with their scales, so they are no plain floats."""


class WeightTensor(Protocol):
    """A tensor of numbers that stand for themselves, read a bounded chunk at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files it is read from."""

    def chunks(self) -> Iterator[Tensor]:
        """Its values in order, flat, a bounded number at a time; raises CheckpointError where a file ends early."""

    def load(self, dtype: torch.dtype) -> Tensor:
        """All of it in memory, as `dtype`."""


def load(tensor: WeightTensor, dtype: torch.dtype) -> Tensor:
    """All of a tensor in memory, as `dtype`."""
    flat = torch.empty(tensor.elements, dtype=dtype)
    done = 0
    for chunk in tensor.chunks():
        flat[done : done + len(chunk)] = chunk
        done += len(chunk)
    return flat.view(tensor.shape)


def whole_rows(tensor: WeightTensor) -> Iterator[Tensor]:
    """A tensor's values as rows `[n, K]` of its last dimension, about a chunk at a time."""
    width, left = tensor.shape[-1], None
    for chunk in tensor.chunks():
        joined = chunk if left is None else torch.cat([left, chunk])
        whole = len(joined) // width * width
        if whole:
            yield joined[:whole].view(-1, width)
        left = joined[whole:]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    path: Path
    dtype: str
    """As the format spells it: `F32`, `BF16` and so on."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file it is in."""
        return (self.path,)

    @property
    def bytes(self) -> int:
        """Length in the file."""
        return self.elements * _ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether its values stand for themselves, so that it can be read without others."""
        return self.dtype in _FLOATS

    def chunks(self) -> Iterator[Tensor]:
        """Its values in order, flat, at most CHUNK_BYTES at a time.

        Raises:
            CheckpointError: the file ends early.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.bytes
            while left:
                block = bytearray(min(left, CHUNK_BYTES))
                if file.readinto(block) != len(block):
                    raise CheckpointError(f"{self.path}: ends inside a tensor; was it changed during the export?")
                left -= len(block)
                yield torch.frombuffer(block, dtype=_READABLE[self.dtype])

    def load(self, dtype: torch.dtype) -> Tensor:
        """All of it in memory, as `dtype`."""
        return load(self, dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        CheckpointError: the file is not safetensors, is cut short, or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{path}: is cut short or is no safetensors file: a header of {length} bytes in a file of {size}"
            )
        raw = _parse_header(path, file.read(length))
    tensors = {
        name: _parse_tensor(path, name, entry, 8 + length) for name, entry in raw.items() if name != "__metadata__"
    }
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return raw


def _parse_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {name}: the header's entry is malformed") from error
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: {name}: unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{path}: {name}: shape and offsets must be integers from 0")
    tensor = StoredTensor(path, dtype, shape, start + begin)
    if tensor.bytes != end - begin:
        raise CheckpointError(
            f"{path}: {name}: {dtype} {list(shape)} takes {tensor.bytes} bytes, its offsets span {end - begin}"
        )
    return tensor


def _check_layout(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != position:
            raise CheckpointError(f"{path}: {name}: overlaps another tensor or leaves a hole before it")
        position += tensor.bytes
    if position > size:
        raise CheckpointError(f"{path}: is cut short: its tensors end at byte {position}, the file at {size}")
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes follow its last tensor")
