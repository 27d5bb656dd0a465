"""How much text the open conversations hold: each keeps its history, and the turns that wait, until its stream ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.errors import ClientLimitReached, QueueFull

CLIENT_BYTES = 64 << 20
"""Most bytes that one client's conversations hold: more than fills fifty contexts of 262,144 tokens."""

ALL_BYTES = 4 * CLIENT_BYTES
"""Most bytes of all clients."""

RETRY = 1.0
"""Seconds; conversations end when their clients end them."""


class HeldTexts:
    """Counts bytes by client. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._conversations = 0

    @contextmanager
    def conversation(self, client: str) -> Iterator[Callable[[int], None]]:
        """A conversation, open for the time of the block, and the function that counts what it holds in addition.

        That function takes bytes, less than none where texts were let go, and raises `ClientLimitReached` where the
        client would hold too much, `QueueFull` where all would.
        """
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if count > 0:
                self._check(client, count)
            held += count
            self._bytes[client] += count

        self._conversations += 1
        try:
            yield hold
        finally:
            self._conversations -= 1
            self._bytes[client] -= held
            if not self._bytes[client]:
                del self._bytes[client]

    def _check(self, client: str, count: int) -> None:
        if self._bytes[client] + count > CLIENT_BYTES:
            raise ClientLimitReached("conversation_bytes", CLIENT_BYTES, RETRY)
        if self._bytes.total() + count > ALL_BYTES:
            raise QueueFull(self._conversations, RETRY)
