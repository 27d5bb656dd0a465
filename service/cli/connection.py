"""Calls that Ctrl-C cannot tear apart."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from service.cli.target import Target
from service.client import Client


@contextmanager
def connected(target: Target) -> Iterator[Client]:
    """A client for the time of the block."""
    client = Client(target.address, target.credentials)
    try:
        yield client
    finally:
        with uninterrupted():
            client.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off to the end of the block.

    A KeyboardInterrupt inside gRPC, while it starts or ends a call, can leave a lock of the channel held for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        interrupted.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
