"""The calls that are open on this server, so that shutting down can wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.errors import Draining


class Calls:
    """Counts open calls; once drained it lets no further ones in. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._open: dict[object, Callable[[], None]] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down."""
        return self._draining

    @contextmanager
    def enter(self, on_drain: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Be an open call inside the block; `on_drain` is called when the server begins to shut down meanwhile.

        Raises:
            Draining: it shuts down already.
        """
        self.refuse_when_draining()
        call = object()
        self._open[call] = on_drain
        self._idle.clear()
        try:
            yield
        finally:
            del self._open[call]
            if not self._open:
                self._idle.set()

    def refuse_when_draining(self) -> None:
        """Raise `Draining` when the server shuts down."""
        if self._draining:
            raise Draining("the server is shutting down; ask another one")

    def drain(self) -> None:
        """Let no more calls in, and tell those that are open."""
        self._draining = True
        for on_drain in list(self._open.values()):
            on_drain()

    async def wait_idle(self) -> None:
        """Wait until no call is open."""
        await self._idle.wait()
