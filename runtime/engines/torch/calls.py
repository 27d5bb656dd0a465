"""Calls of one shape: their input and output buffers, and on a GPU the CUDA graph that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each field of a buffer."""

_ALIGNMENT = 256
"""Bytes; compiled code and kernels rely on 16."""


class Buffer:
    """Fields in one stretch of host memory and one of device memory, so that one copy moves all of them.

    On the CPU both are the same memory.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        cuda = device.type == "cuda"
        offsets, size = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = size
            size += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device) if cuda else self._host
        views = {name: _views(self, offsets[name], *fields[name]) for name in fields}
        self.host: dict[str, NDArray[Any]] = {name: host.numpy() for name, (host, _) in views.items()}
        self.device: dict[str, Tensor] = {name: device for name, (_, device) in views.items()}

    def upload(self) -> None:
        """Copy host to device on the current stream; the host side may be written once that stream was waited for."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        """Copy device to host on the current stream; there when that stream was waited for."""
        if self._device is not self._host:
            self._host.copy_(self._device, non_blocking=True)


def _views(buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    end = offset + torch.Size(shape).numel() * dtype.itemsize
    host, device = (memory[offset:end].view(dtype).view(shape) for memory in (buffer._host, buffer._device))
    return host, device


class Call:
    """Uploads the inputs, runs `body`, downloads the outputs; as one CUDA graph where asked for."""

    def __init__(
        self, inputs: Buffer, outputs: Buffer, body: Callable[[], None], graph_pool: torch.cuda.MemPool | None = None
    ) -> None:
        """Warm up and capture.

        Args:
            inputs, outputs: what `body` reads and writes, on the device; the inputs must be fit to run with.
            body: launches the work on the current stream.
            graph_pool: memory pool to warm up in and to capture a CUDA graph into; None to launch `body` at every run.
                What `body` allocates there and keeps is overwritten when an earlier graph of the pool runs again.
        """
        self.inputs, self.outputs, self._body = inputs, outputs, body
        self._graph: torch.cuda.CUDAGraph | None = None
        # Compiles and tunes what is not yet; a capture must find everything loaded and allocated. It happens in the
        # graph's own pool, so that the capture finds what warming up left there and nothing is reserved twice.
        if graph_pool is not None:
            # While a pool is in use the allocator takes nothing back from the others.
            torch.cuda.empty_cache()
        with nullcontext() if graph_pool is None else torch.cuda.use_mem_pool(graph_pool):
            self.run()
        if graph_pool is not None:
            torch.cuda.current_stream().synchronize()
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(self._graph, pool=graph_pool.id, stream=stream):  # type: ignore[arg-type]
                self._launch()

    def run(self) -> None:
        """Start the call on the current stream."""
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    def _launch(self) -> None:
        self.inputs.upload()
        self._body()
        self.outputs.download()
