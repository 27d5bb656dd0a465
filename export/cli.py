"""`dgemma export`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from export.bundle import Report
    from runtime.bundle import Manifest


@click.command("export")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16", "fp8", "int4"]),
    default="float32",
    show_default=True,
    help="What weights and states are stored and computed in; ONNX Runtime on a CPU needs float32. In fp8 the experts "
    "and the layers' linears are 8-bit floats, in int4 the experts have 4 bits; both need the torch engine.",
)
@click.option("--name", help="How clients name the model; by default the checkpoint directory's name.")
@click.option(
    "--program", is_flag=True, help="Also write the exported program that `dgemma serve --engine torch` runs."
)
@click.option("--force", is_flag=True, help="Replace the bundle that is already at OUT.")
def command(checkpoint: Path, out: Path, precision: str, name: str | None, program: bool, force: bool) -> None:
    """Export CHECKPOINT, a Hugging Face directory, to the bundle directory OUT that `dgemma serve` loads.

    The checkpoint needs config.json, tokenizer.json and safetensors files; it is read a few megabytes at a time,
    whatever its size. OUT appears only when the bundle is complete and its step graph, run in ONNX Runtime, agrees with
    the PyTorch model; the differences are printed and recorded in its manifest.
    """
    # Imported here: torch takes seconds to load, `--help` should not.
    from export.bundle import write_bundle
    from export.checkpoint import open_checkpoint
    from export.weights import Precision
    from runtime.errors import DgemmaError

    try:
        opened = open_checkpoint(checkpoint)
        if opened.skipped:
            click.echo(
                f"skipped {len(opened.skipped)} tensors the text model has no use for, {opened.skipped[0]} first"
            )
        with _progress() as report:
            manifest = write_bundle(
                opened, out, name or checkpoint.resolve().name, Precision(precision), program, force, report
            )
    except (DgemmaError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _print_summary(manifest, out)


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar a stage on a terminal, a line a stage elsewhere."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def print_stage(stage: str, share: float) -> None:
            if stage not in seen:
                seen.add(stage)
                click.echo(stage, err=True)

        yield print_stage
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def advance(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        yield advance


def _print_summary(manifest: Manifest, out: Path) -> None:
    size = sum(record.bytes for record in manifest.files.values()) / 1e6
    parts = "exported program alone" if manifest.expert_body is None else f"experts {manifest.expert_body}"
    click.echo(f"{out}: {manifest.model.name}, {manifest.precision}, {size:.1f} MB, {parts}")
    if manifest.verification is None:
        click.echo(f"not verified: {manifest.unverified}")
        return
    verification = manifest.verification
    click.echo(
        f"verified on {verification.backend} over {verification.tokens} tokens against the model in float64: "
        f"K/V within {verification.max_kv_error:.1e}, entropy within {verification.max_entropy_error:.1e} nats, "
        f"soft embeddings within {verification.max_soft_embedding_error:.1e}; "
        f"{verification.argmax_mismatches} argmax and {verification.candidate_mismatches} candidate ids differ (ties)"
    )
