"""`dgemma trace`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from runtime.events import Committed, Draft
from runtime.request import SamplingOverrides
from service.cli.connection import connected
from service.cli.options import prompt_text, sampling_options, timeout_option
from service.cli.picture import Picture
from service.cli.target import Target, target_options

COLOURS = 64
"""Of a PNG: all that the eye tells apart here, at a third of the size."""


@click.command("trace")
@click.argument("prompt", required=False)
@target_options
@timeout_option(300.0)
@click.option("--block", type=click.IntRange(min=0), default=0, show_default=True, help="Which block to draw.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write the picture to this SVG file.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write the picture to this PNG file.")
@sampling_options
def command(
    prompt: str | None,
    target: Target,
    timeout: float,
    block: int,
    svg: Path | None,
    png: Path | None,
    sampling: SamplingOverrides,
) -> None:
    """Draw how a block of the answer to PROMPT was denoised: steps downwards, positions across.

    Each token is shown in the shade of its entropy, from green where the model is sure to grey where it guesses; those
    that the step accepted are bold and underlined. The last line is what was committed. The picture is made of the
    drafts that any client gets: a step that was made within the server's least time between two drafts is missing.
    """
    text = prompt_text(prompt)
    drafts: list[Draft] = []
    committed = None
    with connected(target) as client:
        for event in client.generate(text, sampling, draft_interval=0.0, timeout=timeout):
            if isinstance(event, Draft) and event.block_index == block:
                drafts.append(event)
            if isinstance(event, Committed) and event.block_index == block:
                committed = event
                break
    if committed is None:
        raise click.BadParameter(f"the answer has no block {block}", param_hint="--block")
    picture = Picture(text, drafts, committed)
    if svg is None and png is None:
        Console(highlight=False).print(picture)
    if svg is not None:
        svg.write_text(picture.svg(), encoding="utf-8")
    if png is not None:
        picture.image().quantize(COLOURS).save(png, optimize=True)
