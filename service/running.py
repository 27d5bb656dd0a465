"""A generation that was submitted, as its call sees it: its events, what they cost, and when it is given up.

An answer is paid for block by block, as the blocks are read. One that is given up is paid for as it stands by then,
with the blocks that nobody has read and the one that is open: else who reads the drafts and cancels would have it for
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from runtime.errors import DeadlineTooShort, DgemmaError, ReaderTooSlow
from runtime.events import Committed, Event, Finished
from runtime.runner import Handle
from service.mailbox import Mailbox
from service.pace import Pace
from service.quota import Account

READER_PATIENCE = 300.0
"""Seconds that a generation waits, without memory of the engine, for a client that has stopped reading."""


class Running:
    """Belongs to the event loop's thread; `close` must follow, after which the engine is free a step later."""

    def __init__(self, mailbox: Mailbox, handle: Handle, account: Account, pace: Pace) -> None:
        self._mailbox, self._handle, self._account, self._pace = mailbox, handle, account, pace
        mailbox.wake = handle.wake
        self._paid = 0
        """Tokens of the answer."""
        self._timers: list[asyncio.TimerHandle] = []
        self._look_after_reader()

    async def next(self) -> Event:
        """Its next event; a block's tokens are then spent.

        Raises:
            DgemmaError: the error that ended it.
        """
        event = await self._mailbox.get()
        if isinstance(event, Committed):
            self._pay(self._paid + len(event.token_ids))
        if isinstance(event, Finished):
            self._pace.learn(event.usage)
        return event

    def begin_within(self, seconds: float) -> None:
        """Give it up unless it has left the queue by then."""

        def look() -> None:
            if not self._mailbox.begun:
                self._end(DeadlineTooShort(f"after {seconds:.2f} s in the queue there is no time left for a block"))

        self._later(seconds, look)

    def cancel(self) -> None:
        """End it within a denoising step."""
        self._handle.cancel()

    def close(self) -> None:
        """End it, and everything about it."""
        for timer in self._timers:
            timer.cancel()
        self._handle.cancel()
        self._pay(self._handle.made_tokens)

    def _pay(self, tokens: int) -> None:
        """Spend what the answer costs by now, less what is paid."""
        self._account.spend(max(0, tokens - self._paid))
        self._paid = max(tokens, self._paid)

    def _look_after_reader(self) -> None:
        idle = self._mailbox.seconds_parked
        if idle >= READER_PATIENCE:
            self._end(ReaderTooSlow(f"nothing was read for {idle:.0f} s; resume behind the blocks that came"))
        else:
            self._later(READER_PATIENCE - idle, self._look_after_reader)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        now = asyncio.get_running_loop().time()
        self._timers = [timer for timer in self._timers if timer.when() > now]
        self._timers.append(asyncio.get_running_loop().call_later(seconds, act))

    def _end(self, error: DgemmaError) -> None:
        self._mailbox.put(error)
        self._handle.cancel()
