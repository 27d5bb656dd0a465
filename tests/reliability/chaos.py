"""`make chaos`: misbehaving clients, killed clients, killed servers, and a server that is stopped while it is busy."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from tests.reliability.kills import Kills, kill_clients, kill_servers, terminate
from tests.reliability.misbehaviour import Chaos, chaos

SHOWN = 20
"""Failures that are printed."""


@click.command()
@click.option("--requests", default=10_000, show_default=True, help="Of clients that misbehave.")
@click.option("--client-kills", default=200, show_default=True, help="Client processes under SIGKILL.")
@click.option("--server-kills", default=50, show_default=True, help="Servers under SIGKILL.")
@click.option("--terminations", default=5, show_default=True, help="Servers under SIGTERM while they are busy.")
@click.option("--seed", type=int, default=None, help="Of everything; drawn and printed where it is not given.")
def main(requests: int, client_kills: int, server_kills: int, terminations: int, seed: int | None) -> None:
    """Do all of it and exit with 1 where a promise was broken; the same seed has the clients do the same again."""
    seed = random.randrange(1 << 31) if seed is None else seed
    click.echo(f"seed {seed}")
    # Thousands of injected faults are no news.
    logging.disable()
    good = True
    if requests:
        good &= _told(f"{requests} requests", lambda place: asyncio.run(chaos(place, requests, seed, click.echo)))
    if client_kills:
        good &= _told(f"{client_kills} client kills", lambda place: kill_clients(place, client_kills, seed, click.echo))
    if server_kills:
        good &= _told(f"{server_kills} server kills", lambda place: kill_servers(place, server_kills, seed, click.echo))
    for number in range(terminations):
        act = partial(terminate, streams=24, grace=2.0, seed=seed + number)
        good &= _told("SIGTERM under 24 streams", act)
    sys.exit(not good)


def _told(name: str, act: Callable[[Path], Chaos | Kills]) -> bool:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        result: Any = act(Path(place))
    click.echo(f"{name}: {len(result.wrong)} wrong, {len(result.leaks)} leaks, {time.monotonic() - began:.0f} s")
    for outcome, count in sorted(result.outcomes.items()):
        click.echo(f"  {count:6} {outcome}")
    if getattr(result, "suspended", 0):
        click.echo(f"  at most {result.suspended} parked without pages at a time")
    for line in [*result.wrong[:SHOWN], *result.leaks]:
        click.echo(f"  WRONG: {line}")
    return bool(result.good)


if __name__ == "__main__":
    main()
