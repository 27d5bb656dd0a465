"""The scheduler against plain lists of what waits and what is active, on a clock that the test sets."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.engines.fake import FACTS
from runtime.engines.protocol import PoolGeometry
from runtime.errors import Cancelled, DeadlineTooShort, DgemmaError, InvalidRequest, QueueFull
from runtime.pool import PagePool
from runtime.scheduler import Limits, Scheduler
from runtime.ticket import Priority, Ticket

PAGE = 16
PAGES = 12
SLIDING = (FACTS.sliding_window - 1 + 256 - 2) // PAGE + 2
CLIENTS = ("ann", "bob", "cid")


def pool(pages: int = PAGES) -> PagePool:
    """A pool that its full pages bound: sliding ones are plenty."""
    return PagePool(PoolGeometry(PAGE, 100 * SLIDING, pages, 100), FACTS)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of what a runner does; every ticket is known to the test by where it should be."""

    @initialize(max_active=st.integers(1, 8), max_waiting=st.integers(1, 6), slots=st.integers(1, 8))
    def make(self, max_active: int, max_waiting: int, slots: int) -> None:
        self.now, self.names = 0.0, itertools.count()
        self.places, self.max_waiting = min(max_active, slots), max_waiting
        self.pool = pool()
        limits = Limits(max_active, max_waiting, ageing=20.0, park_seconds=5.0)
        self.scheduler: Scheduler[int] = Scheduler(self.pool, slots, limits, lambda: self.now)
        self.waiting: list[Ticket[int]] = []
        self.active: list[Ticket[int]] = []
        self.suspended: list[Ticket[int]] = []
        self.unswept: list[Ticket[int]] = []
        """Cancelled, or crowded out, while they waited."""
        self.reasons: dict[int, type[DgemmaError]] = {}
        """Of those that must end, why."""
        self.begun: set[int] = set()
        """Those that were ever admitted."""
        self.idle: set[int] = set()
        """Those that could not go on when they were asked last."""

    def tickets(self) -> list[Ticket[int]]:
        return [*self.waiting, *self.active, *self.suspended, *self.unswept]

    def pages(self, tickets: list[Ticket[int]]) -> int:
        return sum(-(-ticket.tokens // PAGE) for ticket in tickets)

    @rule(
        tokens=st.integers(1, 2 * PAGE) | st.integers(1, PAGE * (PAGES + 2)),
        seconds=st.none() | st.integers(0, 5),
        client=st.sampled_from(CLIENTS),
        priority=st.sampled_from(Priority),
        at_once=st.booleans(),
    )
    def submit(self, tokens: int, seconds: int | None, client: str, priority: Priority, at_once: bool) -> None:
        deadline = None if seconds is None else self.now + seconds
        ticket = Ticket(next(self.names), tokens, self.now, deadline, client=client, priority=priority)
        crowded_out = self.crowded_out(ticket)
        refusal = (
            InvalidRequest
            if tokens > PAGE * PAGES
            else DeadlineTooShort
            if seconds == 0
            else QueueFull
            if crowded_out is ticket
            else None
        )
        if refusal is None:
            self.scheduler.submit(ticket)
            self.waiting.append(ticket)
            if crowded_out is not None:
                self.waiting.remove(crowded_out)
                self.unswept.append(crowded_out)
                self.reasons[crowded_out.work] = QueueFull
        else:
            with pytest.raises(refusal):
                self.scheduler.submit(ticket)
        if at_once:
            self.admit()

    def crowded_out(self, newcomer: Ticket[int]) -> Ticket[int] | None:
        """Who has no place with the newcomer: of the clients that would have most, of least priority, the newest."""
        there = [*self.waiting, newcomer]
        if len(there) <= self.max_waiting:
            return None
        crowd = [ticket for ticket in there if ticket.work not in self.begun]
        share = {client: sum(ticket.client == client for ticket in there) for client in CLIENTS}
        most = max(share[ticket.client] for ticket in crowd)
        crowd = [ticket for ticket in crowd if share[ticket.client] == most]
        least = min(ticket.priority for ticket in crowd)
        return max((ticket for ticket in crowd if ticket.priority == least), key=lambda ticket: ticket.work)

    @rule()
    def admit(self) -> None:
        admission = self.scheduler.admit()
        idle = [ticket for ticket in admission.sent_back if ticket.work in self.idle]
        for ticket in admission.sent_back:
            self.active.remove(ticket)
            if ticket in idle:
                self.suspended.append(ticket)
            else:
                assert ticket.priority == Priority.BATCH, "who is watched and can go on gave way"
                (self.unswept if ticket.ending is not None else self.waiting).append(ticket)
        for ticket in admission.admitted:
            self.waiting.remove(ticket)
            self.active.append(ticket)
            self.begun.add(ticket.work)
            self.idle.discard(ticket.work)
        for ticket in admission.sent_back:
            claims = [
                other
                for other in admission.admitted
                if ticket in idle or other.priority > ticket.priority or self.aged(other)
            ]
            assert claims, "somebody gave way in vain"
        assert self.pages(self.active) <= PAGES
        assert len(self.active) <= self.places
        going_on = [ticket for ticket in self.active if ticket.work not in self.idle]
        if self.waiting and len(going_on) < min(self.places, len(self.active)):
            in_vain = [ticket for ticket in self.waiting if self.pages([*going_on, ticket]) > PAGES]
            assert in_vain, "who cannot go on keeps its place while others wait for it"
        aged = [ticket for ticket in self.active if self.aged(ticket)]
        batch_only = all(ticket.priority == Priority.BATCH for ticket in self.waiting)
        fitting = [ticket for ticket in self.waiting if self.pages([*self.active, ticket]) <= PAGES]
        if self.waiting and len(self.active) < self.places:
            assert len(fitting) < len(self.waiting), "all that wait would fit, and there is a place"
        if not batch_only and not any(map(self.aged, self.waiting)):
            # Nobody who waits has a place kept: those that are watched leave none to the others but by their size.
            staying = [ticket for ticket in going_on if ticket.priority == Priority.INTERACTIVE or ticket in aged]
            if len(staying) < min(self.places, len(self.active)):
                watched = [ticket for ticket in self.waiting if ticket.priority == Priority.INTERACTIVE]
                in_vain = [ticket for ticket in watched if self.pages([*staying, ticket]) > PAGES]
                assert in_vain, "batch work keeps its place while somebody watches the queue"

    def aged(self, ticket: Ticket[int]) -> bool:
        return ticket.priority == Priority.BATCH and self.now - ticket.submitted >= 20.0

    @precondition(lambda self: self.active)
    @rule(data=st.data(), turns=st.integers(1, 6), rows=st.integers(1, 4))
    def next(self, data: st.DataObject, turns: int, rows: int) -> None:
        for _ in range(turns):
            needs = {ticket.work: data.draw(st.sampled_from([None, 0, 0, 100, 256])) for ticket in self.active}
            chosen = self.scheduler.next(needs.__getitem__, rows)
            self.idle = {work for work, need in needs.items() if need is None}
            assert len(chosen) <= rows
            assert len(set(chosen)) == len(chosen)
            assert set(chosen) <= set(self.active)
            assert bool(chosen) == any(need is not None for need in needs.values())
            tokens = [needs[ticket.work] for ticket in chosen]
            assert all(tokens) or not any(tokens), "a call is of one kind"
            assert len(chosen) <= 1 or sum(token or 0 for token in tokens) <= 256

    @precondition(lambda self: self.tickets())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets()))
        self.scheduler.cancel(ticket)
        self.reasons.setdefault(ticket.work, Cancelled)
        if ticket in self.waiting:
            self.waiting.remove(ticket)
            self.unswept.append(ticket)

    @precondition(lambda self: self.active)
    @rule(data=st.data(), what=st.sampled_from(["finish", "suspend", "send back"]))
    def leave(self, data: st.DataObject, what: str) -> None:
        ticket = data.draw(st.sampled_from(self.active))
        self.active.remove(ticket)
        if what == "finish":
            self.scheduler.finish(ticket)
        elif what == "suspend":
            self.scheduler.suspend(ticket)
            self.suspended.append(ticket)
        else:
            self.scheduler.send_back(ticket)
            (self.unswept if ticket.ending is not None else self.waiting).append(ticket)

    @precondition(lambda self: self.suspended)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.suspended))
        self.scheduler.resume(ticket)
        self.suspended.remove(ticket)
        (self.unswept if ticket.ending is not None else self.waiting).append(ticket)

    @rule(seconds=st.integers(1, 12))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        expected = {
            ticket.work: self.reasons.get(ticket.work, DeadlineTooShort)
            for ticket in self.tickets()
            if ticket.work in self.reasons or (ticket.deadline is not None and ticket.deadline <= self.now)
        }
        swept = self.scheduler.sweep()
        assert {ticket.work: type(error) for ticket, error in swept} == expected
        assert len(swept) == len(expected), "somebody was told twice"
        for tickets in (self.waiting, self.active, self.suspended, self.unswept):
            tickets[:] = [ticket for ticket in tickets if ticket.work not in expected]
        deadlines = [ticket.deadline for ticket in self.tickets() if ticket.deadline is not None]
        idle = [ticket.idle_since + 5.0 for ticket in self.active if ticket.idle_since is not None]
        assert self.scheduler.wake_at() == min([*deadlines, *idle], default=None)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.waiting == len(self.waiting)
        assert set(self.scheduler.active) == set(self.active)
        assert set(self.scheduler.suspended) == set(self.suspended)
        assert self.scheduler.empty == (not self.tickets())
        slots = [ticket.slot for ticket in self.active]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.places for slot in slots)
        assert self.pool.idle == (not self.active)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            dropped = self.scheduler.drop_all()
            assert len(dropped) == len(set(dropped))
            assert set(dropped) == set(self.tickets())
            assert self.pool.idle
            assert self.scheduler.empty
            assert self.scheduler.admit().admitted == []


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


