"""The way in: from a call to its running generation, past everything that may have to say no.

A call is refused while the server drains, where its client's limits are reached, too many prompts are being tokenised,
the queue is full or its deadline cannot be met, in this order: who may have nothing costs nothing. The first of them
that says no ends the call with its status; what was taken on is given back however the call ends.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

from runtime.errors import DeadlineTooShort, QueueFull
from service.authentication import CALLER
from service.calls import Calls
from service.held_texts import HeldTexts, Hold
from service.mailbox import Mailbox
from service.pace import Pace
from service.prompt_threads import PromptThreads
from service.quota import Account, Quotas
from service.running import Running
from service.served import Order, Served

T = TypeVar("T")


class Intake:
    """What a server's calls share on their way to the runner. Belongs to the event loop's thread."""

    def __init__(self, served: Served, calls: Calls, threads: PromptThreads, quotas: Quotas) -> None:
        self.served, self._calls, self._threads, self._quotas = served, calls, threads, quotas
        self._pace, self._texts = Pace(), HeldTexts()

    def enter(self, on_drain: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Be an open call inside the block; see `Calls.enter`."""
        return self._calls.enter(on_drain)

    def refuse_when_draining(self) -> None:
        """Raise `Draining` when the server shuts down."""
        self._calls.refuse_when_draining()

    async def prepared(self, size: int, act: Callable[[], T]) -> T:
        """What `act` makes of a prompt of `size` bytes; see `PromptThreads.run`."""
        return await self._threads.run(size, act, CALLER.get().name)

    def account(self) -> AbstractContextManager[Account]:
        """Have a generation under way inside the block, before its prompt is looked at; see `Quotas.generation`."""
        return self._quotas.generation(CALLER.get().name)

    def spender(self) -> Account:
        """The account of the client, which has tokens left; see `Quotas.spender`."""
        return self._quotas.spender(CALLER.get().name)

    def conversation(self) -> AbstractContextManager[Hold]:
        """Have a conversation open inside the block, and count what it holds; see `HeldTexts.conversation`."""
        return self._texts.conversation(CALLER.get().name)

    @asynccontextmanager
    async def running(self, order: Order, account: Account, time_remaining: float | None) -> AsyncIterator[Running]:
        """Submits the order for the time of the block; however the block is left, the engine is free a step later.

        Args:
            order: what to run.
            account: pays for it: for all that is encoded, what was committed before among it, and for the answer.
            time_remaining: seconds until the call's deadline; None where it has none.

        Raises:
            QueueFull, Draining, DeadlineTooShort, InvalidRequest: it cannot be run.
        """
        request = order.request
        least = self._pace.least_seconds(request.sampling)
        deadline = _deadline(time_remaining, least)
        mailbox = Mailbox(order.delivery.draft_interval)
        with order.fields.named():
            handle = self.served.runner.submit(
                order.prepared, mailbox, deadline, client=CALLER.get().name, priority=order.delivery.priority
            )
        encoded = len(request.prompt_ids) + len(request.committed_ids)
        account.spend(encoded)
        running = Running(mailbox, handle, account, self._pace)
        if time_remaining is not None:
            running.begin_within(time_remaining - least)
        try:
            yield running
        except QueueFull:  # It was crowded out of the queue: nothing was done for it.
            account.spend(-encoded)
            raise
        finally:
            running.close()


def _deadline(time_remaining: float | None, least: float) -> float | None:
    """The deadline on the monotonic clock.

    Raises:
        DeadlineTooShort: less than `least` seconds are left.
    """
    if time_remaining is None:
        return None
    if time_remaining <= least:
        left = f"{max(0.0, time_remaining):.2f} s are left, and a first block takes {least:.2f} s at least"
        raise DeadlineTooShort(f"{left}; allow more time")
    return time.monotonic() + time_remaining
