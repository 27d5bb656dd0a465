"""Canvases denoised by the torch engine without a scheduler: the loop as a request runs it, with times."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.diffusion import CanvasDiffusion
from runtime.engines.protocol import DenoiseRow, EncodeRow, Prefix
from runtime.engines.torch.calls import Call
from runtime.engines.torch.engine import TorchEngine
from runtime.random import CanvasStream
from runtime.request import SamplingParameters


def sampling(seed: int, steps: int) -> SamplingParameters:
    """The released sampler for a fixed number of steps: it never converges."""
    return SamplingParameters(
        seed=seed,
        max_output_tokens=1 << 20,
        max_denoising_steps=steps,
        entropy_bound=0.1,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.0,
    )


class TimedEngine(TorchEngine):
    """Notes how long the device worked on each call."""

    device_milliseconds = 0.0
    last_call: Call

    def replay_milliseconds(self, count: int = 8) -> float:
        """Of the call made last, when the host is not waited for between two of them."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            begin.record()
            for _ in range(count):
                self.last_call.run()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / count

    def run_call(self, call: Call) -> None:
        """Run a call between two events."""
        self.last_call = call
        if self.stream is None:
            super().run_call(call)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call.run()
        end.record()
        end.synchronize()
        self.device_milliseconds = float(begin.elapsed_time(end))

    @torch.no_grad()
    def rows_per_expert(self) -> list[Tensor]:
        """Of the denoising step made last, how many rows each expert of each layer got."""
        fields = {"states": self.states, **self.last_call.inputs.device}
        with torch.compiler.set_stance("force_eager"), _Routing() as routing:
            self._run_step("denoise", fields)
        counts: list[Tensor] = routing.counts
        return counts


class _Routing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what each call of the routing chooses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.dgemma.expert_routing.default:
            self._count(result[0], args[0].shape[1])
        elif function is torch.ops.dgemma.project_and_route.default:
            self._count(result[0], args[1].shape[0])
        return result

    def _count(self, expert_ids: Tensor, experts: int) -> None:
        self.counts.append(expert_ids.flatten().bincount(minlength=experts).cpu())


@dataclass(frozen=True)
class StepTimes:
    """Medians over steps."""

    step: float
    """Milliseconds from one step's begin to the next one's, host loop included."""
    device: float
    """Milliseconds that the device works of it."""
    host: float
    """Milliseconds between two steps."""
    replay: float
    """Milliseconds that the device works on a step when steps follow each other without a host between them."""


@dataclass
class Canvas:
    """One sequence in pages of its own, and the canvas behind its prefix."""

    slot: int
    start: int
    sliding_pages: tuple[int, ...]
    full_pages: tuple[int, ...]
    steps: int
    vocab_size: int
    length: int
    loop: CanvasDiffusion = field(init=False)

    def __post_init__(self) -> None:
        self.open(0)

    def open(self, index: int) -> None:
        """Begin a canvas."""
        self.loop = CanvasDiffusion(
            sampling(self.slot, self.steps), CanvasStream(self.slot, index, self.length), self.vocab_size
        )

    def prefix(self, start: int, window: int, page_size: int) -> Prefix:
        """Pages of everything that a row at `start` can see, and of what is written behind it."""
        first = max(0, start - (window - 1)) // page_size
        count = len(self.sliding_pages)
        shown = range(first, -(-(start + 2 * self.length) // page_size))
        sliding = tuple(self.sliding_pages[page % count] for page in shown)
        return Prefix(sliding, first * page_size, self.full_pages)

    def row(self, window: int, page_size: int) -> DenoiseRow:
        """The step about to be made."""
        loop = self.loop
        return DenoiseRow(
            canvas=loop.canvas,
            start=self.start,
            prefix=self.prefix(self.start, window, page_size),
            slot=self.slot,
            first_step=loop.steps_made == 0,
            temperature=loop.temperature,
            uniform=loop.uniform,
            guard_first=True,
        )


def canvases(engine: TorchEngine, count: int, start: int, steps: int, room: int = 0) -> list[Canvas]:
    """Canvases behind prefixes of `start` tokens, with pages for `room` tokens more; what the pool holds is not set."""
    facts, size = engine.facts, engine.pool.page_size
    full = -(-(start + max(room, facts.canvas_length)) // size)
    sliding = engine.pool.sliding_pages // engine.pool.canvas_slots
    return [
        Canvas(
            slot,
            start,
            tuple(range(slot * sliding, (slot + 1) * sliding)),
            tuple(range(slot * full, (slot + 1) * full)),
            steps,
            facts.vocab_size,
            facts.canvas_length,
        )
        for slot in range(count)
    ]


def denoise(engine: TimedEngine, rows: list[Canvas]) -> None:
    """One step of each canvas, in one call."""
    window, size = engine.facts.sliding_window, engine.pool.page_size
    for canvas, readout in zip(rows, engine.denoise([canvas.row(window, size) for canvas in rows]), strict=True):
        canvas.loop.advance(readout)


def time_steps(engine: TimedEngine, count: int, start: int, steps: int = 16) -> StepTimes:
    """Steps of `count` canvases in one call each, after two that warm up."""
    rows = canvases(engine, count, start, steps + 3)
    begins, device = [], []
    for _ in range(steps + 3):
        begins.append(time.perf_counter())
        denoise(engine, rows)
        device.append(engine.device_milliseconds)
    periods = [(after - before) * 1e3 for before, after in itertools.pairwise(begins)][2:]
    hosts = [period - busy for period, busy in zip(periods, device[2:], strict=False)]
    replay = engine.replay_milliseconds() if engine.stream is not None else 0.0
    return StepTimes(statistics.median(periods), statistics.median(device[2:]), statistics.median(hosts), replay)


def encode(engine: TimedEngine, canvas: Canvas, token_ids: NDArray[np.int64], start: int, chunk: int) -> float:
    """Encode tokens at `start` in chunks; returns the device's milliseconds."""
    window, size, milliseconds = engine.facts.sliding_window, engine.pool.page_size, 0.0
    for at in range(0, len(token_ids), chunk):
        part, position = token_ids[at : at + chunk], start + at
        first = max(0, position - (window - 1)) // size
        shown = range(first, -(-(position + len(part)) // size))
        pages = tuple(canvas.sliding_pages[page % len(canvas.sliding_pages)] for page in shown)
        engine.encode([EncodeRow(part, position, Prefix(pages, first * size, canvas.full_pages))])
        milliseconds += engine.device_milliseconds
    return milliseconds
