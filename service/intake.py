"""The way in: from a call to its running generation, past everything that may have to say no.

A call is refused while the server drains, its prompt where too many are being tokenised, its generation where its
client's limits are reached, the queue is full or its deadline has passed. The first of them that says no ends the call
with its status; what was taken on is given back however the call ends.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from runtime.errors import DeadlineTooShort
from runtime.events import Committed, Event
from runtime.runner import Handle
from service.authentication import CALLER
from service.calls import Calls
from service.mailbox import Mailbox
from service.prompt_threads import PromptThreads
from service.quota import Account, Quotas
from service.served import Order, Served

T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    """A generation that was submitted."""

    mailbox: Mailbox
    handle: Handle
    account: Account

    async def next(self) -> Event:
        """Its next event; a block's tokens are then spent.

        Raises:
            DgemmaError: the error that ended it.
        """
        event = await self.mailbox.get()
        if isinstance(event, Committed):
            self.account.spend(len(event.token_ids))
        return event


class Intake:
    """What a server's calls share on their way to the runner. Belongs to the event loop's thread."""

    def __init__(self, served: Served, calls: Calls, threads: PromptThreads, quotas: Quotas) -> None:
        self.served, self._calls, self._threads, self._quotas = served, calls, threads, quotas

    def enter(self, on_drain: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Be an open call inside the block; see `Calls.enter`."""
        return self._calls.enter(on_drain)

    def refuse_when_draining(self) -> None:
        """Raise `Draining` when the server shuts down."""
        self._calls.refuse_when_draining()

    async def prepared(self, size: int, act: Callable[[], T]) -> T:
        """What `act` makes of a prompt of `size` bytes; see `PromptThreads.run`."""
        return await self._threads.run(size, act)

    @asynccontextmanager
    async def running(self, order: Order, time_remaining: float | None) -> AsyncIterator[Running]:
        """Submits the order for the time of the block; however the block is left, the engine is free a step later.

        Args:
            order: what to run.
            time_remaining: seconds until the call's deadline; None where it has none.

        Raises:
            ClientLimitReached, QueueFull, Draining, DeadlineTooShort, InvalidRequest: it cannot be run.
        """
        with self._quotas.generation(CALLER.get().name) as account:
            mailbox = Mailbox(order.draft_interval)
            handle = self.served.runner.submit(order.request, mailbox, _deadline(time_remaining))
            account.spend(len(order.request.prompt_ids))
            try:
                yield Running(mailbox, handle, account)
            finally:
                handle.cancel()


def _deadline(time_remaining: float | None) -> float | None:
    """The deadline on the monotonic clock."""
    if time_remaining is None:
        return None
    if time_remaining <= 0:
        raise DeadlineTooShort("the deadline passed before the request could be queued; set a later one")
    return time.monotonic() + time_remaining
