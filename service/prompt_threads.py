"""Where prompts are rendered and tokenised: off the event loop, on threads of their own, no more than can be soon done.

Tokenising goes at about a megabyte a second, so that a message of 4 MB takes seconds. Two lanes, for short prompts and
for long ones, each of one thread and bounds on the bytes that wait: a handful of long prompts neither makes short ones
wait nor piles up work that nobody will be there to read. In each lane clients take turns, and none can fill it alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from runtime.errors import Draining, QueueFull

T = TypeVar("T")

SHORT_BYTES = 64 << 10
"""Up to here a prompt is short: done in well under a tenth of a second."""

CLIENT_BYTES = 8 << 20
"""Most bytes of one client in one lane, the prompt being done included: the wait is seconds, and two prompts of the
largest size."""

WAITING_BYTES = 4 * CLIENT_BYTES
"""Most bytes of all clients in one lane."""

FIRST_PACE = 1e6
"""Bytes a second that tokenising is taken to do before any was measured."""

SMOOTHING = 0.2
"""Weight of the newest prompt in the measured pace."""


class PromptThreads:
    """Runs what prepares a prompt; `run` belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._short, self._long = _Lane("short-prompts"), _Lane("long-prompts")

    async def run(self, size: int, act: Callable[[], T], client: str = "") -> T:
        """`act`'s result, from the thread for prompts of `size` bytes, where it is the client's turn.

        A caller that is cancelled takes its prompt out, unless it is being done.

        Raises:
            QueueFull: too many bytes wait.
            Draining: it is closed, or was so meanwhile.
        """
        lane = self._short if size <= SHORT_BYTES else self._long
        return await lane.run(size, act, client)

    def close(self) -> None:
        """Take no more prompts; whoever waits for one gets `Draining`, though it may be in the midst of being done."""
        self._short.close()
        self._long.close()


@dataclass(eq=False)
class _Work:
    """What prepares one prompt."""

    size: int
    act: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class _Lane:
    """One thread and what waits for it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, deque[_Work]] = OrderedDict()
        """Of each client what waits, the client whose turn it is first."""
        self._prompts = 0
        self._bytes: Counter[str] = Counter()
        """By client, what is being done included."""
        self._pace = FIRST_PACE
        self._callers: set[asyncio.Future[Any]] = set()
        self._closed = False

    async def run(self, size: int, act: Callable[[], T], client: str) -> T:
        if self._closed:
            raise _draining()
        work = _Work(size, act)
        self._enter(work, client)
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        self._callers.add(outcome)

        def tell(done: Future[T]) -> None:
            self._leave(work, client)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_hand_over, done, outcome)

        work.done.add_done_callback(tell)
        self._thread.submit(self._do_next)
        try:
            return await outcome
        finally:
            self._callers.discard(outcome)
            work.done.cancel()

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        for outcome in self._callers:
            if not outcome.done():
                outcome.set_exception(_draining())

    def _enter(self, work: _Work, client: str) -> None:
        with self._lock:
            own, everybodys = self._bytes[client], self._bytes.total()
            if (own and own + work.size > CLIENT_BYTES) or (everybodys and everybodys + work.size > WAITING_BYTES):
                raise QueueFull(self._prompts, everybodys / self._pace)
            self._prompts += 1
            self._bytes[client] += work.size
            self._lines.setdefault(client, deque()).append(work)

    def _do_next(self) -> None:
        """On the thread, once for each prompt that has entered: do the next one, if there is one left."""
        with self._lock:
            if not self._lines:
                return
            client, line = self._lines.popitem(last=False)
            work = line.popleft()
            if line:
                self._lines[client] = line
        if not work.done.set_running_or_notify_cancel():
            return
        began = time.perf_counter()
        try:
            result = work.act()
        except BaseException as error:
            end: Callable[[], None] = partial(work.done.set_exception, error)
        else:
            end = partial(work.done.set_result, result)
        with self._lock:
            pace = work.size / max(time.perf_counter() - began, 1e-6)
            self._pace += SMOOTHING * (pace - self._pace)
        end()

    def _leave(self, work: _Work, client: str) -> None:
        """It is done, or nobody waits for it any more."""
        with self._lock:
            self._prompts -= 1
            self._bytes[client] -= work.size
            if not self._bytes[client]:
                del self._bytes[client]
            line = self._lines.get(client, deque())
            if work in line:
                line.remove(work)
                if not line:
                    del self._lines[client]


def _draining() -> Draining:
    return Draining("the server is shutting down; ask another one")


def _hand_over(done: Future[T], outcome: asyncio.Future[T]) -> None:
    """The work's end to its caller, if that still waits."""
    if outcome.done() or done.cancelled():
        return
    if (error := done.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())
