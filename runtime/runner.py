"""The engine's thread: takes requests from any thread, runs one engine call after the other, hands out events."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from runtime.engines.protocol import DenoiseRow, EncodeRow, Engine
from runtime.errors import DgemmaError, Draining, EngineFault
from runtime.events import Event, Finished
from runtime.generation import ENCODE_CHUNK, Denoise, Encode, Generation
from runtime.pool import PagePool
from runtime.request import GenerationRequest
from runtime.scheduler import Limits, Scheduler, Ticket

log = logging.getLogger(__name__)

Outcome = Event | DgemmaError
"""What a request's sink is given: events, and at most one error, which is then the last thing it gets."""

CLOSE_TIMEOUT = 30.0
"""Seconds that `close` waits for the call in progress; far beyond any call, so a longer one hangs."""


class Sink(Protocol):
    """Where a request's outcomes go. Called on the engine's thread: must neither block nor raise."""

    def put(self, outcome: Outcome) -> None:
        """Take the next outcome; `Finished` or an error is the last."""

    def wants_draft(self) -> bool:
        """Whether the step about to run should make a draft; asked only of requests with drafts."""

    def ready(self) -> bool:
        """False parks the request between two steps, keeping its pages, while others go on; see `Handle.wake`."""


class Handle:
    """A submitted request. Safe to use from any thread, also after the request has ended."""

    def __init__(self, ticket: Ticket[_Job], signal: threading.Event) -> None:
        self._ticket, self._signal = ticket, signal

    def cancel(self) -> None:
        """End the request within one engine call: its sink gets `Cancelled` unless it has ended before."""
        self._ticket.cancelled = True
        self._signal.set()

    def wake(self) -> None:
        """Say that the sink's `ready()` may have turned true."""
        self._signal.set()


@dataclass(frozen=True)
class Load:
    """How busy a runner is."""

    waiting: int
    active: int


@dataclass(frozen=True)
class _Job:
    request: GenerationRequest
    generation: Generation
    sink: Sink


