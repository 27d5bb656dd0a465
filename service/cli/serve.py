"""`dgemma serve`."""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from service.cli.exits import FAILED
from service.cli.options import DEFAULT_ADDRESS, Seconds
from service.cli.security import security_options, security_settings


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--address",
    default=DEFAULT_ADDRESS,
    show_default=True,
    envvar="DGEMMA_ADDRESS",
    help="Where to listen: host:port, port 0 for a free one, or unix:path. Beyond this machine add encryption and "
    "tokens, or put a proxy in front.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Threads of the onnxruntime engine; 0 for one a physical core.",
)
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "torch"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the model: ONNX Runtime on the CPU, or PyTorch, which needs a bundle exported with --program.",
)
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    help="Where the torch engine runs: cuda, cuda:1, cpu.",
)
@click.option(
    "--max-active",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Requests that are worked on in turn; each holds its K/V in memory.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that may wait; further ones are told when to come again.",
)
@click.option(
    "--min-draft-interval",
    type=Seconds(),
    default=0.01,
    show_default=True,
    help="Seconds between two drafts at least, whatever a request asks for.",
)
@click.option(
    "--grace",
    type=Seconds(),
    default=30.0,
    show_default=True,
    help="Seconds that open requests have to end after SIGTERM or SIGINT; the rest then end with UNAVAILABLE. "
    "A second signal ends them at once.",
)
@click.option(
    "--stall-timeout",
    "stall",
    type=Seconds(min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds after which a call of the engine is taken to hang: the process then ends, for its supervisor.",
)
@click.option(
    "--verify-checksums/--no-verify-checksums",
    default=True,
    show_default=True,
    help="Read the whole bundle first and compare it with its manifest; a second or so for each gigabyte.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged on standard error, one line an event; prompts and answers never are. `debug` adds tracebacks, "
    "which may hold both.",
)
@security_options
def command(
    bundle: Path,
    address: str,
    threads: int,
    engine: str,
    device: str,
    max_active: int,
    max_waiting: int,
    min_draft_interval: float,
    grace: float,
    stall: float,
    verify_checksums: bool,
    log_level: str,
    security: dict[str, Any],
) -> None:
    """Serve BUNDLE, a directory that `dgemma export` wrote, over gRPC.

    Once clients are answered, one line on standard output tells the address. SIGTERM and SIGINT end the server: it
    takes no more requests, lets open ones end, and exits with 0.
    """
    # Imported here: the engine takes longer to load than `--help` should.
    from service import logs
    from service.lifetime import EngineStalled, serve
    from service.loading import Settings, load

    logs.configure(log_level)
    limits = max_active, max_waiting, min_draft_interval
    settings = Settings(bundle, threads, *limits, verify_checksums, engine=engine, device=device, stall=stall)
    serving = serve(address, partial(load, settings), grace, announce, security_settings(security), stall)
    try:
        asyncio.run(serving)
    except EngineStalled as error:
        click.echo(f"Error: {error}", err=True)
        os._exit(FAILED)
    # Everything is closed and told. A library may be at work on a thread of its own yet: an orderly end would wait for
    # the tokeniser (4 s with a prompt of 4 MB), and is aborted by an engine that is being loaded.
    os._exit(0)


def announce(address: str) -> None:
    """Tell on standard output where the server listens, for whoever started it to read, if anybody does."""
    try:
        click.echo(f"serving on {address}")
    except OSError:
        # Python would try again to write it at its end, and exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
