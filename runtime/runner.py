"""The engine's thread: takes requests from any thread, runs one engine call after the other, hands out events."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.calls import EngineCalls
from runtime.engines.protocol import Engine
from runtime.errors import Draining, EngineFault
from runtime.events import Event, Finished
from runtime.generation import Generation
from runtime.job import Job, Outcome, Prepared, Sink, run, share_prefix
from runtime.pool import PagePool
from runtime.request import GenerationRequest
from runtime.scheduler import Limits, Scheduler
from runtime.ticket import Priority, Ticket

log = logging.getLogger(__name__)

CLOSE_TIMEOUT = 30.0
"""Seconds that `drain` and `close` wait for the call in progress, where they are told nothing else."""

SHUT_DOWN = "the server shut down before the request was done; ask another one"


class Handle:
    """A submitted request. Safe to use from any thread, also after the request has ended."""

    def __init__(self, cancel: Callable[[], None], wake: Callable[[], None], made_tokens: Callable[[], int]) -> None:
        self._cancel, self._wake, self._made_tokens = cancel, wake, made_tokens

    @property
    def made_tokens(self) -> int:
        """Tokens of the answer so far: those committed, and those of the open block as it stands."""
        return self._made_tokens()

    def cancel(self) -> None:
        """End the request within one engine call: its sink gets `Cancelled` unless it has ended before."""
        self._cancel()

    def wake(self) -> None:
        """Say that the sink's `ready()` may have turned true."""
        self._wake()


@dataclass(frozen=True)
class Load:
    """How busy a runner is, in requests."""

    waiting: int
    active: int
    suspended: int = 0
    """Parked for slow readers, without pages."""


