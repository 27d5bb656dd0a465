"""Times work on the GPU, and the GPU's own limits to hold the times against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


def graph_seconds(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Median seconds that one of `calls` takes, all captured in one CUDA graph, so that no host time is in it.

    Let the calls read different weights, more of them together than the L2 cache holds.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_event_seconds(graph.replay) for _ in range(replays)) / len(calls)


def _event_seconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GB reads."""
    states = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    return states.nbytes / graph_seconds([states.sum])


def copy_bandwidth() -> float:
    """Bytes a second, read and written ones together, of a device-to-device copy of 4 GB."""
    source = torch.zeros(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds([lambda: target.copy_(source)])


def matrix_rate() -> float:
    """Operations a second of an 8192-cubed bf16 product on random data (zeros run faster)."""
    size = 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / graph_seconds([lambda: torch.mm(left, right, out=product)] * 4)


@dataclass(frozen=True)
class Limits:
    """What this GPU can do, to hold times against."""

    read: float
    """Bytes a second."""
    copy: float
    """Bytes a second, read and written ones together."""
    matrix: float
    """Operations a second of bf16 products."""

    @staticmethod
    def measured() -> Limits:
        """Measures all three; 8 GB of memory, about a second."""
        return Limits(read_bandwidth(), copy_bandwidth(), matrix_rate())

    def __str__(self) -> str:
        return (
            f"reads {self.read / 1e12:.2f} TB/s, copies {self.copy / 1e12:.2f} TB/s, "
            f"bf16 products {self.matrix / 1e12:.0f} TFLOP/s"
        )
