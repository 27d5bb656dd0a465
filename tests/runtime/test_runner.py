"""The engine's thread under a scripted engine: who gets what, what is freed, who is spared. Gates instead of sleeps."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from runtime.bundle import GenerationDefaults
from runtime.engines.fake import FACTS, POOL, EngineMisuse, FakeEngine
from runtime.engines.protocol import DenoiseRow, EncodeRow, Prefix
from runtime.errors import (
    Cancelled,
    DeadlineTooShort,
    DgemmaError,
    Draining,
    EngineFault,
    InvalidRequest,
    QueueFull,
)
from runtime.events import Committed, Draft, Finished, Started
from runtime.generation import Generation
from runtime.request import GenerationRequest, SamplingParameters
from runtime.runner import Outcome, Runner
from runtime.scheduler import Limits
from runtime.vocabulary import Vocabulary

DEFAULTS = GenerationDefaults(
    max_denoising_steps=8,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
    end_token_ids=(1,),
    pad_token_id=0,
    bos_token_id=2,
)
TIMEOUT = 30.0
"""Seconds before a test gives up on what should happen at once."""


def vocabulary() -> Vocabulary:
    """One token a letter: token `i` reads `chr(0x100 + i)`."""
    tokenizer = Tokenizer(models.BPE({chr(0x100 + i): i for i in range(FACTS.vocab_size)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Vocabulary(tokenizer)


def request(*prompt: int, seed: int = 0, tokens: int = 64, drafts: bool = False) -> GenerationRequest:
    """A request whose scripted answer repeats the prompt's tokens above 2."""
    sampling = SamplingParameters(seed, tokens, 8, 0.1, 0.4, 0.8, 1, 0.005)
    return GenerationRequest("fake", np.array(prompt, np.int64), sampling, drafts)


class Reader:
    """A sink that keeps everything; `blocked` and `drafts` are set by the test."""

    def __init__(self) -> None:
        self.outcomes: queue.Queue[Outcome] = queue.Queue()
        self.blocked, self.drafts = False, True
        self.asked_for_draft = 0

    def put(self, outcome: Outcome) -> None:
        self.outcomes.put(outcome)

    def wants_draft(self) -> bool:
        self.asked_for_draft += 1
        return self.drafts

    def ready(self) -> bool:
        return not self.blocked

    def next(self) -> Outcome:
        return self.outcomes.get(timeout=TIMEOUT)

    def rest(self) -> list[Outcome]:
        """Everything up to and with the last outcome."""
        outcomes = [self.next()]
        while not isinstance(outcomes[-1], Finished | DgemmaError):
            outcomes.append(self.next())
        return outcomes

    def answer(self) -> list[int]:
        """The answer's tokens, of a generation that must end well."""
        outcomes = self.rest()
        assert isinstance(outcomes[-1], Finished), outcomes[-1]
        return [int(i) for outcome in outcomes if isinstance(outcome, Committed) for i in outcome.token_ids]


@contextmanager
def running(
    engine: FakeEngine, limits: Limits | None = None, clock: Callable[[], float] | None = None
) -> Iterator[Runner]:
    generations = partial(Generation, facts=engine.facts, defaults=DEFAULTS, vocabulary=vocabulary())
    runner = Runner(engine, generations, limits=limits, **({} if clock is None else {"clock": clock}))
    runner.start()
    try:
        yield runner
    finally:
        runner.close()
        assert engine.closed
        assert not runner.alive
        assert runner._scheduler._pool.idle, "a page leaked"
        assert runner.load.waiting == runner.load.active == 0


def test_a_generation_streams_by_the_grammar() -> None:
    """Catches missing or misplaced events, and drafts made where none are wanted."""
    engine, drafting, silent = FakeEngine(), Reader(), Reader()
    with running(engine) as runner:
        runner.submit(request(2, 7, 8, 9, drafts=True), drafting)
        runner.submit(request(2, 7, 8, 9), silent)
        kinds = [type(outcome) for outcome in drafting.rest()]
        assert silent.answer() == [7, 8, 9]
    # Three steps to the answer and one that finds it unchanged.
    assert kinds == [Started, Draft, Draft, Draft, Draft, Committed, Finished]
    assert silent.asked_for_draft == 0


