"""What the host does between two denoising steps: `python -m benchmarks.gpu.host`, on any machine, without a GPU.

The loop and the engine's reading and writing of its buffers are the released ones, for the released canvas, window
and vocabulary; the call itself does nothing. On a GPU starting its graph and waiting for it come on top
(`benchmarks.gpu.step` measures all of it together).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import click
import torch

from benchmarks.gpu.canvases import Canvas, canvases
from benchmarks.gpu.released_model import released_config, released_model
from export.config import ModelConfig
from export.weights import Precision
from runtime.engines.torch.calls import Call
from runtime.engines.torch.engine import TorchEngine
from runtime.engines.torch.options import Options


class HostOnly(TorchEngine):
    """An engine whose calls compute nothing."""

    def run_call(self, call: Call) -> None:
        """Leave the outputs as they are."""


def narrow_config() -> ModelConfig:
    """The released canvas, window and vocabulary, in layers that cost nothing."""
    config = released_config(6)
    layers = tuple(replace(layer, heads=1, kv_heads=1, head_dim=8) for layer in config.layers)
    small = replace(config, hidden_size=8, intermediate_size=8, expert_intermediate_size=8, layers=layers)
    return replace(small, experts=2, top_k_experts=1)


def step(engine: TorchEngine, rows: list[Canvas]) -> None:
    """All that the host does for one step of each canvas."""
    window, size = engine.facts.sliding_window, engine.pool.page_size
    readouts = engine.denoise([canvas.row(window, size) for canvas in rows])
    for canvas, readout in zip(rows, readouts, strict=True):
        canvas.loop.advance(readout)


@click.command()
@click.option("--steps", default=200, show_default=True, help="Timed steps of a median.")
def main(steps: int) -> None:
    """Print the milliseconds between two steps."""
    torch.set_num_threads(1)
    config = narrow_config()
    model = released_model(config, Precision.FLOAT32, torch.device("cpu"))
    options = replace(Options("cpu", canvas_slots=8, batch=8), positions=config.max_position + 4096)
    engine = HostOnly(model, options)
    for count, prefix in ((1, 1024), (8, 1024), (1, 65536), (1, config.max_position - config.canvas_length)):
        rows = canvases(engine, count, prefix, steps + 2)
        times = []
        for _ in range(steps + 2):
            began = time.perf_counter()
            step(engine, rows)
            times.append((time.perf_counter() - began) * 1e3)
        click.echo(f"{count} canvases behind {prefix} tokens: {statistics.median(times[2:]):.3f} ms")


if __name__ == "__main__":
    main()
