"""`python -m benchmarks`: every benchmark that compares with a bar, on one bundle."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import click
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, Setting, Unavailable

BENCHMARKS = {
    "step": "benchmarks.step",
    "service_overhead": "benchmarks.service_overhead",
    "startup": "benchmarks.startup",
    "throughput": "benchmarks.throughput",
}
"""Modules by name; each has `run(setting) -> list[Figure]`."""


DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.option("--bundle", required=True, type=DIRECTORY)
@click.option("--checkpoint", type=DIRECTORY, help="What the bundle was made of, for the reference to run.")
@click.option("--threads", default=2, show_default=True, help="Of both sides.")
@click.option("--rounds", default=30, show_default=True, help="How often a timed thing is repeated.")
@click.option("--only", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Some of the benchmarks.")
def main(bundle: Path, checkpoint: Path | None, threads: int, rounds: int, only: tuple[str, ...]) -> None:
    """Measure on BUNDLE and print every figure beside its bar."""
    console = Console()
    console.print(_conditions(threads))
    setting = Setting(bundle, checkpoint, threads, rounds)
    table = Table("figure", "value", "bar", "met", "note")
    for name in only or BENCHMARKS:
        run = cast(Callable[[Setting], list[Figure]], importlib.import_module(BENCHMARKS[name]).run)
        try:
            for figure in run(setting):
                table.add_row(*_cells(figure))
        except Unavailable as reason:
            table.add_row(name, "-", "-", "-", str(reason))
    console.print(table)


def _cells(figure: Figure) -> tuple[str, ...]:
    bar = "" if figure.most is None else f"<= {figure.most:g}"
    bar = bar if figure.least is None else f">= {figure.least:g}"
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    return figure.name, f"{figure.value:.3g} {figure.unit}", bar, met, figure.note


def _conditions(threads: int) -> str:
    """What the figures hold for; the load says whether the machine was quiet."""
    when, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
    machine = f"{_processor()}, {os.cpu_count()} cores, load {load:.1f}"
    return f"{when}, {machine}, Python {platform.python_version()}, {threads} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