class Runner:
    """Runs the requests' generations on one engine, a row a call, in turn."""

    def __init__(
        self,
        engine: Engine,
        generations: Callable[[GenerationRequest], Generation],
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take over `engine`, which from `start` on belongs to the runner's thread.

        Args:
            engine: closed by `close`.
            generations: makes a request's state machine; called on the submitting thread.
            limits: how much is taken on at a time.
            clock: seconds, of deadlines too.
        """
        self._engine, self._generations, self._clock = engine, generations, clock
        pool = PagePool(engine.pool, engine.facts, ENCODE_CHUNK)
        self._scheduler: Scheduler[_Job] = Scheduler(pool, engine.pool.canvas_slots, limits or Limits(), clock)
        self._lock = threading.Lock()
        """Held for the scheduler's queue, and never while the engine or a sink is called."""
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
            return Load(self._scheduler.waiting, self._scheduler.active)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: Sink, deadline: float | None = None) -> Handle:
        """Queue a request; its events go to `sink`.

        Args:
            request: what to generate.
            sink: gets the events.
            deadline: when the request ends with `DeadlineTooShort`, in the clock's seconds.

        Raises:
            InvalidRequest: it can never fit into the pool.
            DeadlineTooShort: the deadline has passed.
            QueueFull: too many requests wait.
            Draining: no more requests are taken.
        """
        generation = self._generations(request)
        with self._lock:
            if self._draining:
                raise Draining("the server is shutting down; ask another one")
            job = _Job(request, generation, sink)
            ticket = self._scheduler.submit(job, generation.total_positions, deadline)
            self._idle.clear()
        self._signal.set()
        return Handle(ticket, self._signal)

    def drain(self, grace: float) -> bool:
        """Take no more requests and wait up to `grace` seconds for the others; the rest end with `Draining`.

        Returns:
            Whether all of them ended by themselves.
        """
        with self._lock:
            self._draining = True
        drained = self._idle.wait(grace)
        self._abandoning = True
        self._signal.set()
        self._idle.wait(CLOSE_TIMEOUT)
        return drained

    def close(self) -> None:
        """End every request and the thread, and close the engine."""
        self.drain(0)
        self._closing = True
        self._signal.set()
        if self._thread.ident is None:
            self._engine.close()
            return
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            log.error("an engine call has not returned for %s s; leaving its thread behind", CLOSE_TIMEOUT)

    def _run(self) -> None:
        try:
            while not self._closing:
                # Cleared before looking: what is set while looking is looked at in the next round.
                self._signal.clear()
                if not self._turn():
                    self._signal.wait(self._seconds_to_deadline())
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
            self._put(ticket, EngineFault(secrets.token_hex(8)))
        self._idle.set()
        self._engine.close()

    def _turn(self) -> bool:
        """Look at the queue once and make one engine call; False where there is none to make."""
        with self._lock:
            ended = self._scheduler.sweep()
            if self._abandoning:
                draining = Draining("the server shut down before the request was done; ask another one")
                ended += [(ticket, draining) for ticket in self._scheduler.drop_all()]
            admitted = self._scheduler.admit()
        for ticket, error in ended:
            self._put(ticket, error)
        with self._lock:
            if not self._scheduler.waiting and not self._scheduler.active:
                self._idle.set()
        for ticket in admitted:
            self._guarded(self._begin, ticket)
        chosen = self._scheduler.next(lambda job: job.sink.ready())
        if chosen is not None:
            self._guarded(self._step, chosen)
        return chosen is not None

    def _guarded(self, act: Callable[[Ticket[_Job]], None], ticket: Ticket[_Job]) -> None:
        """Do something for a request; whatever goes wrong ends that request alone."""
        try:
            act(ticket)
        except Exception:
            fault = EngineFault(secrets.token_hex(8))
            log.exception("engine fault %s", fault.correlation_id)
            self._finish(ticket)
            self._put(ticket, fault)

    def _begin(self, ticket: Ticket[_Job]) -> None:
        self._hand_out(ticket, ticket.work.generation.start(self._clock() - ticket.submitted))

    def _step(self, ticket: Ticket[_Job]) -> None:
        call = ticket.work.generation.next_call()
        self._hand_out(ticket, self._encode(ticket, call) if isinstance(call, Encode) else self._denoise(ticket, call))

    def _encode(self, ticket: Ticket[_Job], call: Encode) -> list[Event]:
        prefix = ticket.pages.cover(call.start, call.start + len(call.token_ids))
        began = self._clock()
        self._engine.encode([EncodeRow(call.token_ids, call.start, prefix)])
        return ticket.work.generation.encoded(self._clock() - began)

    def _denoise(self, ticket: Ticket[_Job], call: Denoise) -> list[Event]:
        job = ticket.work
        row = DenoiseRow(
            call.canvas,
            call.start,
            ticket.pages.cover(call.start, call.start),
            ticket.slot,
            call.first_step,
            call.temperature,
            call.uniform,
            call.guard_first,
        )
        began = self._clock()
        [readout] = self._engine.denoise([row])
        seconds = self._clock() - began
        return job.generation.denoised(readout, seconds, job.request.drafts and job.sink.wants_draft())

    def _hand_out(self, ticket: Ticket[_Job], events: list[Event]) -> None:
        if any(isinstance(event, Finished) for event in events):
            # Before the sink hears of it, so that a caller who reacts finds the pages free.
            self._finish(ticket)
        for event in events:
            self._put(ticket, event)

    def _finish(self, ticket: Ticket[_Job]) -> None:
        with self._lock:
            self._scheduler.finish(ticket)

    def _put(self, ticket: Ticket[_Job], outcome: Outcome) -> None:
        try:
            ticket.work.sink.put(outcome)
        except Exception:
            log.exception("a sink failed; its request is cancelled")
            ticket.cancelled = True

    def _seconds_to_deadline(self) -> float | None:
        with self._lock:
            deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())