class Desk:
    """A scheduler with one kind of request, and a clock that stands still unless it is set."""

    def __init__(self, limits: Limits, pages: int = PAGES) -> None:
        self.now = 0.0
        self.scheduler: Scheduler[str] = Scheduler(pool(pages), 100, limits, lambda: self.now)

    def submit(
        self, name: str, tokens: int = PAGE, client: str = "", priority: Priority = Priority.INTERACTIVE
    ) -> Ticket[str]:
        ticket = Ticket(name, tokens, self.now, client=client, priority=priority)
        self.scheduler.submit(ticket)
        return ticket

    def admit(self) -> list[str]:
        return [ticket.work for ticket in self.scheduler.admit().admitted]


def test_retry_after_is_the_queue_at_the_measured_rate() -> None:
    """Catches a guess in place of the measured rate, and an idle gap counted as work."""
    desk = Desk(Limits(max_active=1, max_waiting=2))
    for name in ("first", "second", "third"):
        desk.now += 100.0  # Idle between two requests: must not slow the measured rate.
        ticket = desk.submit(name)
        desk.admit()
        desk.now += 4.0
        desk.scheduler.finish(ticket)
    desk.submit("running")
    desk.admit()
    desk.submit("waiting")
    desk.submit("waiting too")
    with pytest.raises(QueueFull) as caught:
        desk.submit("refused")
    assert caught.value.waiting == 2
    assert caught.value.retry_after == pytest.approx(2 * 4.0)


