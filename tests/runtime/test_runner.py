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
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from runtime.bundle import GenerationDefaults
from runtime.engines.fake import FACTS, POOL, EngineMisuse, FakeEngine, Faults, Gate
from runtime.engines.protocol import DenoiseRow, EncodeRow, EngineOutOfMemory, Prefix
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
from runtime.runner import Load, Outcome, Runner
from runtime.scheduler import Limits
from runtime.ticket import Priority
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

    def caught_up(self) -> bool:
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
    engine: FakeEngine,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.monotonic,
    rebuild: Callable[[], FakeEngine] | None = None,
) -> Iterator[Runner]:
    generations = partial(Generation, facts=engine.facts, defaults=DEFAULTS, vocabulary=vocabulary())
    runner = Runner(engine, generations, limits=limits, clock=clock, rebuild=rebuild)
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


def together(
    runner: Runner, engine: FakeEngine, prompts: list[tuple[int, ...]], call: int = 1, **options: Any
) -> list[Reader]:
    """Submit requests so that all of them are admitted before the engine's encode call of that number is made."""
    readers = [Reader() for _ in prompts]
    with engine.hold("encode", call) as gate:
        runner.submit(request(*prompts[0], **options), readers[0])
        gate.wait_reached()
        for prompt, reader in zip(prompts[1:], readers[1:], strict=True):
            runner.submit(request(*prompt, **options), reader)
    return readers


def test_canvases_of_all_share_calls() -> None:
    """Six requests in one call more than one of them needs alone, for the prompts of the five that came later."""
    engine = FakeEngine()
    with running(engine) as runner:
        readers = together(runner, engine, [(2, 7 + i) for i in range(6)])
        assert [reader.answer() for reader in readers] == [[7 + i] for i in range(6)]
    assert engine.calls == {"encode": 2, "denoise": 4}


def test_a_fault_ends_the_requests_of_its_call_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """Two rows a call: the first call holds two requests, the third waits for its turn and is spared."""
    engine = FakeEngine()
    engine.fail("denoise", 1, RuntimeError("out of bananas"))
    with running(engine, Limits(max_rows=2)) as runner, caplog.at_level(logging.ERROR, "runtime.runner"):
        readers = together(runner, engine, [(2, 7), (2, 8), (2, 9)])
        outcomes = [reader.rest()[-1] for reader in readers]
    faults = [outcome for outcome in outcomes if isinstance(outcome, EngineFault)]
    assert len(faults) == 2
    assert sum(isinstance(outcome, Finished) for outcome in outcomes) == 1
    assert all(fault.correlation_id in caplog.text for fault in faults)


def test_a_bug_in_one_request_spares_the_others() -> None:
    """Something that is called while the readouts of one call are handed out raises for one of the rows."""
    engine = FakeEngine()
    with running(engine) as runner:
        readers = together(runner, engine, [(2, 7), (2, 8)])
        broken = Reader()
        broken.wants_draft = None  # type: ignore[method-assign, assignment]
        runner.submit(request(2, 9, drafts=True), broken)
        assert isinstance(broken.rest()[-1], EngineFault)
        assert [reader.answer() for reader in readers] == [[7], [8]]


def test_what_a_failed_call_wrote_is_not_shared() -> None:
    """The first prompt's second chunk fails when half of its call is done; an equal prompt must not find it."""
    engine = FakeEngine()
    prompt = (2, *[7] * 600)
    engine.fail("encode", 2, RuntimeError("half a page"))
    with running(engine) as runner:
        runner.submit(request(*prompt, tokens=640), failing := Reader())
        assert isinstance(failing.rest()[-1], EngineFault)
        before = len(engine.rows)
        runner.submit(request(*prompt, tokens=640), again := Reader())
        assert again.answer() == list(prompt[1:])
    encodes = [row for row in engine.rows[before:] if isinstance(row, EncodeRow)]
    assert [row.start for row in encodes[:2]] == [256, 512], "only the first chunk was whole"


def test_equal_prompts_are_encoded_once() -> None:
    """Those that come together, the one that comes later, and the next turn of the conversation."""
    engine = FakeEngine()
    prompt = (2, *range(3, 503), *range(3, 60))
    with running(engine) as runner:
        readers = together(runner, engine, [prompt] * 3, tokens=640)
        assert [reader.answer() for reader in readers] == [list(prompt[1:])] * 3
        runner.submit(request(*prompt, 9, 9, tokens=640), later := Reader())
        assert later.answer() == [*prompt[1:], 9, 9]
    chunks = [row.start for row in engine.rows if isinstance(row, EncodeRow) and row.start < len(prompt)]
    assert sorted(chunks) == [0, 256, 512, 512, 512, 512]


