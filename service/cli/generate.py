"""`dgemma generate`."""

from __future__ import annotations

import click
from rich.console import Console

from runtime.events import Finished, FinishReason
from runtime.prompt import Message, Role
from runtime.request import SamplingOverrides
from runtime.ticket import Priority
from service.cli.answer import Answer, PlainAnswer, answer_on
from service.cli.connection import connected, uninterrupted
from service.cli.options import prompt_text, sampling_options, timeout_option
from service.cli.target import Target, target_options
from service.resuming import generate

DRAFT_INTERVAL = 0.05
"""Seconds: as often as a terminal is redrawn."""


@click.command("generate")
@click.argument("prompt", required=False)
@target_options
@timeout_option(300.0)
@click.option("--system", help="Standing instructions, told to the model before the prompt.")
@click.option(
    "--drafts/--no-drafts", default=None, help="Show blocks while they are denoised; by default on a terminal."
)
@click.option("--batch", is_flag=True, help="Nobody waits for the answer: let requests of people go first.")
@click.option("--stats", is_flag=True, help="Tell tokens, blocks, steps and times on standard error at the end.")
@sampling_options
def command(
    prompt: str | None,
    target: Target,
    timeout: float,
    system: str | None,
    drafts: bool | None,
    batch: bool,
    stats: bool,
    sampling: SamplingOverrides,
) -> None:
    """Generate the answer to PROMPT, or to what is piped in.

    On a terminal each block is rewritten in place while it is denoised; what is settled is bold, what is noise is grey.
    Piped, the answer is plain text, block by block. Where the connection breaks, or the server ends, the answer goes on
    behind its last block as soon as a server is back.
    """
    console = Console(highlight=False)
    live = console.is_terminal if drafts is None else drafts and console.is_terminal
    text = prompt_text(prompt)
    messages = [Message(Role.SYSTEM, system)] if system is not None else []
    with connected(target) as client:
        events = generate(
            client,
            [*messages, Message(Role.USER, text)],
            sampling,
            draft_interval=DRAFT_INTERVAL if live else None,
            priority=Priority.BATCH if batch else Priority.INTERACTIVE,
            timeout=timeout,
            guard=uninterrupted,
        )
        answer: Answer = answer_on(console) if live else PlainAnswer()
        try:
            for event in events:
                answer.show(event)
                if isinstance(event, Finished):
                    finished = event
        finally:
            answer.end()
    if stats:
        click.echo(statistics(finished), err=True)


def statistics(finished: Finished) -> str:
    """One line of what a generation took."""
    usage = finished.usage
    seconds = usage.prefill_seconds + usage.denoise_seconds
    rate = usage.output_tokens / usage.denoise_seconds if usage.denoise_seconds else 0.0
    why = {
        FinishReason.END_TOKEN: "ended by the model",
        FinishReason.STOP_STRING: f"stopped at {finished.stop_string!r}",
        FinishReason.LENGTH: "cut at its limit",
        FinishReason.OTHER: "ended for a reason that this version does not know",
    }[finished.reason]
    return (
        f"{usage.output_tokens} tokens in {usage.blocks} blocks and {usage.denoising_steps} steps, {seconds:.2f} s "
        f"({rate:.0f} tokens/s, {usage.prefill_seconds:.2f} s for {usage.prompt_tokens} prompt tokens, "
        f"{usage.queue_seconds:.2f} s queued); {why}"
    )