def test_a_cancelled_request_leaves_the_queue_at_once() -> None:
    """Not only at the next sweep, which comes when the engine's call returns."""
    desk = Desk(Limits(max_active=1, max_waiting=1))
    desk.submit("running")
    desk.admit()
    queued = desk.submit("queued")
    desk.scheduler.cancel(queued)
    assert desk.scheduler.waiting == 0
    desk.submit("takes its place")
    assert [ticket for ticket, _ in desk.scheduler.sweep()] == [queued]


def test_requests_that_are_done_are_forgotten_before_their_deadlines() -> None:
    """Catches a queue of deadlines that keeps every request of the last hour."""
    desk, done = Desk(Limits()), []
    for number in range(1000):
        ticket = Ticket(str(number), PAGE, 0.0, deadline=3600.0)
        desk.scheduler.submit(ticket)
        desk.admit()
        desk.scheduler.finish(ticket)
        done.append(weakref.ref(ticket))
        del ticket
    assert sum(reference() is not None for reference in done) < 100


def test_a_long_request_is_not_overtaken_for_ever() -> None:
    """Catches admission that lets short requests slip past a long one at the queue's head."""
    desk = Desk(Limits(max_active=8, max_waiting=8))
    short = desk.submit("short")
    assert desk.admit() == ["short"]
    desk.submit("long", PAGE * PAGES)
    desk.submit("late")
    assert desk.admit() == []
    desk.scheduler.finish(short)
    assert desk.admit() == ["long"]