@pytest.mark.parametrize("most_rows", [1, 2, 3])
def test_a_shortage_of_memory_shrinks_the_batch(most_rows: int) -> None:
    """Nobody is lost, and later calls hold no more rows than fitted."""
    engine = FakeEngine(faults=Faults(most_rows=most_rows))
    with running(engine) as runner:
        readers = together(runner, engine, [(2, 7 + i) for i in range(7)])
        assert [reader.answer() for reader in readers] == [[7 + i] for i in range(7)]
        before = len(engine.rows)
        readers = together(runner, engine, [(2, 7 + i) for i in range(7)], call=engine.calls["encode"] + 1)
        assert [reader.answer() for reader in readers] == [[7 + i] for i in range(7)]
        assert len(engine.rows) - before == 7 * 5, "a row was tried in vain again"


def test_a_request_that_does_not_fit_alone_ends_alone() -> None:
    engine = FakeEngine()
    engine.fail("denoise", 1, EngineOutOfMemory("one row"))
    with running(engine) as runner:
        runner.submit(request(2, 7), alone := Reader())
        assert isinstance(alone.rest()[-1], EngineFault)
        runner.submit(request(2, 8), next_one := Reader())
        assert next_one.answer() == [8]


def test_an_engine_that_keeps_failing_is_built_anew_under_the_living() -> None:
    """Two rows a call: two of six requests live through the two calls that fail, and lose their memory."""
    first, second = FakeEngine(), FakeEngine()
    for call in (6, 7):
        first.fail("denoise", call, RuntimeError("dead"))
    with running(first, Limits(max_rows=2), rebuild=lambda: second) as runner:
        readers = together(runner, first, [(2, *range(3, 303), i) for i in range(6)])
        outcomes = [reader.rest() for reader in readers]
        assert first.closed
        faults = [index for index, told in enumerate(outcomes) if isinstance(told[-1], EngineFault)]
        assert len(faults) == 4
        for index in set(range(6)) - set(faults):
            assert [type(outcome) for outcome in outcomes[index]] == [Started, Committed, Committed, Finished]
        runner.submit(request(2, *range(3, 303)), late := Reader())
        assert late.answer() == list(range(3, 67)), "or it found what the closed engine held"
    assert second.closed


def test_an_engine_that_cannot_be_built_anew_ends_the_runner(caplog: pytest.LogCaptureFixture) -> None:
    """Its supervisor is to start the process again; nobody waits for ever."""

    def rebuild() -> FakeEngine:
        raise RuntimeError("no device")

    engine = FakeEngine()
    for call in (6, 7):
        engine.fail("denoise", call, RuntimeError("dead"))
    limits = Limits(max_rows=2)
    with running(engine, limits, rebuild=rebuild) as runner, caplog.at_level(logging.CRITICAL, "runtime.runner"):
        readers = together(runner, engine, [(2, *range(3, 60), i) for i in range(6)])
        assert all(isinstance(reader.rest()[-1], EngineFault) for reader in readers)
        runner._thread.join(TIMEOUT)
        assert not runner.alive
    assert "no device" in caplog.text


def test_an_engine_whose_memory_is_lost_is_built_anew() -> None:
    """Catches one that answers every request for ever that not even one row fits."""
    first, second = FakeEngine(faults=Faults(shortage_rate=1.0)), FakeEngine()
    with running(first, rebuild=lambda: second) as runner:
        for _ in range(2):
            runner.submit(request(2, 7), lost := Reader())
            assert isinstance(lost.rest()[-1], EngineFault)
        runner.submit(request(2, 8), reader := Reader())
        assert reader.answer() == [8]
    assert first.closed


def test_a_hung_replacement_shows() -> None:
    """Catches a watchdog that looks at calls alone: an engine that failed may never end, or its successor begin."""
    engine, clock, gate = FakeEngine(faults=Faults(error_rate=1.0)), Clock(), Gate()

    def rebuild() -> FakeEngine:
        gate()
        return FakeEngine()

    with running(engine, clock=clock, rebuild=rebuild) as runner, gate:
        for _ in range(2):
            runner.submit(request(2, 7), reader := Reader())
            reader.rest()
        gate.wait_reached()
        clock.now += 61.0
        assert runner.stalled_for == 61.0
        gate.release()
        runner.submit(request(2, 8), reader := Reader())
        assert reader.answer() == [8]
        runner.drain(TIMEOUT)
        assert runner.stalled_for == 0.0


