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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from runtime.errors import Draining, QueueFull

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
            Draining: it was closed meanwhile.
        """
        lane = self._short if size <= SHORT_BYTES else self._long
        return await lane.run(size, act)

    def close(self) -> None:
        """Take no more prompts; whoever waits for one gets `Draining`, though it may be in the midst of being done."""
        self._short.close()
        self._long.close()


class _Lane:
    """One thread and what waits for it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._prompts = self._bytes = 0
        self._pace = FIRST_PACE
        self._callers: set[asyncio.Future[Any]] = set()

    async def run(self, size: int, act: Callable[[], T]) -> T:
        with self._lock:
            if self._bytes + size > WAITING_BYTES and self._prompts:
                raise QueueFull(self._prompts, self._bytes / self._pace)
            self._prompts, self._bytes = self._prompts + 1, self._bytes + size
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        self._callers.add(outcome)

        def tell(done: Future[T]) -> None:
            self._leave(size)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_hand_over, done, outcome)

        work = self._thread.submit(self._timed, size, act)
        work.add_done_callback(tell)
        try:
            return await outcome
        finally:
            self._callers.discard(outcome)
            work.cancel()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        for outcome in self._callers:
            if not outcome.done():
                outcome.set_exception(Draining("the server is shutting down; ask another one"))

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


def _hand_over(done: Future[T], outcome: asyncio.Future[T]) -> None:
    """The work's end to its caller, if that still waits."""
    if outcome.done() or done.cancelled():
        return
    if (error := done.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())