def test_clients_are_admitted_in_turn() -> None:
    """Catches a queue in which whoever sends a hundred requests first is served a hundred times first."""
    desk = Desk(Limits(max_active=1, max_waiting=100))
    for number in range(5):
        desk.submit(f"flood {number}", client="flood")
    desk.submit("ann", client="ann")
    desk.submit("bob", client="bob")
    desk.submit("ann again", client="ann")
    order = []
    while admitted := desk.admit():
        order += admitted
        [ticket] = desk.scheduler.active
        desk.scheduler.finish(ticket)
    assert order == ["flood 0", "ann", "bob", "flood 1", "ann again", "flood 2", "flood 3", "flood 4"]


def served(desk: Desk, needs: dict[str, int], calls: int, rows: int = 1) -> list[list[str]]:
    return [[ticket.work for ticket in desk.scheduler.next(needs.get, rows)] for _ in range(calls)]


def test_clients_are_served_in_turn() -> None:
    """A row a call: a client with three requests gets as many calls as one with one request."""
    desk = Desk(Limits())
    for name in ("a1", "a2", "a3", "b1"):
        desk.submit(name, client=name[0])
    desk.admit()
    calls = served(desk, dict.fromkeys(("a1", "a2", "a3", "b1"), 0), 12)
    names = [name for [name] in calls]
    assert names.count("b1") == 6
    assert {names.count(name) for name in ("a1", "a2", "a3")} == {2}


def test_rows_of_all_share_a_call() -> None:
    desk = Desk(Limits())
    for name in "abc":
        desk.submit(name, priority=Priority.BATCH if name == "b" else Priority.INTERACTIVE)
    desk.admit()
    assert [set(call) for call in served(desk, dict.fromkeys("abc", 0), 3, rows=8)] == [{"a", "b", "c"}] * 3


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_long_prompt_delays_open_canvases_by_one_chunk_a_step(rows: int, prompts: int) -> None:
    """Between two steps of a canvas lie at most one encode call, of at most a chunk, and the others' steps.

    Three prompts: one of them is batch work, whose turn comes on top of the others'.
    """
    desk = Desk(Limits())
    canvases, longs = [f"canvas {i}" for i in range(4)], [f"prompt {i}" for i in range(prompts)]
    for name in (*canvases, *longs):
        desk.submit(name, priority=Priority.BATCH if name == "prompt 2" else Priority.INTERACTIVE)
    desk.admit()
    calls = served(desk, dict.fromkeys(canvases, 0) | dict.fromkeys(longs, 256), 60, rows)
    for canvas in canvases:
        steps = [index for index, call in enumerate(calls) if canvas in call]
        assert len(steps) >= 60 // (-(-4 // rows) + 1) - 1
        for before, after in itertools.pairwise(steps):
            between = calls[before + 1 : after]
            assert sum(call[0] in longs for call in between) <= 1
            assert all(len(call) == 1 for call in between if call[0] in longs)
    assert {name for call in calls for name in call} >= set(longs), "a prompt starves"


def test_short_prompts_share_a_call() -> None:
    desk = Desk(Limits())
    for name in "abcd":
        desk.submit(name)
    desk.admit()
    assert served(desk, {"a": 100, "b": 100, "c": 100, "d": 56}, 2, rows=8) == [["a", "b", "d"], ["c", "a", "d"]]


def test_who_is_watched_has_three_calls_of_four() -> None:
    """A row a call, seven batch requests beside one that is watched: it waits for a third more, not eightfold."""
    desk = Desk(Limits())
    batch = [f"batch {i}" for i in range(7)]
    for name in batch:
        desk.submit(name, priority=Priority.BATCH)
    desk.submit("watched")
    desk.admit()
    names = [name for [name] in served(desk, dict.fromkeys([*batch, "watched"], 0), 56)]
    assert names.count("watched") == 42
    assert {names.count(name) for name in batch} == {2}


def test_batch_prompts_are_encoded_while_others_denoise() -> None:
    """Catches batch canvases riding along in every call and thereby using up the batch prompts' share."""
    desk = Desk(Limits())
    for name, priority in (("watched", Priority.INTERACTIVE), ("open", Priority.BATCH), ("new", Priority.BATCH)):
        desk.submit(name, priority=priority)
    desk.admit()
    calls = served(desk, {"watched": 0, "open": 0, "new": 256}, 16, rows=8)
    assert 2 <= sum("new" in call for call in calls) <= 4


