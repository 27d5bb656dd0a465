"""What runs when on the GPU: the kernels of a denoising step from the middle of one layer to that of the next."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_MARK = "down_product"
"""Runs once a layer."""


@dataclass(frozen=True)
class Kernel:
    """One launch; times in microseconds."""

    name: str
    stream: int
    begin: float
    duration: float


def kernels_of(work: Callable[[], object]) -> list[Kernel]:
    """What `work` runs on the GPU, by begin. Later launches may be slower for it: measure other things first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    launches = (event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    kernels = (Kernel(each["name"], each["args"]["stream"], each["ts"], each["dur"]) for each in launches)
    return sorted(kernels, key=lambda kernel: kernel.begin)


def one_layer(kernels: Sequence[Kernel], layer: int) -> Iterator[str]:
    """Lines of what runs between the experts of a layer and those of the next.

    A kernel that may start before the one ahead of it ends shows its waiting as duration: look at where each ends.
    """
    marks = [index for index, kernel in enumerate(kernels) if kernel.name.startswith(_MARK)]
    first, last = marks[layer], marks[layer + 1]
    zero = kernels[first].begin + kernels[first].duration
    end = zero
    for kernel in kernels[first : last + 1]:
        done = kernel.begin + kernel.duration
        yield (
            f"  {kernel.begin - zero:8.1f} .. {done - zero:8.1f} us, {done - end:+7.1f} behind the last end, "
            f"stream {kernel.stream:3}  {kernel.name[:90]}"
        )
        end = max(end, done)
