"""`python -m benchmarks.demo --bundle OUT`: a server, a client, prompts, and drafts that turn into blocks.

Starts `dgemma serve` as a process of its own on a free port, waits for its health to say SERVING, holds a few
conversations over bidirectional streams, and shows each answer as it is denoised: in place on a terminal, line by line
elsewhere. Then it ends the server with SIGTERM and checks that it exits with 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks.servers import serving
from runtime.events import Committed, Draft, Finished
from runtime.request import SamplingOverrides
from service.cli.answer import LiveAnswer, printable
from service.client import CallFailed, Client, Conversation

CONVERSATIONS = (
    ("Spell 742.",),
    ("Sort these words: window, banana, lamp, cherry, garden", "Now reverse it."),
    ("Write as JSON: Anna is 31 and lives in Oslo.", "Where does Anna live?"),
    ("Write two sentences about a dog and a garden.",),
)
"""Each is one stream; second questions are about the answer to the first."""

SEED = 7
START_TIMEOUT, ANSWER_TIMEOUT = 60.0, 600.0
"""Seconds."""
DRAFT_INTERVAL = 0.0
"""Seconds: every draft that the server lets out."""
WIDEST = 100
"""Characters of a draft in the log."""


@click.command()
@click.option("--bundle", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--threads", default=0, show_default=True, help="Of the engine; 0 for one a physical core.")
def main(bundle: Path, threads: int) -> None:
    """Serve BUNDLE, ask it a few questions, and stop it."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    with serving(bundle, threads) as server, Client(server.address) as client:
        client.wait_serving(START_TIMEOUT)
        model = client.model(timeout=ANSWER_TIMEOUT)
        console.print(f"{model.name} is SERVING on {server.address} after {time.monotonic() - began:.1f} s\n")
        sampling = SamplingOverrides(seed=SEED)
        try:
            for questions in CONVERSATIONS:
                with client.converse(
                    sampling=sampling, draft_interval=DRAFT_INTERVAL, timeout=ANSWER_TIMEOUT
                ) as conversation:
                    hold(console, conversation, questions)
        except CallFailed as error:
            raise click.ClickException(str(error)) from error
        code = server.stop()
    console.print(f"the server drained after SIGTERM and exited with {code}")
    sys.exit(code)


def hold(console: Console, conversation: Conversation, questions: Sequence[str]) -> None:
    """Ask questions in turn, half-close, and see the stream end."""
    for question in questions:
        ask(console, conversation, question)
    conversation.half_close()
    if list(conversation):
        raise click.ClickException("events came after the last turn")


def ask(console: Console, conversation: Conversation, question: str) -> None:
    """Ask one question and show its answer."""
    console.print(f"> {question}", style="bold", markup=False)
    conversation.start_turn(question)
    finished = show_live(console, conversation) if console.is_terminal else show_log(console, conversation)
    usage = finished.usage
    seconds = usage.prefill_seconds + usage.denoise_seconds
    steps = f"{usage.denoising_steps} steps for {usage.blocks} block{'s' if usage.blocks > 1 else ''}"
    console.print(f"  ({usage.output_tokens} tokens, {steps}, {seconds:.2f} s)\n", style="dim", markup=False)


def show_live(console: Console, conversation: Conversation) -> Finished:
    """Rewrite the open block in place."""
    answer = LiveAnswer(console)
    try:
        for _, event in conversation:
            if isinstance(event, Draft | Committed):
                answer.show(event)
            if isinstance(event, Finished):
                return event
    finally:
        answer.end()
    raise click.ClickException("the stream ended in the midst of a turn")


def show_log(console: Console, conversation: Conversation) -> Finished:
    """A line for each commit, and one for the drafts of steps 1, 2, 4, 8 and so on: early ones change most."""
    for _, event in conversation:
        if isinstance(event, Draft) and event.step.bit_count() == 1:
            share = event.accepted.mean()
            head = f"  block {event.block_index} step {event.step:2}  {share:4.0%} accepted  "
            console.print(head + one_line(event.text), markup=False)
        if isinstance(event, Committed):
            head = f"  block {event.block_index} committed after {event.step_count} steps  "
            console.print(head + one_line(event.text, whole=True), markup=False)
        if isinstance(event, Finished):
            return event
    raise click.ClickException("the stream ended in the midst of a turn")


def one_line(text: str, whole: bool = False) -> str:
    """The text on one line, cut unless it is wanted whole."""
    line = printable(text).replace("\n", "↵").replace("\t", " ")
    return line if whole or len(line) <= WIDEST else line[: WIDEST - 1] + "…"


if __name__ == "__main__":
    main()