def test_who_is_parked_keeps_its_memory_for_a_while() -> None:
    """From when it was found idle; a single step in between starts the time anew."""
    desk = Desk(Limits(park_seconds=5.0))
    parked, _ = desk.submit("parked"), desk.submit("busy")
    desk.admit()
    for now, need, overdue in ((1.0, None, []), (5.9, None, []), (6.0, None, [parked]), (6.1, 0, []), (10.0, None, [])):
        desk.now = now
        desk.scheduler.next({"parked": need, "busy": 0}.get)
        assert desk.scheduler.overdue() == overdue, now
    assert desk.scheduler.wake_at() == 15.0


def test_who_is_parked_gives_way_to_who_waits() -> None:
    """Catches slow readers that hold places and pages which nobody uses: as many as it takes, the longest idle first,
    nobody who can go on, and none in vain."""
    desk = Desk(Limits(max_active=4, park_seconds=100.0))
    parked = [desk.submit(name, 3 * PAGE) for name in ("first", "second", "third")]
    desk.submit("busy", 3 * PAGE)
    desk.admit()
    for desk.now, idle in ((1.0, {"second"}), (2.0, {"first", "second", "third"})):
        desk.scheduler.next({name: None if name in idle else 0 for name in ("first", "second", "third", "busy")}.get)
    desk.submit("batch", 4 * PAGE, priority=Priority.BATCH)
    admission = desk.scheduler.admit()
    assert [ticket.work for ticket in admission.sent_back] == ["second", "first"]
    assert [ticket.work for ticket in admission.admitted] == ["batch"]
    assert set(desk.scheduler.suspended) == set(parked[:2])
    desk.submit("large", 10 * PAGE)
    assert desk.scheduler.admit().sent_back == []
    for ticket in parked[:2]:
        desk.scheduler.resume(ticket)
    assert desk.scheduler.waiting == 3


def test_encode_calls_are_shared_out_too() -> None:
    """Catches batch prompts that take every chance to encode, which is rare beside many canvases, and none at all."""
    desk = Desk(Limits())
    for name in ("a", "b", "c", "prompt", "batch prompt"):
        desk.submit(name, priority=Priority.BATCH if name == "batch prompt" else Priority.INTERACTIVE)
    desk.admit()
    needs = dict.fromkeys("abc", 0) | {"prompt": 256, "batch prompt": 256}
    names = [name for [name] in served(desk, needs, 4 * 16)]
    assert (names.count("prompt"), names.count("batch prompt")) == (12, 4)


def test_batch_requests_give_way_and_come_back() -> None:
    """The newest first, as many as are needed; whoever gave way is next of its kind."""
    desk = Desk(Limits(max_active=3))
    for name in ("first", "second", "third", "fourth"):
        desk.submit(name, priority=Priority.BATCH)
    assert desk.admit() == ["first", "second", "third"]
    watched = desk.submit("watched", PAGE * (PAGES - 1))
    admission = desk.scheduler.admit()
    assert [ticket.work for ticket in admission.sent_back] == ["third", "second"]
    assert [ticket.work for ticket in admission.admitted] == ["watched"]
    desk.scheduler.finish(watched)
    assert desk.admit() == ["second", "third"]


def test_nobody_gives_way_in_vain() -> None:
    """Catches batch work that is sent back, and encoded anew, for a request that finds no room even so."""
    desk = Desk(Limits(max_active=4))
    held = desk.submit("held", 6 * PAGE)
    for name in ("first", "second"):
        desk.submit(name, 2 * PAGE, priority=Priority.BATCH)
    assert desk.admit() == ["held", "first", "second"]
    desk.submit("large", 7 * PAGE)
    for _ in range(3):
        admission = desk.scheduler.admit()
        assert (admission.admitted, admission.sent_back) == ([], [])
    desk.scheduler.finish(held)
    assert desk.admit() == ["large"]
    assert {ticket.work for ticket in desk.scheduler.active} == {"large", "first", "second"}


def test_who_frees_nothing_that_is_needed_stays() -> None:
    """The newest go first, but not those without whom the older ones would have to go all the same."""
    desk = Desk(Limits(max_active=4))
    for name, pages in (("large", 8), ("small", 1), ("smaller", 1)):
        desk.submit(name, pages * PAGE, priority=Priority.BATCH)
    desk.admit()
    desk.submit("watched", 10 * PAGE)
    assert [ticket.work for ticket in desk.scheduler.admit().sent_back] == ["large"]