def test_a_hung_call_shows() -> None:
    engine, clock = FakeEngine(), Clock()
    gate = engine.hold("denoise", 2)
    with running(engine, clock=clock) as runner:
        assert runner.stalled_for == 0.0
        runner.submit(request(2, 7), reader := Reader())
        gate.wait_reached()
        clock.now += 61.0
        assert runner.stalled_for == 61.0
        gate.release()
        reader.answer()
        runner.drain(TIMEOUT)
        clock.now += 61.0
        assert runner.stalled_for == 0.0


def test_who_is_parked_for_long_gives_its_memory_back_and_goes_on_where_it_was() -> None:
    """After its first block, in the midst of the second canvas; another request has needed all the memory meanwhile."""
    engine, clock, parked, other = FakeEngine(), Clock(), Reader(), Reader()
    answer = list(range(3, 60))
    parked.drafts = False
    gate = engine.hold("denoise", 6)
    with running(engine, Limits(max_active=1, park_seconds=10.0), clock) as runner:
        handle = runner.submit(request(2, *answer, drafts=True), parked)
        gate.wait_reached()
        parked.blocked = True
        runner.submit(request(2, 8), other)
        gate.release()
        assert [type(parked.next()) for _ in range(2)] == [Started, Committed]
        while not runner.load.suspended:  # The clock runs until the engine's thread has looked at it twice.
            clock.now += 10.5
            handle.wake()
        assert other.answer() == [8]
        assert runner._scheduler._pool.idle, "a suspended request holds pages"
        parked.blocked = False
        handle.wake()
        told = parked.rest()
    assert [type(outcome) for outcome in told] == [Committed, Finished]
    assert isinstance(told[0], Committed)
    assert told[0].token_ids.tolist() == answer[32:]
    assert isinstance(told[1], Finished)
    assert told[1].usage.denoising_steps == 8, "steps that were made twice are counted once"


def test_who_is_parked_delays_nobody() -> None:
    """Catches readers that have stopped reading and hold the only place, here for a whole day: until it is theirs
    again others go on, and then their answers are whole. The clock stands still."""
    engine, parked, late = FakeEngine(), Reader(), Reader()
    answer = list(range(3, 60))
    gate = engine.hold("denoise", 6)
    with running(engine, Limits(max_active=1, park_seconds=86400.0), Clock()) as runner:
        handle = runner.submit(request(2, *answer), parked)
        gate.wait_reached()
        parked.blocked = True
        gate.release()
        for token in (7, 8):
            runner.submit(request(2, token), other := Reader())
            assert other.answer() == [token]
        assert runner.load == Load(waiting=0, active=0, suspended=1)
        parked.blocked = False
        handle.wake()
        assert parked.answer() == answer
        # Who comes when nobody else can go on is not kept waiting either.
        parked.blocked = True
        runner.submit(request(2, *answer), parked)
        assert isinstance(parked.next(), Started)
        runner.submit(request(2, 9), late)
        assert late.answer() == [9]


@pytest.mark.parametrize("way", ["cancel", "deadline", "drain"])
def test_a_suspended_request_can_end(way: str) -> None:
    parked, clock = Reader(), Clock()
    with running(FakeEngine(), Limits(park_seconds=1.0), clock) as runner:
        parked.blocked = True
        handle = runner.submit(request(2, 7), parked, deadline=1e9)
        assert isinstance(parked.next(), Started)
        while not runner.load.suspended:  # The clock runs until the engine's thread has looked at it twice.
            clock.now += 1.5
            handle.wake()
        if way == "cancel":
            handle.cancel()
        elif way == "deadline":
            clock.now = 1e9
            handle.wake()
        else:
            runner.drain(0)
        expected = {"cancel": Cancelled, "deadline": DeadlineTooShort, "drain": Draining}[way]
        assert isinstance(parked.next(), expected)


def test_batch_work_gives_way_and_goes_on() -> None:
    """One place: who is watched gets it within one call, and the batch answer is whole in the end."""
    engine, batch, watched = FakeEngine(), Reader(), Reader()
    answer = list(range(3, 100))
    gate = engine.hold("denoise", 6)
    with running(engine, Limits(max_active=1)) as runner:
        runner.submit(request(2, *answer, tokens=128), batch, priority=Priority.BATCH)
        gate.wait_reached()
        runner.submit(request(2, 8), watched)
        gate.release()
        assert watched.answer() == [8]
        assert batch.answer() == answer
    denoised = [row for row in engine.rows if isinstance(row, DenoiseRow)]
    assert [row.start for row in denoised[6:10]] == [2] * 4, "the watched canvas came next"


