"""How many conversations are open, and how much text they hold: each keeps its history, and the turns that wait.

Each of them reads all the time, since a cancellation may come, and may thus hold a message that has come in part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from runtime.errors import ClientLimitReached, QueueFull

CLIENT_BYTES = 64 << 20
"""Most bytes that one client's conversations hold: more than fills fifty contexts of 262,144 tokens."""

ALL_BYTES = 4 * CLIENT_BYTES
"""Most bytes of all clients."""

CLIENT_CONVERSATIONS = 128
"""Most that one client has open: as many as one connection takes, with 640 MB of messages in part at the very most."""

ALL_CONVERSATIONS = 8 * CLIENT_CONVERSATIONS
"""Most that all clients have open."""

RETRY = 1.0
"""Seconds; conversations end when their clients end them."""


class Hold(Protocol):
    """Counts what a conversation holds in addition; see `HeldTexts.conversation`."""

    def __call__(self, count: int, made: bool = False) -> None:
        """Count bytes."""


class HeldTexts:
    """Counts bytes by client. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._conversations: Counter[str] = Counter()

    @contextmanager
    def conversation(self, client: str) -> Iterator[Hold]:
        """A conversation, open for the time of the block, and the function that counts what it holds in addition.

        That function takes bytes, less than none where texts were let go, and raises `ClientLimitReached` where the
        client would hold too much, `QueueFull` where all would. `made` are bytes of the server's own, which are held in
        any case.

        Raises:
            ClientLimitReached: the client has too many open.
            QueueFull: all have.
        """
        if self._conversations[client] >= CLIENT_CONVERSATIONS:
            raise ClientLimitReached("conversations", CLIENT_CONVERSATIONS, RETRY)
        if self._conversations.total() >= ALL_CONVERSATIONS:
            raise QueueFull(self._conversations.total(), RETRY)
        held = 0

        def hold(count: int, made: bool = False) -> None:
            nonlocal held
            if count > 0 and not made:
                self._check(client, count)
            held += count
            self._bytes[client] += count

        self._conversations[client] += 1
        try:
            yield hold
        finally:
            self._conversations[client] -= 1
            self._bytes[client] -= held
            if not self._conversations[client]:
                del self._conversations[client], self._bytes[client]

    def _check(self, client: str, count: int) -> None:
        if self._bytes[client] + count > CLIENT_BYTES:
            raise ClientLimitReached("conversation_bytes", CLIENT_BYTES, RETRY)
        if self._bytes.total() + count > ALL_BYTES:
            raise QueueFull(self._conversations.total(), RETRY)
