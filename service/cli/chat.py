"""`dgemma chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import click
from rich.console import Console

from runtime.events import Committed, Event, Finished
from runtime.prompt import Message, Role
from runtime.request import SamplingOverrides
from service.cli.answer import answer_on
from service.cli.connection import connected, uninterrupted
from service.cli.exits import REFUSED, Failure
from service.cli.failures import failure_of, sentence_of
from service.cli.options import sampling_options, timeout_option
from service.cli.target import Target, target_options
from service.client import CallFailed, Client, Conversation, TurnCancelled
from service.progress import Progress
from service.resuming import Retries

PROMPT = "\001\033[1m\002> \001\033[0m\002"
"""Bold; written by readline, which is told by the control characters what takes no room."""

DRAFT_INTERVAL = 0.05
"""Seconds: as often as a terminal is redrawn."""


@click.command("chat")
@target_options
@timeout_option(3600.0, "the conversation")
@click.option("--system", help="Standing instructions, told to the model before the conversation.")
@sampling_options
def command(target: Target, timeout: float, system: str | None, sampling: SamplingOverrides) -> None:
    """Hold a conversation: each line is a turn, the server keeps the history.

    On a terminal each block is rewritten in place while it is denoised; what is settled is bold, what is noise is grey.
    Ctrl-C cancels the answer under way, which then leaves no trace in the history; once more, or Ctrl-D, quits.
    Piped, every line of standard input is a turn and answers are plain text.
    """
    console = Console(highlight=False)
    history = [Message(Role.SYSTEM, system)] if system is not None else []
    with connected(target) as client:
        Chat(client, console, sampling, timeout, history).hold(questions(console))


def questions(console: Console) -> Iterator[str]:
    """What the user says, line by line; ends with the input, or with Ctrl-C at the prompt."""
    if not sys.stdin.isatty():
        for raw in sys.stdin.buffer:
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise Failure(f"standard input is not UTF-8 at byte {error.start} of a line") from error
            if line:
                yield line
        return
    import readline  # noqa: F401  gives the prompt below its history and editing

    while True:
        try:
            line = input(PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line:
            yield line


@dataclass
class Chat:
    """A conversation that goes on in a new stream where a turn was refused, or where its stream broke."""

    client: Client
    console: Console
    sampling: SamplingOverrides
    timeout: float
    """Seconds of one stream."""
    history: list[Message] = field(default_factory=list)
    _conversation: Conversation = field(init=False)

    def hold(self, questions: Iterator[str]) -> None:
        """Answer the questions until there are no more.

        Raises:
            Failure: a question that was piped in was refused, or the server failed.
        """
        self._open()
        try:
            for question in questions:
                try:
                    self._turn(question)
                except CallFailed as error:
                    if failure_of(error).exit_code != REFUSED or not self.console.is_terminal:
                        raise
                    self.console.print(sentence_of(error), style="red", markup=False)
                    self._open()
        finally:
            with uninterrupted():
                self._conversation.close()

    def _open(self) -> None:
        """Begin a stream behind the history, in place of the one before."""
        interval = DRAFT_INTERVAL if self.console.is_terminal else None
        with uninterrupted():
            if hasattr(self, "_conversation"):
                self._conversation.close()
            self._conversation = self.client.converse(
                self.history, self.sampling, draft_interval=interval, timeout=self.timeout
            )

    def _turn(self, question: str) -> None:
        """Ask, show the answer, and remember both; a cancelled turn is forgotten, as the server forgets it."""
        answer = answer_on(self.console)
        committed: list[str] = []
        try:
            for event in self._over_streams(question):
                answer.show(event)
                if isinstance(event, Committed):
                    committed.append(event.text)
                if isinstance(event, Finished):
                    text = "".join(committed)
                    self.history += [Message(Role.USER, question), Message(Role.MODEL, text)]
        finally:
            answer.end()

    def _over_streams(self, question: str) -> Iterator[Event]:
        """The turn's events, over as many streams as it takes."""
        progress, retries = Progress(), Retries(self.timeout)
        while True:
            try:
                for event in self._events(self._conversation.start_turn(question, progress)):
                    retries.went_on()
                    if progress.take(event):
                        yield event
                return
            except CallFailed as error:
                # Between two turns a stream may break as well: what was said before is not lost either.
                retries.wait(error, begun=progress.started is not None or len(self.history) > 1)
                self._open()

    def _events(self, index: int) -> Iterator[Event]:
        """The turn's events; Ctrl-C cancels it, once more quits."""
        cancelled = False
        conversation = self._conversation
        responses = iter(conversation)
        while True:
            try:
                _, event = next(responses)
            except KeyboardInterrupt:
                if cancelled:
                    raise click.Abort from None
                cancelled = True
                conversation.cancel_turn(index)
                # The interrupted iterator is done with, the stream is not.
                responses = iter(conversation)
                continue
            except StopIteration:
                return
            if isinstance(event, TurnCancelled):
                self.console.print("[dim](cancelled)[/dim]")
                return
            yield event
            if isinstance(event, Finished):
                return