def test_a_sink_that_wants_no_draft_gets_none() -> None:
    reader = Reader()
    reader.drafts = False
    with running(FakeEngine()) as runner:
        runner.submit(request(2, 7, drafts=True), reader)
        assert [type(outcome) for outcome in reader.rest()] == [Started, Committed, Finished]
    assert reader.asked_for_draft == 4


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 511), min_size=1, max_size=300), min_size=1, max_size=6),
    steps=st.integers(1, 3),
)
def test_interleaved_requests_get_their_own_answers(prompts: list[list[int]], steps: int) -> None:
    """Answers longer than canvas and window, interleaved by turns; the engine checks every page it is led to."""
    with running(FakeEngine(steps=steps), Limits(max_active=3)) as runner:
        readers = [Reader() for _ in prompts]
        for prompt, reader in zip(prompts, readers, strict=True):
            runner.submit(request(*prompt, tokens=320), reader)
        assert [reader.answer() for reader in readers] == prompts


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        pytest.param("encode", 1, id="before the first chunk"),
        pytest.param("encode", 2, id="within the prefill"),
        pytest.param("denoise", 1, id="before the first step"),
        pytest.param("denoise", 3, id="within a canvas"),
        pytest.param("encode", 3, id="while a committed canvas is encoded"),
    ],
)
def test_cancel_ends_a_request_within_one_call(kind: str, call: int) -> None:
    """Catches a phase that does not look at cancellation, or that keeps pages (checked on closing)."""
    engine, reader = FakeEngine(), Reader()
    gate = engine.hold(kind, call)  # type: ignore[arg-type]
    with running(engine) as runner:
        handle = runner.submit(request(*range(3, 303), tokens=320), reader)
        gate.wait_reached()
        before = sum(engine.calls.values())
        handle.cancel()
        gate.release()
        assert isinstance(reader.rest()[-1], Cancelled)
        assert sum(engine.calls.values()) == before, "the call in progress was to be the last one"
        handle.cancel()
    assert reader.outcomes.empty()


def test_a_queued_request_can_be_cancelled() -> None:
    engine, first, second = FakeEngine(), Reader(), Reader()
    gate = engine.hold("denoise", 1)
    with running(engine, Limits(max_active=1)) as runner:
        runner.submit(request(2, 7), first)
        gate.wait_reached()
        queued = runner.submit(request(2, 8), second)
        assert (runner.load.active, runner.load.waiting) == (1, 1)
        queued.cancel()
        gate.release()
        assert [type(outcome) for outcome in second.rest()] == [Cancelled]
        assert first.answer() == [7]