def test_one_client_cannot_fill_the_queue_for_others() -> None:
    """A flood fills it while it is alone; others take their shares from it, each request at once, and keep them."""
    desk = Desk(Limits(max_active=1, max_waiting=6))
    desk.submit("running")
    desk.admit()
    flood = [desk.submit(f"flood {number}", client="flood") for number in range(6)]
    with pytest.raises(QueueFull):
        desk.submit("flood 6", client="flood")
    for number in range(3):
        desk.submit(f"ann {number}", client="ann")
    with pytest.raises(QueueFull):
        desk.submit("ann 3", client="ann")
    with pytest.raises(QueueFull):
        desk.submit("flood 7", client="flood")
    told = desk.scheduler.sweep()
    assert [ticket for ticket, _ in told] == flood[:2:-1], "the newest go first"
    assert all(isinstance(error, QueueFull) and error.waiting == 6 and error.retry_after > 0 for _, error in told)
    assert desk.scheduler.waiting == 6


def test_batch_work_leaves_the_queue_to_who_is_watched() -> None:
    """Of one client too; and among clients that have equally many. What was begun is never thrown out."""
    desk = Desk(Limits(max_active=1, max_waiting=2))
    begun = desk.submit("begun", client="ann", priority=Priority.BATCH)
    desk.admit()
    desk.submit("batch", client="ann", priority=Priority.BATCH)
    desk.submit("watched", client="bob")
    assert [ticket.work for ticket in desk.scheduler.admit().sent_back] == ["begun"]
    desk.submit("watched too", client="ann")
    assert [ticket.work for ticket, _ in desk.scheduler.sweep()] == ["batch"]
    with pytest.raises(QueueFull):
        desk.submit("batch again", client="ann", priority=Priority.BATCH)
    assert begun.ending is None


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(Priority)), max_size=80), st.integers(1, 12))
def test_shares_of_a_full_queue(submissions: list[tuple[str, Priority]], most: int) -> None:
    """Whoever floods, in any order: what a client has at the end is its share, or all that it asked for."""
    desk = Desk(Limits(max_active=1, max_waiting=most))
    desk.submit("running", client="running")
    desk.admit()
    refused = 0
    for number, (client, priority) in enumerate(submissions):
        try:
            desk.submit(str(number), client=client, priority=priority)
        except QueueFull:
            refused += 1
    refused += len(desk.scheduler.sweep())
    waiting = Counter(ticket.client for ticket in desk.scheduler._line)
    assert waiting.total() == min(most, len(submissions)) == len(submissions) - refused, "a place is left, or one lost"
    asked = Counter(client for client, _ in submissions)
    for client, count in asked.items():
        if waiting[client] < count:
            assert waiting[client] >= max(waiting.values()) - 1, "another client has more than its share"


def test_a_request_can_come_in_and_give_way_at_once() -> None:
    """Catches a request that is said to be admitted and holds nothing: an older one of another client came after it."""
    desk = Desk(Limits(max_active=1, ageing=30.0))
    held = desk.submit("held")
    desk.admit()
    desk.submit("new", client="b", priority=Priority.BATCH)
    old = desk.submit("old", client="a", priority=Priority.BATCH)
    old.submitted = -30.0
    desk.scheduler.finish(held)
    admission = desk.scheduler.admit()
    assert ([ticket.work for ticket in admission.admitted], admission.sent_back) == (["old"], [])
    assert [ticket.work for ticket in desk.scheduler.active] == ["old"]
    desk.scheduler.finish(old)
    assert desk.admit() == ["new"]


def test_batch_requests_do_not_starve() -> None:
    """Watched requests without end: those that have waited long have a quarter of the places to themselves."""
    desk = Desk(Limits(max_active=4, ageing=30.0))
    for number in range(3):
        desk.submit(f"batch {number}", priority=Priority.BATCH)
    for number in range(10):
        desk.submit(f"watched {number}")
    assert desk.admit() == [f"watched {number}" for number in range(4)]
    desk.now = 30.0
    assert desk.admit() == []
    desk.scheduler.finish(next(iter(desk.scheduler.active)))
    assert desk.admit() == ["batch 0"]
    desk.scheduler.finish(next(iter(desk.scheduler.active)))
    assert desk.admit() == ["watched 4"], "the place of the aged is taken"
    batch = next(ticket for ticket in desk.scheduler.active if ticket.work == "batch 0")
    desk.submit("huge", PAGE * PAGES)
    desk.scheduler.admit()
    assert batch in desk.scheduler.active, "an aged request was sent back"
