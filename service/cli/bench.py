"""`dgemma bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click

from runtime.events import Committed, Draft, Finished
from runtime.request import SamplingOverrides
from service.cli.columns import echo_columns
from service.cli.connection import connected
from service.cli.options import sampling_options, timeout_option
from service.cli.target import Target, target_options
from service.client import Client

PROMPT = "Write a short story about a cat."


@dataclass(frozen=True)
class Sample:
    """How one request went, in seconds from its sending."""

    first_draft: float | None
    first_block: float | None
    whole: float
    tokens: int
    steps: int
    blocks: int


@click.command("bench")
@click.argument("prompt", default=PROMPT)
@target_options
@timeout_option(300.0, "one answer")
@click.option("--requests", type=click.IntRange(min=1), default=16, show_default=True, help="Requests to send.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Requests at a time.")
@sampling_options
def command(
    prompt: str, target: Target, timeout: float, requests: int, concurrency: int, sampling: SamplingOverrides
) -> None:
    """Measure what a client of a running server sees: the time to the first draft, the first block and the end.

    Each request asks for drafts and has a seed of its own, unless --seed is given. One request is sent beforehand and
    not counted. Medians and 90th percentiles are over requests; tokens per second is over the whole run.
    """
    with connected(target) as client, ThreadPoolExecutor(concurrency) as pool:

        def once(_: int) -> Sample:
            return measure(client, prompt, sampling, timeout)

        once(0)
        began = time.perf_counter()
        samples = list(pool.map(once, range(requests)))
        seconds = time.perf_counter() - began
    tokens, steps, blocks = (
        sum(values) for values in zip(*((s.tokens, s.steps, s.blocks) for s in samples), strict=True)
    )
    echo_columns(
        [
            ("requests", f"{requests}, {concurrency} at a time, {seconds:.2f} s"),
            ("time to first draft", spread(samples, lambda sample: sample.first_draft)),
            ("time to first block", spread(samples, lambda sample: sample.first_block)),
            ("time to the end", spread(samples, lambda sample: sample.whole)),
            ("steps a block", f"{steps / max(1, blocks):.1f}"),
            ("tokens a second", f"{tokens / seconds:.1f}"),
        ]
    )


def measure(client: Client, prompt: str, sampling: SamplingOverrides, timeout: float) -> Sample:
    """Send one request and watch its events."""
    began = time.perf_counter()
    first_draft = first_block = None
    tokens = steps = blocks = 0
    for event in client.generate(prompt, sampling, draft_interval=0.0, timeout=timeout):
        elapsed = time.perf_counter() - began
        if isinstance(event, Draft) and first_draft is None:
            first_draft = elapsed
        if isinstance(event, Committed) and first_block is None:
            first_block = elapsed
        if isinstance(event, Finished):
            usage = event.usage
            tokens, steps, blocks = usage.output_tokens, usage.denoising_steps, usage.blocks
    return Sample(first_draft, first_block, time.perf_counter() - began, tokens, steps, blocks)


def spread(samples: Sequence[Sample], value: Callable[[Sample], float | None]) -> str:
    """Median and 90th percentile in milliseconds, over the samples that have the value."""
    values = sorted(found for sample in samples if (found := value(sample)) is not None)
    if not values:
        return "never came"
    high = values[min(len(values) - 1, round(0.9 * (len(values) - 1)))]
    return f"{statistics.median(values) * 1000:.1f} ms (90%: {high * 1000:.1f} ms, {len(values)} samples)"