def test_an_engine_exception_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a fault that spreads, that leaks, or whose log line the caller cannot name."""
    engine, first, second = FakeEngine(), Reader(), Reader()
    gate = engine.hold("encode", 1)
    engine.fail("denoise", 4, RuntimeError("out of bananas"))
    with running(engine, Limits(max_rows=1)) as runner, caplog.at_level(logging.ERROR, "runtime.runner"):
        runner.submit(request(2, 7), first)
        gate.wait_reached()
        runner.submit(request(2, 8), second)
        gate.release()
        # In turn: encode 1 of the first, encode 2 of the second, then a denoising step of each.
        assert first.answer() == [7]
        fault = second.rest()[-1]
        assert isinstance(fault, EngineFault)
        third = Reader()
        runner.submit(request(2, 9), third)
        assert third.answer() == [9]
        assert runner.load.active == 0
    assert second.outcomes.empty(), "a request went on after its fault"
    assert fault.correlation_id in caplog.text
    assert "out of bananas" in caplog.text


def test_a_failing_sink_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Reader):
        def put(self, outcome: Outcome) -> None:
            super().put(outcome)
            raise ValueError("a bug in the service")

    failing, sound = Failing(), Reader()
    with running(FakeEngine()) as runner, caplog.at_level(logging.ERROR, "runtime.runner"):
        runner.submit(request(2, 7), failing)
        runner.submit(request(2, 8), sound)
        assert sound.answer() == [8]
        assert [type(outcome) for outcome in failing.rest()] == [Started, Cancelled]
    assert "a bug in the service" in caplog.text


def test_a_parked_request_stalls_nobody_and_goes_on_when_woken() -> None:
    engine, parked, other = FakeEngine(), Reader(), Reader()
    gate = engine.hold("denoise", 2)
    with running(engine) as runner:
        handle = runner.submit(request(2, 7), parked)
        gate.wait_reached()
        parked.blocked = True
        gate.release()
        runner.submit(request(2, 8), other)
        assert other.answer() == [8]
        assert [type(parked.next())] == [Started]
        assert parked.outcomes.empty()
        assert runner.load.active == 1
        parked.blocked = False
        handle.wake()
        assert parked.answer() == [7]


def test_a_parked_request_can_be_cancelled() -> None:
    parked = Reader()
    parked.blocked = True
    with running(FakeEngine()) as runner:
        handle = runner.submit(request(2, 7), parked)
        assert isinstance(parked.next(), Started)
        handle.cancel()
        assert isinstance(parked.next(), Cancelled)


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_ends_a_request_within_one_call() -> None:
    engine, late, patient, clock = FakeEngine(), Reader(), Reader(), Clock()
    gate = engine.hold("denoise", 2)
    with running(engine, Limits(max_active=1), clock) as runner:
        runner.submit(request(2, 7), late, deadline=5.0)
        queued = Reader()
        gate.wait_reached()
        runner.submit(request(2, 8), queued, deadline=4.0)
        runner.submit(request(2, 9), patient, deadline=6.0)
        clock.now = 5.0
        gate.release()
        assert isinstance(late.rest()[-1], DeadlineTooShort)
        assert isinstance(queued.rest()[-1], DeadlineTooShort)
        assert patient.answer() == [9]
        assert engine.calls["denoise"] == 2 + 4, "a late request was denoised on"
        with pytest.raises(DeadlineTooShort):
            runner.submit(request(2, 7), Reader(), deadline=5.0)


def test_a_parked_request_still_meets_its_deadline() -> None:
    """Catches an engine thread that waits for a wake alone; on the real clock, since that is what it waits with."""
    parked = Reader()
    parked.blocked = True
    with running(FakeEngine()) as runner:
        runner.submit(request(2, 7), parked, deadline=time.monotonic() + 0.05)
        assert [type(outcome) for outcome in parked.rest()] == [Started, DeadlineTooShort]


def test_refusals() -> None:
    """A full queue, and a request that no emptiness of the pool would fit."""
    engine = FakeEngine(pool=dataclasses.replace(POOL, full_pages=8))
    gate = engine.hold("encode", 1)
    with running(engine, Limits(max_active=1, max_waiting=1)) as runner, gate:
        runner.submit(request(2, 7), active := Reader())
        gate.wait_reached()
        runner.submit(request(2, 8), waiting := Reader())
        with pytest.raises(QueueFull):
            runner.submit(request(2, 9), Reader())
        with pytest.raises(InvalidRequest, match="max_output_token_count"):
            runner.submit(request(*[5] * 65, tokens=64), Reader())
        gate.release()
        assert (active.answer(), waiting.answer()) == ([7], [8])


def test_drain_lets_requests_end_and_takes_no_more() -> None:
    engine, reader = FakeEngine(), Reader()
    gate = engine.hold("denoise", 1)
    with running(engine) as runner:
        runner.submit(request(2, 7), reader)
        gate.wait_reached()
        drained: queue.Queue[bool] = queue.Queue()
        drainer = threading.Thread(target=lambda: drained.put(runner.drain(TIMEOUT)))
        drainer.start()
        while True:  # The drain begins on its own thread: until then requests are taken.
            try:
                runner.submit(request(2, 8), Reader()).cancel()
            except Draining:
                break
        gate.release()
        assert drained.get(timeout=TIMEOUT)
        drainer.join()
        assert reader.answer() == [7]


def test_what_is_left_after_the_grace_is_told_so() -> None:
    engine, active, waiting = FakeEngine(), Reader(), Reader()
    gate = engine.hold("denoise", 1)
    with running(engine, Limits(max_active=1)) as runner:
        runner.submit(request(2, 7), active)
        runner.submit(request(2, 8), waiting)
        gate.wait_reached()

        def release() -> None:
            while not runner._abandoning:  # Not before the grace has passed.
                threading.Event().wait(0.001)
            gate.release()

        releaser = threading.Thread(target=release)
        releaser.start()
        assert not runner.drain(0)
        releaser.join()
        assert isinstance(active.rest()[-1], Draining)
        assert isinstance(waiting.rest()[-1], Draining)


def test_a_bug_in_the_loop_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    """A sink that raises where it must not ends the thread: every request is told, and later ones are refused."""

    class Broken(Reader):
        def ready(self) -> bool:
            raise ValueError("ready must not raise")

    broken, other = Broken(), Reader()
    engine = FakeEngine()
    with running(engine) as runner, caplog.at_level(logging.CRITICAL, "runtime.runner"):
        runner.submit(request(2, 7), broken)
        assert isinstance(broken.rest()[-1], EngineFault)
        runner._thread.join(TIMEOUT)
        with pytest.raises(Draining):
            runner.submit(request(2, 8), other)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        pytest.param({"slot": 1}, "slot", id="a slot that holds another canvas"),
        pytest.param({"start": 3}, "positions|canvas", id="positions that were never encoded"),
    ],
)
def test_the_fake_engine_notices_misuse(misuse: dict[str, int], message: str) -> None:
    """The checks that the tests above lean on do fail."""
    engine = FakeEngine()
    prefix = Prefix((3,), 0, (4,))
    engine.encode([EncodeRow(np.array([5, 6]), 0, prefix)])
    uniform = np.zeros(FACTS.canvas_length, np.float32)
    row = DenoiseRow(np.zeros(FACTS.canvas_length, np.int64), 2, prefix, 0, True, 0.5, uniform)
    engine.denoise([row])
    with pytest.raises(EngineMisuse, match=message):
        engine.denoise([dataclasses.replace(row, first_step=False, **misuse)])