def test_who_is_watched_waits_for_a_third_more_while_batch_work_saturates_the_engine() -> None:
    """In engine calls of one row each: its own, and one of the others' after every three."""
    engine, watched = FakeEngine(), Reader()
    gate = engine.hold("denoise", 20)
    with running(engine, Limits(max_active=4, max_rows=1)) as runner:
        batch = [Reader() for _ in range(12)]
        for number, reader in enumerate(batch):
            runner.submit(request(2, *range(3, 100), number, tokens=128), reader, priority=Priority.BATCH)
        gate.wait_reached()
        runner.submit(request(2, 8), watched)
        before = len(engine.rows)
        gate.release()
        assert watched.answer() == [8]
        for number, reader in enumerate(batch):
            assert reader.answer() == [i for i in (*range(3, 100), number) if i > 2]
    rows = engine.rows[before:]
    last = max(index for index, row in enumerate(rows) if isinstance(row, DenoiseRow) and row.start == 2)
    assert last + 1 <= 5 + 2, "one encoding and four steps of its own, and two calls of the others"


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=300), min_size=2, max_size=8),
    error_rate=st.sampled_from([0.0, 0.05, 0.3]),
    shortage_rate=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 1000),
    rebuild=st.booleans(),
)
def test_whatever_goes_wrong_everybody_is_told_and_nothing_leaks(
    prompts: list[list[int]], error_rate: float, shortage_rate: float, seed: int, rebuild: bool
) -> None:
    """Prompts of few tokens, which share prefixes; the engine checks every page, `running` that none is left."""
    engines = [
        FakeEngine(faults=Faults(seed + number, error_rate, shortage_rate), answer=lambda prompt: prompt[1:])
        for number in range(60)
    ]
    made = iter(engines)
    with running(next(made), Limits(max_active=4), rebuild=(lambda: next(made)) if rebuild else None) as runner:
        readers = [Reader() for _ in prompts]
        for prompt, reader in zip(prompts, readers, strict=True):
            runner.submit(request(2, *prompt, tokens=320), reader)
        for prompt, reader in zip(prompts, readers, strict=True):
            told = reader.rest()
            answer = [int(i) for outcome in told if isinstance(outcome, Committed) for i in outcome.token_ids]
            if isinstance(told[-1], Finished):
                assert answer == prompt
            else:
                assert isinstance(told[-1], EngineFault)
                assert answer == prompt[: len(answer)]


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


def test_who_is_crowded_out_of_the_queue_is_told() -> None:
    """Without waiting for the engine to be free for it: within the call in progress, while the newcomer is served."""
    engine = FakeEngine()
    gate = engine.hold("encode", 1)
    with running(engine, Limits(max_active=1, max_waiting=2)) as runner, gate:
        runner.submit(request(2, 7), active := Reader(), client="flood")
        gate.wait_reached()
        kept, crowded_out, late = Reader(), Reader(), Reader()
        runner.submit(request(2, 8), kept, client="flood")
        handle = runner.submit(request(2, 9), crowded_out, client="flood")
        runner.submit(request(2, 10), late, client="other")
        handle.cancel()
        gate.release()
        assert [reader.answer() for reader in (active, kept, late)] == [[7], [8], [10]]
        [told] = crowded_out.rest()
        assert isinstance(told, QueueFull)
        assert told.waiting == 2
    assert crowded_out.outcomes.empty()


@pytest.mark.parametrize("way", ["drain", "close"])
def test_a_call_that_does_not_return_holds_up_no_end(way: str) -> None:
    """Nobody waits longer than asked to; once the call has returned its request is told."""
    engine, reader = FakeEngine(), Reader()
    gate = engine.hold("denoise", 1)
    with running(engine) as runner, gate:
        runner.submit(request(2, 7), reader)
        gate.wait_reached()
        if way == "drain":
            assert not runner.drain(0, patience=0.01)
        else:
            runner.close(patience=0.01)
            assert runner.alive
        gate.release()
        assert isinstance(reader.rest()[-1], Draining)


def test_a_runner_that_was_never_started_closes() -> None:
    """Catches one that waits for a thread that there is not, and requests that are told nothing."""
    engine, reader = FakeEngine(), Reader()
    generations = partial(Generation, facts=engine.facts, defaults=DEFAULTS, vocabulary=vocabulary())
    runner = Runner(engine, generations)
    runner.submit(request(2, 7), reader)
    runner.close()
    assert engine.closed
    assert isinstance(reader.next(), Draining)


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
