"""What the host does between two denoising steps: `python -m benchmarks.gpu.host`, on any machine, without a GPU.

The loop, the scheduler and the engine's reading and writing of its buffers are the released ones, for the released
canvas, window and vocabulary; the call itself does nothing, and its results are random. On a GPU starting its graph and
waiting for it come on top (`benchmarks.gpu.step` measures that together with the loop, without a scheduler).
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import replace
from functools import partial

import click
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models

from benchmarks.gpu.canvases import canvases, sampling
from benchmarks.gpu.released_model import released_config, released_model
from export.config import ModelConfig
from export.weights import Precision
from runtime.bundle import GenerationDefaults
from runtime.engines.torch.calls import Call
from runtime.engines.torch.engine import Model, TorchEngine
from runtime.engines.torch.options import Options
from runtime.errors import DgemmaError
from runtime.events import Finished
from runtime.generation import Generation
from runtime.job import Outcome
from runtime.request import GenerationRequest
from runtime.runner import Runner
from runtime.vocabulary import Vocabulary

TIMEOUT = 120.0
"""Seconds after which a request is given up."""


class HostOnly(TorchEngine):
    """An engine whose calls compute nothing; it notes when it denoised."""

    def __init__(self, model: Model, options: Options) -> None:
        super().__init__(model, options)
        self.denoised_at: list[float] = []
        # No end token among the results: it would cut the drafts short.
        self._first_id = max(model.end_token_ids) + 1
        self._random = np.random.default_rng(0)

    def run_call(self, call: Call) -> None:
        """Leave what was drawn when the call was made first."""
        outputs = call.outputs.host
        if not outputs:
            return
        if not outputs["entropy"].any():
            outputs["entropy"][...] = self._random.exponential(size=outputs["entropy"].shape)
            for name in ("argmax_ids", "candidate_ids"):
                outputs[name][...] = self._random.integers(self._first_id, self.facts.vocab_size, outputs[name].shape)
        self.denoised_at.append(time.perf_counter())


class Watcher:
    """A sink that keeps nothing."""

    def __init__(self, drafts: bool) -> None:
        self._drafts = drafts
        self._error: DgemmaError | None = None
        self._done = threading.Event()

    def put(self, outcome: Outcome) -> None:
        """Note the end."""
        self._error = outcome if isinstance(outcome, DgemmaError) else None
        if isinstance(outcome, Finished | DgemmaError):
            self._done.set()

    def wait(self) -> None:
        """Until the request is done.

        Raises:
            click.ClickException: it failed, or takes too long.
        """
        if not self._done.wait(TIMEOUT) or self._error is not None:
            raise click.ClickException(f"a request failed: {self._error or f'not done after {TIMEOUT} s'}")

    def wants_draft(self) -> bool:
        """As asked for."""
        return self._drafts

    def ready(self) -> bool:
        """It never falls behind."""
        return True

    def caught_up(self) -> bool:
        """It never falls behind."""
        return True


def narrow_config() -> ModelConfig:
    """The released canvas, window and vocabulary, in layers that cost nothing."""
    config = released_config(6)
    layers = tuple(replace(layer, heads=1, kv_heads=1, head_dim=8) for layer in config.layers)
    small = replace(config, hidden_size=8, intermediate_size=8, expert_intermediate_size=8, layers=layers)
    return replace(small, experts=2, top_k_experts=1)


def vocabulary(size: int) -> Vocabulary:
    """One of `size` words."""
    tokenizer = Tokenizer(models.BPE({f"word{index}": index for index in range(size)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Vocabulary(tokenizer)


def median_gap(engine: HostOnly) -> float:
    """Milliseconds between two steps, and forgets them."""
    gaps = [(after - before) * 1e3 for before, after in itertools.pairwise(engine.denoised_at[2:])]
    engine.denoised_at.clear()
    return statistics.median(gaps)


def loop_alone(engine: HostOnly, count: int, prefix: int, steps: int) -> float:
    """Of canvases without a scheduler."""
    rows = canvases(engine, count, prefix, steps + 2)
    window, size = engine.facts.sliding_window, engine.pool.page_size
    for _ in range(steps + 2):
        readouts = engine.denoise([canvas.row(window, size) for canvas in rows])
        for canvas, readout in zip(rows, readouts, strict=True):
            canvas.loop.advance(readout)
    return median_gap(engine)


def served(engine: HostOnly, runner: Runner, count: int, prefix: int, steps: int, drafts: bool) -> float:
    """Of requests that share the engine, with the scheduler, the events and, if asked for, a draft a step."""
    watchers = [Watcher(drafts) for _ in range(count)]
    prompts = np.random.default_rng(1).integers(3, engine.facts.vocab_size, (count, prefix))
    for number, watcher in enumerate(watchers):
        parameters = replace(sampling(number, steps + 2), max_output_tokens=engine.facts.canvas_length)
        runner.submit(GenerationRequest("released", prompts[number], parameters, drafts), watcher)
    for watcher in watchers:
        watcher.wait()
    return median_gap(engine)


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
        click.echo(f"{count} canvases behind {prefix} tokens: {loop_alone(engine, count, prefix, steps):.3f} ms")
    # Of these a request, which says all of its own, reads the end tokens alone.
    defaults = GenerationDefaults(48, 0.1, 0.4, 0.8, 1, 0.005, model.end_token_ids, 0, 2)
    words = vocabulary(config.vocab_size)
    runner = Runner(engine, partial(Generation, facts=engine.facts, defaults=defaults, vocabulary=words))
    runner.start()
    try:
        for count, drafts in itertools.product((1, 8), (False, True)):
            gap = served(engine, runner, count, 1024, steps, drafts)
            click.echo(f"{count} requests behind 1024 tokens, {'drafts' if drafts else 'no drafts'}: {gap:.3f} ms")
    finally:
        runner.close()


if __name__ == "__main__":
    main()
