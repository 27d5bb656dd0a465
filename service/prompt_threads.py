"""Where prompts are rendered and tokenised: off the event loop, on threads of their own, no more than can be soon done.

Tokenising goes at about a megabyte a second, so that a message of 4 MB takes seconds. Two lanes, for short prompts and
for long ones, each of one thread and a bound on the bytes that wait: a handful of long prompts neither makes short ones
wait nor piles up work that nobody will be there to read.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from runtime.errors import QueueFull

T = TypeVar("T")

SHORT_BYTES = 64 << 10
"""Up to here a prompt is short: done in well under a tenth of a second."""

WAITING_BYTES = 8 << 20
"""Most bytes in one lane, the prompt being done included: the wait is seconds, and two prompts of the largest size."""

FIRST_PACE = 1e6
"""Bytes a second that tokenising is taken to do before any was measured."""

SMOOTHING = 0.2
"""Weight of the newest prompt in the measured pace."""


class PromptThreads:
    """Runs what prepares a prompt; `run` belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._short, self._long = _Lane("short-prompts"), _Lane("long-prompts")

    async def run(self, size: int, act: Callable[[], T]) -> T:
        """`act`'s result, from the thread for prompts of `size` bytes.

        A caller that is cancelled takes its prompt out, unless it is being done.

        Raises:
            QueueFull: too many bytes wait.
        """
        lane = self._short if size <= SHORT_BYTES else self._long
        return await lane.run(size, act)

    def close(self) -> None:
        """Take no more prompts and drop those that wait."""
        self._short.close()
        self._long.close()


class _Lane:
    """One thread and what waits for it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._prompts = self._bytes = 0
        self._pace = FIRST_PACE

    async def run(self, size: int, act: Callable[[], T]) -> T:
        with self._lock:
            if self._bytes + size > WAITING_BYTES and self._prompts:
                raise QueueFull(self._prompts, self._bytes / self._pace)
            self._prompts, self._bytes = self._prompts + 1, self._bytes + size
        future = self._thread.submit(self._timed, size, act)
        future.add_done_callback(lambda _: self._leave(size))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _timed(self, size: int, act: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return act()
        finally:
            pace = size / max(time.perf_counter() - began, 1e-6)
            with self._lock:
                self._pace += SMOOTHING * (pace - self._pace)

    def _leave(self, size: int) -> None:
        with self._lock:
            self._prompts, self._bytes = self._prompts - 1, self._bytes - size
