"""The scheduler against plain lists of what waits and what is active, on a clock that the test sets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.engines.fake import FACTS
from runtime.engines.protocol import PoolGeometry
from runtime.errors import Cancelled, DeadlineTooShort, InvalidRequest, QueueFull
from runtime.pool import PagePool
from runtime.scheduler import Limits, Scheduler, Ticket

PAGE = 16
PAGES = 12
SLIDING = (FACTS.sliding_window - 1 + FACTS.canvas_length - 2) // PAGE + 2


def pool(pages: int = PAGES) -> PagePool:
    """A pool that its full pages bound: sliding ones are plenty."""
    return PagePool(PoolGeometry(PAGE, 100 * SLIDING, pages, 100), FACTS, FACTS.canvas_length)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of what a runner does."""

    @initialize(max_active=st.integers(1, 4), max_waiting=st.integers(1, 4), slots=st.integers(1, 5))
    def make(self, max_active: int, max_waiting: int, slots: int) -> None:
        self.now, self.names = 0.0, itertools.count()
        self.max_active, self.max_waiting = min(max_active, slots), max_waiting
        self.pool = pool()
        self.scheduler: Scheduler[int] = Scheduler(self.pool, slots, Limits(max_active, max_waiting), lambda: self.now)
        self.waiting: list[Ticket[int]] = []
        self.active: list[Ticket[int]] = []
        self.skipped: dict[int, set[int]] = {}
        """Per active request: who had a turn since its own last one."""

    def pages(self, tickets: list[Ticket[int]]) -> int:
        return sum(-(-ticket.tokens // PAGE) for ticket in tickets)

    @rule(
        tokens=st.integers(1, 2 * PAGE) | st.integers(1, PAGE * (PAGES + 2)),
        seconds=st.none() | st.integers(0, 5),
        at_once=st.booleans(),
    )
    def submit(self, tokens: int, seconds: int | None, at_once: bool) -> None:
        deadline = None if seconds is None else self.now + seconds
        refusal = (
            InvalidRequest
            if tokens > PAGE * PAGES
            else DeadlineTooShort
            if seconds == 0
            else QueueFull
            if len(self.waiting) == self.max_waiting
            else None
        )
        name = next(self.names)
        if refusal is None:
            self.waiting.append(self.scheduler.submit(name, tokens, deadline))
        else:
            with pytest.raises(refusal):
                self.scheduler.submit(name, tokens, deadline)
        if at_once:
            self.admit()

    @rule()
    def admit(self) -> None:
        admitted = self.scheduler.admit()
        assert admitted == self.waiting[: len(admitted)], "first come, first admitted"
        del self.waiting[: len(admitted)]
        self.active += admitted
        for ticket in admitted:
            self.skipped[ticket.work] = set()
        assert self.pages(self.active) <= PAGES
        if self.waiting:
            fits = self.pages([*self.active, self.waiting[0]]) <= PAGES
            assert not (fits and len(self.active) < self.max_active), "the head of the queue waits without need"

    @precondition(lambda self: self.active)
    @rule(data=st.data(), turns=st.integers(1, 6))
    def next(self, data: st.DataObject, turns: int) -> None:
        for _ in range(turns):
            self.turn(data)

    def turn(self, data: st.DataObject) -> None:
        ready = {ticket.work for ticket in self.active if data.draw(st.booleans())}
        chosen = self.scheduler.next(ready.__contains__)
        if chosen is None:
            assert not ready
            return
        assert chosen in self.active
        assert chosen.work in ready
        for work in ready - {chosen.work}:
            assert chosen.work not in self.skipped[work], f"{chosen.work} has two turns while {work} was ready"
        for ticket in self.active:
            self.skipped[ticket.work].add(chosen.work)
        self.skipped[chosen.work] = set()

    @precondition(lambda self: self.active or self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([*self.active, *self.waiting])).cancelled = True

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.active))
        self.scheduler.finish(ticket)
        self.active.remove(ticket)

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        expected = {
            ticket.work: Cancelled if ticket.cancelled else DeadlineTooShort
            for ticket in (*self.active, *self.waiting)
            if ticket.cancelled or (ticket.deadline is not None and ticket.deadline <= self.now)
        }
        assert {ticket.work: type(error) for ticket, error in self.scheduler.sweep()} == expected
        self.active = [ticket for ticket in self.active if ticket.work not in expected]
        self.waiting = [ticket for ticket in self.waiting if ticket.work not in expected]

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert (self.scheduler.waiting, self.scheduler.active) == (len(self.waiting), len(self.active))
        slots = [ticket.slot for ticket in self.active]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.max_active for slot in slots)
        deadlines = [ticket.deadline for ticket in (*self.active, *self.waiting) if ticket.deadline is not None]
        assert self.scheduler.next_deadline() == min(deadlines, default=None)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            assert {ticket.work for ticket in self.scheduler.drop_all()} == {
                ticket.work for ticket in (*self.active, *self.waiting)
            }
            assert self.pool.idle
            assert self.scheduler.admit() == []


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_retry_after_is_the_queue_at_the_measured_rate() -> None:
    """Catches a guess in place of the measured rate, and an idle gap counted as work."""
    now = 0.0
    scheduler: Scheduler[str] = Scheduler(pool(), 1, Limits(max_active=1, max_waiting=2), lambda: now)
    for name in ("first", "second", "third"):
        now += 100.0  # Idle between two requests: must not slow the measured rate.
        scheduler.submit(name, PAGE)
        [ticket] = scheduler.admit()
        now += 4.0
        scheduler.finish(ticket)
    scheduler.submit("running", PAGE)
    scheduler.admit()
    scheduler.submit("waiting", PAGE)
    scheduler.submit("waiting too", PAGE)
    with pytest.raises(QueueFull) as caught:
        scheduler.submit("refused", PAGE)
    assert caught.value.waiting == 2
    assert caught.value.retry_after == pytest.approx(2 * 4.0)


def test_a_long_request_is_not_overtaken_for_ever() -> None:
    """Catches admission that lets short requests slip past a long one at the queue's head."""
    scheduler: Scheduler[str] = Scheduler(pool(), 8, Limits(max_active=8, max_waiting=8), lambda: 0.0)
    short = scheduler.submit("short", PAGE)
    assert scheduler.admit() == [short]
    long = scheduler.submit("long", PAGE * PAGES)
    scheduler.submit("late", PAGE)
    assert scheduler.admit() == []
    scheduler.finish(short)
    assert scheduler.admit() == [long]
