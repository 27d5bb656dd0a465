"""The bundle's weights file, streamed from the checkpoint a chunk at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import onnx_ir as ir
import torch

from export.tensor_file import StoredTensor
from runtime.bundle import FileRecord

_ALIGNMENT = 4096
"""Of every tensor in the file: ONNX Runtime maps tensors by whole pages."""


class Precision(Enum):
    """What weights and states are stored and computed in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's name of it."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in the weights file."""

    offset: int
    bytes: int


def place(tensors: Mapping[str, StoredTensor], precision: Precision) -> dict[str, Placement]:
    """Lay tensors out one after the other, aligned, each once."""
    placements, end = {}, 0
    for name, tensor in tensors.items():
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        placements[name] = Placement(offset, tensor.elements * precision.torch_dtype.itemsize)
        end = offset + placements[name].bytes
    return placements


def write_weights(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    placements: Mapping[str, Placement],
    precision: Precision,
    advance: Callable[[int], None],
) -> FileRecord:
    """Write the weights file; memory stays at a few chunks whatever the tensors' sizes.

    Zeros are skipped over instead of written, so that the file is sparse where a checkpoint is.

    Args:
        path: the file to make.
        tensors: what to store, in the order of `placements`.
        placements: from `place`.
        precision: what to convert to.
        advance: told how many bytes were just done.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        position = 0
        for name, placement in placements.items():
            digest.update(bytes(placement.offset - position))
            file.seek(placement.offset)
            for chunk in tensors[name].chunks():
                values = chunk.to(precision.torch_dtype)
                data = values.view(torch.uint8).numpy().data
                digest.update(data)
                if values.any():
                    file.write(data)
                else:
                    file.seek(len(data), os.SEEK_CUR)
                advance(len(data))
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
