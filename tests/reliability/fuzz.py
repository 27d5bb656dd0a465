"""`make fuzz`: mutated requests against the handlers, and garbage against a socket."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.reliability.fuzz_frames import fuzz_frames
from tests.reliability.fuzz_messages import Fuzzed, Input, fuzz, replay

SHOWN = 20
"""Failures that are printed."""


@click.command()
@click.option("--runs", default=100_000, show_default=True, help="Mutated requests.")
@click.option("--connections", default=5_000, show_default=True, help="Connections that send garbage.")
@click.option("--seed", type=int, default=None, help="Of all mutations; drawn and printed where it is not given.")
@click.option("--failures", type=click.Path(path_type=Path), default=Path("build/fuzz"), show_default=True)
@click.option("--replay", "file", type=click.Path(path_type=Path, exists=True), help="Send a failing input again.")
def main(runs: int, connections: int, seed: int | None, failures: Path, file: Path | None) -> None:
    """Fuzz and exit with 1 where something broke; what broke it is written below FAILURES, to be replayed."""
    seed = random.randrange(1 << 31) if seed is None else seed
    logging.disable()
    good = True
    with tempfile.TemporaryDirectory() as place:
        if file is not None:
            result = asyncio.run(replay(Path(place), Input.from_json(file.read_text(encoding="utf-8"))))
            _tell(f"replay of {file}", result, failures, 0.0)
            sys.exit(not result.good)
        click.echo(f"seed {seed}")
        if runs:
            began = time.monotonic()
            result = asyncio.run(fuzz(Path(place), runs, seed, click.echo))
            _tell(f"{runs} requests", result, failures, time.monotonic() - began)
            good &= result.good
    if connections:
        with tempfile.TemporaryDirectory() as place:
            garbage = fuzz_frames(Path(place), connections, seed, click.echo)
        click.echo(f"{connections} connections of garbage: {len(garbage.wrong)} wrong, {dict(garbage.outcomes)}")
        for line in [*garbage.wrong[:SHOWN], *garbage.leaks]:
            click.echo(f"  WRONG: {line}")
        good &= garbage.good
    sys.exit(not good)


def _tell(name: str, result: Fuzzed, failures: Path, seconds: float) -> None:
    click.echo(
        f"{name}: {len(result.wrong)} wrong, {len(result.leaks)} leaks; corpus of {result.corpus} inputs, "
        f"{result.lines} lines of service and runtime reached, {seconds:.0f} s"
    )
    for outcome, count in sorted(result.outcomes.items()):
        click.echo(f"  {count:6} {outcome}")
    for number, (sent, why) in enumerate(result.wrong[:SHOWN]):
        failures.mkdir(parents=True, exist_ok=True)
        written = failures / f"{number}.json"
        written.write_text(sent.to_json(), encoding="utf-8")
        click.echo(f"  WRONG: {why}\n         make fuzz ARGS='--replay {written}'")
    for leak in result.leaks:
        click.echo(f"  WRONG: left behind {leak}")


if __name__ == "__main__":
    main()
