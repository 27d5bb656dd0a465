"""Messages on their way in: how many of a client arrive at a time, and how long one may take.

gRPC holds what has come of a message until it is whole, of as many as there are calls: 128 on each connection. A call
that nobody reads holds no more than its flow-control window (`service.transport`), so calls of one message are not read
before one of their client's places is free, and calls of reflection, whose messages are many, keep one to their end.
Conversations always read; how many may be open is bounded (`service.held_texts`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from runtime.errors import InvalidRequest, SenderTooSlow, Violation

T = TypeVar("T")

PLACES = 32
"""Messages of a client that arrive at a time, for each service, so that health is answered beside slow prompts: 160 MB
at most. Nearly all are whole within one round trip."""

PATIENCE = 60.0
"""Seconds that a message may take: one of 4 MB over half a megabit a second."""


@dataclass
class _Line:
    """Of one client and one service."""

    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PLACES))
    calls: int = 0
    """Those that have a place and those that wait for one."""


class Receiving:
    """Belongs to the event loop's thread."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """Give each message `patience` seconds to arrive."""
        self._patience = patience
        self._lines: dict[tuple[str, str], _Line] = {}

    async def only_message(self, requests: AsyncIterator[T], client: str, service: str) -> T:
        """The message of a client's call of a service, where calls have one.

        Raises:
            InvalidRequest: none came.
            SenderTooSlow: it did not come in time.
        """
        async with self.place(client, service):
            try:
                # gRPC's own iterator is a generator, which is not left to the garbage collector, call after call.
                async with asyncio.timeout(self._patience), aclosing(cast(Any, aiter(requests))) as messages:
                    return cast(T, await anext(messages))
            except StopAsyncIteration:
                raise InvalidRequest(Violation("", "no message came; send one")) from None
            except TimeoutError:
                text = f"the message did not come whole within {self._patience:g} s; send it over a faster connection"
                raise SenderTooSlow(text) from None

    @asynccontextmanager
    async def place(self, client: str, service: str) -> AsyncIterator[None]:
        """One of a client's places of a service, once it is free."""
        whose = client, service
        line = self._lines.setdefault(whose, _Line())
        line.calls += 1
        try:
            async with line.places:
                yield
        finally:
            line.calls -= 1
            if not line.calls:
                del self._lines[whose]