class Runner:
    """Runs the requests' generations on one engine, as many rows a call as it takes."""

    def __init__(
        self,
        engine: Engine,
        generations: Callable[[GenerationRequest], Generation],
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rebuild: Callable[[], Engine] | None = None,
    ) -> None:
        """Take over `engine`, which from `start` on belongs to the runner's thread.

        Args:
            engine: closed by `close`.
            generations: makes a request's state machine, whose chunk is the engine's; called by `prepare`.
            limits: how much is taken on at a time.
            clock: seconds, of deadlines too.
            rebuild: makes the engine anew where it fails call after call; called on the runner's thread, after the
                old one is closed. The requests that live are encoded again and go on. None: the engine is kept.
        """
        limits = limits or Limits()
        self._generations, self._clock, self._rebuild = generations, clock, rebuild
        rows = engine.pool.rows_per_call
        self._calls = EngineCalls(engine, clock, rows if limits.max_rows is None else min(rows, limits.max_rows))
        self._pool = PagePool(engine.pool, engine.facts)
        self._scheduler: Scheduler[Job] = Scheduler(self._pool, engine.pool.canvas_slots, limits, clock)
        self._lock = threading.Lock()
        """Held for the scheduler, and never while the engine or a sink is called."""
        self._signal = threading.Event()
        """Set whenever the engine's thread should look again."""
        self._idle = threading.Event()
        self._idle.set()
        self._draining = self._abandoning = self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def load(self) -> Load:
        """How busy the runner is."""
        with self._lock:
            scheduler = self._scheduler
            return Load(scheduler.waiting, len(scheduler.active), len(scheduler.suspended))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def stalled_for(self) -> float:
        """Seconds that the engine call in progress, or its replacement, has taken; else 0. For a watchdog."""
        return self._calls.seconds_in_call

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def prepare(self, request: GenerationRequest) -> Prepared:
        """What of `submit` takes long where prompts or committed blocks are: a second perhaps. For any thread.

        Raises:
            InvalidRequest: what it has committed is no whole blocks, or ends the answer.
        """
        return Prepared(self._generations(request), self._pool.digests(request.prompt_ids))

    def submit(
        self,
        request: GenerationRequest | Prepared,
        sink: Sink,
        deadline: float | None = None,
        *,
        client: str = "",
        priority: Priority = Priority.INTERACTIVE,
    ) -> Handle:
        """Queue a request; its events go to `sink`.

        Args:
            request: what to generate; prepared where this thread must not be held up.
            sink: gets the events.
            deadline: when the request ends with `DeadlineTooShort`, in the clock's seconds.
            client: whose request it is; clients take turns.
            priority: who goes first.

        Raises:
            InvalidRequest: it can never fit into the pool; see also `prepare`.
            DeadlineTooShort: the deadline has passed.
            QueueFull: too many requests wait.
            Draining: no more requests are taken.
        """
        prepared = request if isinstance(request, Prepared) else self.prepare(request)
        ticket = Ticket(
            Job(prepared.generation, sink),
            prepared.generation.total_positions,
            self._clock(),
            deadline,
            prepared.digests,
            client,
            priority,
        )
        with self._lock:
            if self._draining:
                raise Draining("the server is shutting down; ask another one")
            self._scheduler.submit(ticket)
            self._idle.clear()
        self._signal.set()
        return Handle(lambda: self._cancel(ticket), self._signal.set, lambda: prepared.generation.made_tokens)

    def drain(self, grace: float, patience: float = CLOSE_TIMEOUT) -> bool:
        """Take no more requests and wait up to `grace` seconds for the others; the rest end with `Draining`.

        That is once the call in progress has returned, for which this waits `patience` seconds.

        Returns:
            Whether all of them ended by themselves.
        """
        with self._lock:
            self._draining = True
        drained = self._idle.wait(grace)
        self._abandoning = True
        self._signal.set()
        self._idle.wait(patience)
        return drained

    def close(self, patience: float = CLOSE_TIMEOUT) -> None:
        """End every request and the thread, and close the engine.

        A call that takes longer than `patience` seconds is left behind with its thread, and the engine with it.
        """
        self._draining = self._abandoning = self._closing = True
        self._signal.set()
        if self._thread.ident is None:
            self._stop()
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            log.error("an engine call has not returned for %s s; leaving its thread behind", patience)

    def _cancel(self, ticket: Ticket[Job]) -> None:
        with self._lock:
            self._scheduler.cancel(ticket)
        self._signal.set()

    def _run(self) -> None:
        try:
            while not self._closing:
                # Cleared before looking: what is set while looking is looked at in the next round.
                self._signal.clear()
                if not self._turn():
                    self._signal.wait(self._seconds_to_wait())
        except Exception:
            log.critical("the engine's thread ends", exc_info=True)
        finally:
            self._stop()

    def _stop(self) -> None:
        """The thread's last act; also where a bug ends the loop, so that no request waits for ever."""
        with self._lock:
            self._draining = True
            left = self._scheduler.drop_all()
        for ticket in left:
            self._put(ticket, Draining(SHUT_DOWN) if self._closing else EngineFault(secrets.token_hex(8)))
        self._idle.set()
        self._calls.close()

    def _turn(self) -> bool:
        """Look at the queue once and make one engine call; False where there is none to make."""
        self._sweep()
        self._admit()
        chosen = self._scheduler.next(Job.need, self._calls.rows)
        if not chosen and self._admit():
            return True  # in place of those that `next` has found idle
        slow = self._scheduler.overdue()
        with self._lock:
            for ticket in slow:
                self._scheduler.suspend(ticket)
        for ticket in slow:
            ticket.work.generation.rewind()
        if chosen:
            self._step(chosen)
        return bool(chosen or slow)

    def _sweep(self) -> None:
        with self._lock:
            ended = self._scheduler.sweep()
            if self._abandoning:
                ended += [(ticket, Draining(SHUT_DOWN)) for ticket in self._scheduler.drop_all()]
        for ticket, error in ended:
            self._put(ticket, error)
        with self._lock:
            if self._scheduler.empty:
                self._idle.set()

    def _admit(self) -> bool:
        """Take in who has come or come back, as far as there is room; whether anybody was."""
        awake = [ticket for ticket in self._scheduler.suspended if ticket.work.sink.caught_up()]
        with self._lock:
            for ticket in awake:
                self._scheduler.resume(ticket)
            admission = self._scheduler.admit()
        for ticket in admission.sent_back:
            ticket.work.generation.rewind()
        for ticket in admission.admitted:
            self._hand_out(ticket, self._begin(ticket))
        return bool(admission.admitted)

    def _begin(self, ticket: Ticket[Job]) -> list[Event] | Exception:
        job = ticket.work
        try:
            events = [] if job.started else job.generation.start(self._clock() - ticket.submitted)
            job.started = True
            share_prefix(ticket)
        except Exception as error:
            return error
        return events

    def _step(self, tickets: list[Ticket[Job]]) -> None:
        """Make the call that these requests need next."""
        if tickets[0].work.generation.encode_tokens:
            for ticket in tickets:
                share_prefix(ticket)
            # Others may have encoded all that a request still needed: its canvas is denoised in another turn.
            tickets = [ticket for ticket in tickets if ticket.work.generation.encode_tokens]
        if not tickets:
            return
        outcomes: Sequence[list[Event] | Exception]
        try:
            outcomes = run(tickets, self._calls)
        except Exception as error:
            outcomes = [error] * len(tickets)
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            self._hand_out(ticket, outcome)
        if self._calls.suspect and self._rebuild is not None:
            self._start_anew(self._rebuild)

    def _start_anew(self, build: Callable[[], Engine]) -> None:
        """Have a new engine go on with the requests that are left."""
        log.error("the engine failed call after call; building it anew")
        with self._lock:
            tickets = list(self._scheduler.active)
            for ticket in reversed(tickets):
                self._scheduler.send_back(ticket)
        for ticket in tickets:
            ticket.work.generation.rewind()
        self._calls.replace(build)
        self._pool.forget()

    def _hand_out(self, ticket: Ticket[Job], outcome: list[Event] | Exception) -> None:
        """Tell what a call brought; an exception ends the request."""
        if isinstance(outcome, Exception):
            fault = EngineFault(secrets.token_hex(8))
            log.error("engine fault %s", fault.correlation_id, exc_info=outcome)
            self._finish(ticket)
            self._put(ticket, fault)
            return
        if any(isinstance(event, Finished) for event in outcome):
            # Before the sink hears of it, so that a caller who reacts finds the pages free.
            self._finish(ticket)
        for event in outcome:
            self._put(ticket, event)

    def _finish(self, ticket: Ticket[Job]) -> None:
        with self._lock:
            self._scheduler.finish(ticket)

    def _put(self, ticket: Ticket[Job], outcome: Outcome) -> None:
        try:
            ticket.work.sink.put(outcome)
        except Exception:
            log.exception("a sink failed; its request is cancelled")
            self._cancel(ticket)

    def _seconds_to_wait(self) -> float | None:
        with self._lock:
            wake_at = self._scheduler.wake_at()
        return None if wake_at is None else max(0.0, wake_at - self._clock())
