"""The grammar of a turn, `started (draft* committed)* finished`, checked event by event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Ungrammatical(AssertionError):
    """A stream said something that its grammar does not allow."""


@dataclass
class Turn:
    """What a reader has of one turn; `take` every response of it."""

    first_block: int = 0
    """Index of the block that comes first: how many were resumed from."""
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    started: Any = None
    finished: Any = None
    cancelled: bool = False
    drafts: int = 0
    """Drafts of the open block."""

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.texts)

    @property
    def ended(self) -> bool:
        """Whether no event may follow."""
        return self.finished is not None or self.cancelled

    def take(self, response: Any) -> None:
        """Take the next response.

        Raises:
            Ungrammatical: it must not come here.
        """
        event = response.WhichOneof("event")
        self._check(not self.ended, f"{event} behind the end")
        if event not in ("started", "cancelled"):
            self._check(self.started is not None, f"{event} before started")
        getattr(self, f"_take_{event}")(getattr(response, event))

    def _take_started(self, started: Any) -> None:
        self._check(self.started is None, "started twice")
        self.started = started

    def _take_draft(self, draft: Any) -> None:
        self._check(draft.block_index == self._next, f"draft of block {draft.block_index}, {self._next} is open")
        self.drafts += 1

    def _take_committed(self, committed: Any) -> None:
        self._check(committed.block_index == self._next, f"block {committed.block_index} in place of {self._next}")
        self.texts.append(committed.text)
        self.token_ids.extend(committed.token_ids)
        self.drafts = 0

    def _take_finished(self, finished: Any) -> None:
        self._check(self.drafts == 0, "finished behind a draft that nothing followed")
        self._check(bool(self.texts), "finished without a block")
        self.finished = finished

    def _take_cancelled(self, _: Any) -> None:
        self.cancelled = True

    @property
    def _next(self) -> int:
        return self.first_block + len(self.texts)

    @staticmethod
    def _check(good: bool, message: str) -> None:
        if not good:
            raise Ungrammatical(message)


class Numbers:
    """The responses' sequence numbers: from 0, without gaps."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, response: Any) -> None:
        """Take the next response.

        Raises:
            Ungrammatical: one was lost, or came twice.
        """
        if response.sequence_number != self._next:
            raise Ungrammatical(f"event {response.sequence_number} in place of {self._next}")
        self._next += 1
