"""Which requests run: a bounded queue, admission by pages and slots, and who shares the next engine call.

No tensors, no threads, no engine. The caller asks `sweep`, `admit` and `next` once a step and does what they say.

Requests wait by priority, and within it clients in turn (`runtime.waiting`). Nobody overtakes the request that is next:
what it needs becomes free in time. Requests whose readers are behind cannot go on, and give way to whoever waits. BATCH
requests give way to INTERACTIVE ones: where one finds no room and theirs is what it needs, the newest of them go back
to the queue, keeping what they have committed. So that they do not starve, BATCH requests that are older than
`Limits.ageing` have a quarter of the places, where they go first and are not sent back.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from runtime.drain_rate import DrainRate
from runtime.errors import Cancelled, DeadlineTooShort, DgemmaError, InvalidRequest, QueueFull, Violation
from runtime.pool import PagePool
from runtime.ticket import Priority, State, Ticket
from runtime.turns import Turns
from runtime.waiting import WaitingLine

T = TypeVar("T")

AGED_SHARE = 4
"""One place of this many, and at least one, is for BATCH requests that have waited long."""
SPARE_DEADLINES = 64
"""Deadlines of requests that are done, kept before they are swept out: else each would keep its request in memory."""


@dataclass(frozen=True)
class Limits:
    """How much is taken on at a time."""

    max_active: int = 8
    """Requests that share the engine; never more than the engine has canvas slots."""
    max_waiting: int = 64
    """Requests in the queue."""
    max_rows: int | None = None
    """Requests that share an engine call; None: as many as the engine takes."""
    ageing: float = 30.0
    """Seconds from its submission after which a BATCH request may claim one of the places kept for such."""
    park_seconds: float = 10.0
    """How long a request whose reader is not ready keeps its pages and its slot where nobody else needs them."""


@dataclass(frozen=True)
class Admission(Generic[T]):
    """Who came in, and who had to leave for that."""

    admitted: list[Ticket[T]]
    sent_back: list[Ticket[T]]
    """These were active before and wait again, or are suspended; some may be among the admitted once more."""


class Scheduler(Generic[T]):
    """Requests waiting, active and suspended."""

    def __init__(self, pool: PagePool, slots: int, limits: Limits, clock: Callable[[], float]) -> None:
        self._pool, self._limits, self._clock = pool, limits, clock
        self._turns: Turns[T] = Turns(pool.encode_chunk)
        self._line: WaitingLine[T] = WaitingLine()
        self._active: dict[Ticket[T], None] = {}
        """Ordered by admission."""
        self._suspended: dict[Ticket[T], None] = {}
        self._places = min(slots, limits.max_active)
        self._free_slots = deque(range(self._places))
        self._drain = DrainRate()
        self._ending: list[Ticket[T]] = []
        """Cancelled, or crowded out of the queue; for the next sweep."""
        self._deadlines: list[tuple[float, int, Ticket[T]]] = []
        """A heap; a ticket that is done stays in it until it comes up or there are too many of its kind."""
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._line)

    @property
    def active(self) -> Collection[Ticket[T]]:
        """Requests admitted."""
        return self._active.keys()

    @property
    def suspended(self) -> Collection[Ticket[T]]:
        """Requests that gave everything back, since their readers are slow."""
        return self._suspended.keys()

    @property
    def empty(self) -> bool:
        """Whether there is no request left, not even one to be swept."""
        unswept = any(ticket.state is not State.DONE for ticket in self._ending)
        return not (self._line or self._active or self._suspended or unswept)

    def submit(self, ticket: Ticket[T]) -> None:
        """Queue a request; where that makes one too many, the client that has most loses its newest to the next sweep.

        Raises:
            InvalidRequest: it needs more pages than the whole pool has.
            DeadlineTooShort: its deadline has passed already.
            QueueFull: too many wait, and its client has as many as the others.
        """
        if not self._pool.could_fit(ticket.tokens):
            raise InvalidRequest(_too_long(ticket.tokens))
        if ticket.deadline is not None and ticket.deadline <= self._clock():
            raise DeadlineTooShort("the deadline passed before the request was queued; allow more time")
        full = QueueFull(len(self._line), self._drain.seconds(len(self._line)))
        ticket.number = next(self._numbers)
        self._line.append(ticket)
        if len(self._line) > self._limits.max_waiting:
            crowded_out = self._line.crowded_out()
            if crowded_out is ticket:
                self._line.remove(ticket)
                raise full
            self._end(crowded_out, full)
        if ticket.deadline is not None:
            heapq.heappush(self._deadlines, (ticket.deadline, ticket.number, ticket))

    def cancel(self, ticket: Ticket[T]) -> None:
        """Have the next `sweep` take the request out; from a queue it is gone at once."""
        if ticket.ending is None and ticket.state is not State.DONE:
            self._end(ticket, Cancelled("the request was cancelled"))

    def sweep(self) -> list[tuple[Ticket[T], DgemmaError]]:
        """Take out what was cancelled, crowded out or is too late, with the reason; its resources are free again."""
        now = self._clock()
        ending, self._ending = self._ending, []
        swept: list[tuple[Ticket[T], DgemmaError]] = []
        for ticket in ending:
            if ticket.state is not State.DONE:
                assert ticket.ending is not None
                swept.append((ticket, ticket.ending))
                self.finish(ticket)
        while self._deadlines and (self._deadlines[0][2].state is State.DONE or self._deadlines[0][0] <= now):
            _, _, ticket = heapq.heappop(self._deadlines)
            if ticket.state is not State.DONE:
                message = f"the deadline passed after {now - ticket.submitted:.1f} s; allow more time"
                swept.append((ticket, DeadlineTooShort(message)))
                self.finish(ticket)
        return swept

    def admit(self) -> Admission[T]:
        """Admit who is next while there is room, or room can be made."""
        admission: Admission[T] = Admission([], [])
        while (ticket := self._next_in_line()) is not None and self._make_room(ticket, admission):
            self._line.take(ticket)
            ticket.pages = self._pool.reserve(ticket.tokens, ticket.digests)
            ticket.slot, ticket.state, ticket.idle_since = self._free_slots.popleft(), State.ACTIVE, None
            ticket.begun = True
            self._active[ticket] = None
            admission.admitted.append(ticket)
        if admission.admitted:
            self._drain.busy_from(self._clock())
        return admission

    def next(self, need: Callable[[T], int | None], rows: int = 1) -> list[Ticket[T]]:
        """The requests that share the next call of at most `rows`; `need` is asked of each, see `Turns.choose`."""
        now = self._clock()

        def noted(ticket: Ticket[T]) -> int | None:
            wanted = need(ticket.work)
            ticket.idle_since = None if wanted is not None else now if ticket.idle_since is None else ticket.idle_since
            return wanted

        return self._turns.choose(self._active, noted, rows)

    def overdue(self) -> list[Ticket[T]]:
        """Active requests that could not go on for longer than a parked request keeps its memory."""
        latest = self._clock() - self._limits.park_seconds
        return [ticket for ticket in self._active if ticket.idle_since is not None and ticket.idle_since <= latest]

    def suspend(self, ticket: Ticket[T]) -> None:
        """Take an active request's pages and slot until `resume`."""
        self._leave(ticket)
        ticket.state = State.SUSPENDED
        self._suspended[ticket] = None

    def resume(self, ticket: Ticket[T]) -> None:
        """Queue a suspended request again, ahead of its client's others."""
        del self._suspended[ticket]
        self._requeue(ticket)

    def send_back(self, ticket: Ticket[T]) -> None:
        """Take an active request's pages and slot and queue it again, ahead of its client's others."""
        self._leave(ticket)
        self._requeue(ticket)

    def finish(self, ticket: Ticket[T]) -> None:
        """Take out a request, wherever it is; what it held is free again."""
        if ticket.state is State.ACTIVE:
            self._leave(ticket)
            self._drain.finished(self._clock(), idle=not self._active)
        elif ticket.state is State.SUSPENDED:
            del self._suspended[ticket]
        elif ticket.ending is None:
            self._line.remove(ticket)
        ticket.state = State.DONE
        if len(self._deadlines) > 2 * (len(self._line) + len(self._active) + len(self._suspended)) + SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.DONE]
            heapq.heapify(self._deadlines)

    def drop_all(self) -> list[Ticket[T]]:
        """Take out every request."""
        ending = [ticket for ticket in self._ending if ticket.state is State.WAITING]
        dropped = [*self._active, *self._suspended, *self._line, *ending]
        for ticket in dropped:
            self.finish(ticket)
        self._ending = []
        return dropped

    def wake_at(self) -> float | None:
        """When `sweep` or `overdue` has something to say next, if nothing else happens."""
        while self._deadlines and self._deadlines[0][2].state is State.DONE:
            heapq.heappop(self._deadlines)
        idle = [ticket.idle_since for ticket in self._active if ticket.idle_since is not None]
        overdue = [since + self._limits.park_seconds for since in idle]
        return min([*overdue, *(deadline for deadline, _, _ in self._deadlines[:1])], default=None)

    def _next_in_line(self) -> Ticket[T] | None:
        batch = self._line.head(Priority.BATCH)
        if batch is not None and self._has_claim(batch):
            return batch
        return self._line.head(Priority.INTERACTIVE) or batch

    def _make_room(self, ticket: Ticket[T], admission: Admission[T]) -> bool:
        """Whether the ticket fits now, or once those whom it needs not to be there have been sent back."""
        leaving = self._in_the_way(ticket)
        if leaving is None:
            return False
        for each in leaving:
            leave = self.send_back if each.idle_since is None else self.suspend
            leave(each)
            if each in admission.admitted:
                admission.admitted.remove(each)
            else:
                admission.sent_back.append(each)
        return True

    def _in_the_way(self, ticket: Ticket[T]) -> list[Ticket[T]] | None:
        """Who must leave for the ticket to fit, and none in vain; None where it would not even so.

        First those that are idle, the longest first, then BATCH requests, the newest first.
        """
        if self._fits(ticket, []):
            return []
        leaving = self._idle()
        if self._has_claim(ticket):
            leaving += [each for each in self._yielding()[::-1] if each.idle_since is None]
        if not leaving or not self._fits(ticket, leaving):
            return None
        for oldest in reversed(leaving.copy()):
            others = [each for each in leaving if each is not oldest]
            if self._fits(ticket, others):
                leaving = others
        return leaving

    def _fits(self, ticket: Ticket[T], without: list[Ticket[T]]) -> bool:
        """Whether the ticket would fit, were some others not active."""
        slot = bool(self._free_slots or without)
        return slot and self._pool.fits(ticket.tokens, ticket.digests, [each.pages for each in without])

    def _idle(self) -> list[Ticket[T]]:
        """Active requests that could not go on when they were asked last, the longest first."""
        idle = {each: each.idle_since for each in self._active if each.idle_since is not None}
        return sorted(idle, key=idle.__getitem__)

    def _yielding(self) -> list[Ticket[T]]:
        """Active BATCH requests, less the longest-waiting ones that have a place of their own; by admission."""
        batch = [ticket for ticket in self._active if ticket.priority == Priority.BATCH]
        aged = sorted(filter(self._aged, batch), key=lambda ticket: ticket.submitted)[: self._aged_places]
        return [ticket for ticket in batch if ticket not in aged]

    def _has_claim(self, ticket: Ticket[T]) -> bool:
        """Whether BATCH requests without a place of their own give way to this one."""
        if ticket.priority == Priority.INTERACTIVE:
            return True
        return self._aged(ticket) and sum(map(self._aged, self._active)) < self._aged_places

    @property
    def _aged_places(self) -> int:
        return max(1, self._places // AGED_SHARE)

    def _aged(self, ticket: Ticket[T]) -> bool:
        return ticket.priority == Priority.BATCH and self._clock() - ticket.submitted >= self._limits.ageing

    def _end(self, ticket: Ticket[T], reason: DgemmaError) -> None:
        """Have the next sweep tell the reason."""
        ticket.ending = reason
        self._ending.append(ticket)
        if ticket.state is State.WAITING:
            self._line.remove(ticket)

    def _leave(self, ticket: Ticket[T]) -> None:
        """Give back what an active request holds."""
        del self._active[ticket]
        ticket.pages.release()
        self._free_slots.append(ticket.slot)

    def _requeue(self, ticket: Ticket[T]) -> None:
        ticket.state = State.WAITING
        if ticket.ending is None:  # else it is swept from where it is: in no queue
            self._line.put_back(ticket)


def _too_long(tokens: int) -> Violation:
    return Violation(
        "max_output_token_count",
        f"prompt and whole canvases span {tokens} positions, more than this server's memory holds; "
        "ask for fewer tokens or shorten the prompt",
    )
