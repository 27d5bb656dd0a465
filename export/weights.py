"""The bundle's weights file, streamed a chunk at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from runtime.bundle import FileRecord

_ALIGNMENT = 4096
"""Of every tensor in the file: ONNX Runtime maps tensors by whole pages."""


class Precision(Enum):
    """What weights and states are stored and computed in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    """Experts and the layers' linears in 8-bit floats, the rest and the states in bfloat16."""
    INT4 = "int4"
    """Experts in 4 bits, the layers' linears in 8-bit floats, the rest and the states in bfloat16."""

    @property
    def is_quantized(self) -> bool:
        """Whether some weights are codes with scales."""
        return self in (Precision.FP8, Precision.INT4)

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's name of what the states and the weights that are no codes are stored in."""
        dtype: torch.dtype = torch.bfloat16 if self.is_quantized else getattr(torch, self.value)
        return dtype


@dataclass(frozen=True)
class Source:
    """One tensor of the weights file, made while it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]
    """Its values in order, flat, of `dtype`, a bounded number at a time."""

    @property
    def bytes(self) -> int:
        """Length in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """All of it in memory."""
        return torch.cat(list(self.chunks())).view(self.shape)


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in the weights file."""

    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def place(sources: Mapping[str, Source]) -> dict[str, Placement]:
    """Lay tensors out one after the other, aligned, each once."""
    placements, end = {}, 0
    for name, source in sources.items():
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        placements[name] = Placement(offset, source.bytes, source.dtype, source.shape)
        end = offset + source.bytes
    return placements


def write_weights(
    path: Path,
    sources: Mapping[str, Source],
    placements: Mapping[str, Placement],
    advance: Callable[[int], None],
) -> FileRecord:
    """Write the weights file; holds a few chunks in memory.

    Chunks that are all zeros are skipped over instead of written, so that the file is sparse where a checkpoint is.

    Args:
        path: the file to make.
        sources: what to store, in the order of `placements`.
        placements: from `place`.
        advance: told how many bytes were just done.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        position = 0
        for name, placement in placements.items():
            digest.update(bytes(placement.offset - position))
            file.seek(placement.offset)
            for chunk in sources[name].chunks():
                values = chunk.view(torch.uint8).numpy()
                digest.update(values.data)
                if values.any():
                    file.write(values.data)
                else:
                    file.seek(len(values), os.SEEK_CUR)
                advance(len(values))
            position = placement.offset + placement.bytes
        file.truncate(position)
    return FileRecord(bytes=position, sha256=digest.hexdigest())


def point_to(value: ir.Value, placement: Placement, file_name: str) -> None:
    """Make an initializer refer to its bytes in the weights file."""
    assert value.dtype is not None
    assert value.shape is not None
    assert value.name is not None
    value.const_value = ir.ExternalTensor(
        file_name, placement.offset, placement.bytes, value.dtype, shape=value.shape, name=value.name
    )
