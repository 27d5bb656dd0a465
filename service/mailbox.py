"""From the engine's thread to the handler of a call: events wait here until the client has room for them.

Drafts are replaced by newer ones and die with their block's commit; everything else is kept, in order. A client that
reads slowly therefore never holds up the engine, and what it reads next is never an old draft. Commits that nobody has
read yet are bounded: beyond the bound the generation is parked until there is room. Where it has given its memory back
meanwhile, it is taken up again once half of them were read, since all of it is then encoded anew.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from runtime.errors import DgemmaError
from runtime.events import Draft, Event

MAX_UNREAD = 32
"""Events that may wait before their generation has to: 8,192 tokens in blocks of 256, more than anybody is behind."""


class Mailbox:
    """The sink of one generation; `get` belongs to the event loop's thread, the rest to the engine's."""

    def __init__(self, min_draft_interval: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Made on the event loop that will read.

        Args:
            min_draft_interval: seconds that lie between two drafts at least; None: no drafts are wanted.
            clock: seconds, monotonic.
        """
        self._interval, self._clock = min_draft_interval, clock
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._kept: deque[Event | DgemmaError] = deque()
        self._draft: Draft | None = None
        self._last_draft = float("-inf")
        self._parked_since: float | None = None
        self._begun = False
        self.wake: Callable[[], None] = lambda: None
        """Called when `ready` or `caught_up` may have turned true."""

    def put(self, outcome: Event | DgemmaError) -> None:
        """Leave an event, or the error that ends the generation; never blocks, never raises."""
        with self._lock:
            self._begun = True
            if isinstance(outcome, Draft):
                self._draft, self._last_draft = outcome, self._clock()
            else:
                self._draft = None
                self._kept.append(outcome)
        with suppress(RuntimeError):  # The loop is closed, so nobody reads any more.
            self._loop.call_soon_threadsafe(self._filled.set)

    def wants_draft(self) -> bool:
        """Whether a draft of the step about to be made would be sent: drafts are on and the last one is old enough."""
        return self._interval is not None and self._clock() - self._last_draft >= self._interval

    def ready(self) -> bool:
        """Whether there is room for another block; if not the generation is parked until `wake` is called."""
        return self._has_room(MAX_UNREAD)

    def caught_up(self) -> bool:
        """Whether half of the room is free again; if not `wake` is called after the next read."""
        return self._has_room(MAX_UNREAD // 2 + 1)

    def _has_room(self, most: int) -> bool:
        with self._lock:
            full = len(self._kept) >= most
            if full and self._parked_since is None:
                self._parked_since = self._clock()
        return not full

    @property
    def begun(self) -> bool:
        """Whether anything has been put."""
        return self._begun

    @property
    def seconds_parked(self) -> float:
        """How long nothing has been read while there was no room; 0 where there is."""
        with self._lock:
            return 0.0 if self._parked_since is None else self._clock() - self._parked_since

    @property
    def unread(self) -> int:
        """Events that wait."""
        with self._lock:
            return len(self._kept) + (self._draft is not None)

    async def get(self) -> Event:
        """The oldest event that is kept, else the newest draft; waits for one.

        Raises:
            DgemmaError: the error that ended the generation, after all events before it.
        """
        while True:
            with self._lock:
                outcome = self._kept.popleft() if self._kept else self._draft
                if isinstance(outcome, Draft):
                    self._draft = None
                parked, self._parked_since = self._parked_since is not None, None
                self._filled.clear()
            if parked:
                self.wake()
            if isinstance(outcome, DgemmaError):
                raise outcome
            if outcome is not None:
                return outcome
            await self._filled.wait()
