"""A bundle's weights file, read straight into tensors of any device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from runtime.bundle import TensorRecord
from runtime.errors import BundleError

CHUNK_BYTES = 64 << 20
"""Bytes in each of two buffers: one is read into while the other is copied to the device."""


class WeightsFile:
    """Fills tensors from the file, a chunk at a time: host memory stays at two chunks whatever the tensors' sizes."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorRecord], device: torch.device) -> None:
        """Open the file; use as a context manager.

        Args:
            path: the weights file.
            tensors: where each lies in it.
            device: of the tensors that will be filled.
        """
        self._path, self._tensors, self._cuda = path, tensors, device.type == "cuda"
        largest = max((_bytes(record) for record in tensors.values()), default=1)
        size = max(1, min(CHUNK_BYTES, largest))
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if self._cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._next = 0

    def __enter__(self) -> WeightsFile:
        self._file: BinaryIO = self._path.open("rb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if self._cuda:
            torch.cuda.synchronize()

    def fill(self, name: str, tensor: Tensor) -> None:
        """Read the tensor `name` into `tensor`, contiguous and of its shape and dtype.

        Raises:
            BundleError: the manifest has no such tensor, or another shape or dtype, or the file ends early.
        """
        record = self._tensors.get(name)
        if record is None:
            raise BundleError(f"{self._path}: holds no tensor {name}; export again")
        if record.shape != tuple(tensor.shape) or record.dtype != str(tensor.dtype).removeprefix("torch."):
            asked = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise BundleError(f"{self._path}: {name} is {record.dtype} {list(record.shape)}, not {asked}; export again")
        self._file.seek(record.offset)
        flat = tensor.view(torch.uint8).flatten() if tensor.dim() else tensor[None].view(torch.uint8)
        for part in torch.split(flat, len(self._buffers[0])):
            self._copy_next(part)

    def _copy_next(self, part: Tensor) -> None:
        index = self._next
        self._next = 1 - index
        event, buffer = self._copied[index], self._buffers[index][: len(part)]
        if event is not None:
            event.synchronize()
        _read_into(self._file, buffer, self._path)
        part.copy_(buffer, non_blocking=True)
        if event is not None:
            event.record()


def _bytes(record: TensorRecord) -> int:
    dtype: torch.dtype = getattr(torch, record.dtype)
    return torch.Size(record.shape).numel() * dtype.itemsize


def _read_into(file: BinaryIO, buffer: Tensor, path: Path) -> None:
    view = memoryview(buffer.numpy().data)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise BundleError(f"{path}: ends inside a tensor; export again")
        view = view[count:]
