"""Which request runs next: a bounded queue, admission by pages and slots, round-robin over what was admitted.

No tensors, no threads, no engine. The caller asks `sweep`, `admit` and `next` once a step and does what they say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from runtime.errors import Cancelled, DeadlineTooShort, DgemmaError, InvalidRequest, QueueFull, Violation
from runtime.pool import PagePool, Sequence

T = TypeVar("T")

FIRST_GUESS = 1.0
"""Seconds a request is taken to need before any has finished."""
LONGEST_RETRY = 60.0
"""Seconds; a client that comes later than this learns nothing new by waiting."""
SMOOTHING = 0.2
"""Weight of the newest interval in the drain rate: about the last ten requests count."""


@dataclass(frozen=True)
class Limits:
    """How much is taken on at a time."""

    max_active: int = 8
    """Requests that share the engine; never more than the engine has canvas slots."""
    max_waiting: int = 64
    """Requests in the queue."""


@dataclass(eq=False)
class Ticket(Generic[T]):
    """One request on its way through the scheduler."""

    work: T
    tokens: int
    """Positions to reserve: prompt and whole canvases."""
    deadline: float | None
    """Seconds on the scheduler's clock."""
    submitted: float
    cancelled: bool = False
    """Set by the caller; looked at by `sweep`."""
    pages: Sequence = field(init=False)
    """From admission on."""
    slot: int = field(init=False)
    """The engine's canvas slot, from admission on."""


class Scheduler(Generic[T]):
    """Requests waiting and requests active."""

    def __init__(self, pool: PagePool, slots: int, limits: Limits, clock: Callable[[], float]) -> None:
        self._pool, self._limits, self._clock = pool, limits, clock
        self._waiting: deque[Ticket[T]] = deque()
        self._active: deque[Ticket[T]] = deque()
        self._free_slots = deque(range(min(slots, limits.max_active)))
        self._drain = _DrainRate()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests admitted."""
        return len(self._active)

    def submit(self, work: T, tokens: int, deadline: float | None = None) -> Ticket[T]:
        """Queue a request.

        Raises:
            InvalidRequest: it needs more pages than the whole pool has.
            DeadlineTooShort: its deadline has passed already.
            QueueFull: too many wait.
        """
        now = self._clock()
        if not self._pool.could_fit(tokens):
            raise InvalidRequest(_too_long(tokens))
        if deadline is not None and deadline <= now:
            raise DeadlineTooShort("the deadline passed before the request was queued; allow more time")
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFull(len(self._waiting), self._drain.seconds(len(self._waiting)))
        ticket = Ticket(work, tokens, deadline, now)
        self._waiting.append(ticket)
        return ticket

    def sweep(self) -> list[tuple[Ticket[T], DgemmaError]]:
        """Take out what was cancelled or is too late, with the reason; its resources are free again."""
        now = self._clock()
        swept = [(ticket, error) for ticket in self._tickets() if (error := _over(ticket, now)) is not None]
        for ticket, _ in swept:
            self.finish(ticket)
        return swept

    def admit(self) -> list[Ticket[T]]:
        """Admit from the head of the queue what fits now, in order: nobody overtakes a long request."""
        admitted = []
        while self._waiting and self._free_slots and self._pool.fits(self._waiting[0].tokens):
            ticket = self._waiting.popleft()
            ticket.pages, ticket.slot = self._pool.reserve(ticket.tokens), self._free_slots.popleft()
            self._active.append(ticket)
            admitted.append(ticket)
        if admitted:
            self._drain.busy_from(self._clock())
        return admitted

    def next(self, ready: Callable[[T], bool]) -> Ticket[T] | None:
        """The active request whose turn it is, of those that are ready; it then goes to the back."""
        for ticket in list(self._active):
            if ready(ticket.work):
                self._active.remove(ticket)
                self._active.append(ticket)
                return ticket
        return None

    def finish(self, ticket: Ticket[T]) -> None:
        """Take out a request, waiting or active; what it held is free again."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            return
        self._active.remove(ticket)
        ticket.pages.release()
        self._free_slots.append(ticket.slot)
        self._drain.finished(self._clock(), idle=not self._active)

    def drop_all(self) -> list[Ticket[T]]:
        """Take out every request."""
        dropped = list(self._tickets())
        for ticket in dropped:
            self.finish(ticket)
        return dropped

    def next_deadline(self) -> float | None:
        """The earliest deadline of any request."""
        return min((ticket.deadline for ticket in self._tickets() if ticket.deadline is not None), default=None)

    def _tickets(self) -> list[Ticket[T]]:
        return [*self._active, *self._waiting]


class _DrainRate:
    """Smoothed seconds between two requests leaving a busy engine."""

    def __init__(self) -> None:
        self._interval: float | None = None
        self._since: float | None = None

    def busy_from(self, now: float) -> None:
        if self._since is None:
            self._since = now

    def finished(self, now: float, idle: bool) -> None:
        if self._since is not None:
            interval = now - self._since
            previous = interval if self._interval is None else self._interval
            self._interval = previous + SMOOTHING * (interval - previous)
        self._since = None if idle else now

    def seconds(self, requests: int) -> float:
        interval = FIRST_GUESS if self._interval is None else self._interval
        return min(LONGEST_RETRY, requests * interval)


def _over(ticket: Ticket[T], now: float) -> DgemmaError | None:
    if ticket.cancelled:
        return Cancelled("the request was cancelled")
    if ticket.deadline is not None and ticket.deadline <= now:
        return DeadlineTooShort(f"the deadline passed after {now - ticket.submitted:.1f} s; allow more time")
    return None


def _too_long(tokens: int) -> Violation:
    return Violation(
        "max_output_token_count",
        f"prompt and whole canvases span {tokens} positions, more than this server's memory holds; "
        "ask for fewer tokens or shorten the prompt",
    )
