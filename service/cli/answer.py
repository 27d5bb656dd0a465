"""How an answer is shown: drafts rewritten in place on a terminal, plain text elsewhere.

On a terminal the open block's newest draft stands behind the committed text. Tokens that the step accepted are bold,
the others fade with their entropy, so that what is settled stands out from noise. Reading is never held up by drawing:
a draft is only put where the drawing thread finds it.
"""

from __future__ import annotations

import sys
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from runtime.events import Committed, Draft, Event
from service.cli.shades import shade

FRAMES_PER_SECOND = 20


class Answer(Protocol):
    """Shows the events of one answer."""

    def show(self, event: Event) -> None:
        """Show what an event brings."""

    def end(self) -> None:
        """The answer is over, well or not: leave the cursor at the head of a line."""


class PlainAnswer:
    """Writes committed text as it comes."""

    def __init__(self) -> None:
        self._last = "\n"

    def show(self, event: Event) -> None:
        """Write a commit's text; drafts are not shown."""
        if isinstance(event, Committed) and event.text:
            sys.stdout.write(event.text)
            sys.stdout.flush()
            self._last = event.text

    def end(self) -> None:
        """Finish the line."""
        if not self._last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


class LiveAnswer:
    """Rewrites the open block in place; whole lines of committed text scroll away above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = ""
        """The committed text behind the last line break, which the open block goes on from."""
        self._draft = Text()
        self._live = Live(self, console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True)
        self._live.start()

    def show(self, event: Event) -> None:
        """Take a draft or a commit."""
        if isinstance(event, Draft):
            self._draft = draft_text(event)
        elif isinstance(event, Committed):
            whole, line_break, self._line = (self._line + event.text).rpartition("\n")
            self._draft = Text()
            if line_break:
                self._console.print(Text(printable(whole)))

    def end(self) -> None:
        """Replace what is live by the committed text alone."""
        self._live.stop()
        if self._line:
            self._console.print(Text(printable(self._line)))
        self._line, self._draft = "", Text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The last lines, as many as the terminal is high: what is drawn in place must not scroll."""
        lines = console.render_lines(Text.assemble(printable(self._line), self._draft), options, pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


def answer_on(console: Console) -> Answer:
    """How to show an answer on this console."""
    return LiveAnswer(console) if console.is_terminal else PlainAnswer()


def draft_text(draft: Draft) -> Text:
    """A draft's text, each token in the shade of its entropy, accepted ones bold."""
    text = Text()
    start = 0
    for position, length in enumerate(draft.token_text_lengths):
        style = shade(float(draft.entropy[position]), bool(draft.accepted[position]))
        text.append(printable(draft.text[start : start + length]), style=style)
        start += length
    return text


def printable(text: str) -> str:
    """`text` without what would steer a terminal: an answer may hold anything."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)
