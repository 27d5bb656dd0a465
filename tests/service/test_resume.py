"""Broken streams: what is resumed is what the unbroken stream would have sent, and clients lose nothing."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiongemma.v1 import generation_pb2, options_pb2
from runtime.events import Committed, Draft, Event, Finished, Started
from runtime.request import SamplingOverrides, SamplingParameters
from service.client import CallFailed, Client
from service.progress import Progress
from service.resuming import Retries, generate
from tests.service.processes import ROOT, ServerProcess, fake_server
from tests.service.support import CHARACTERS, FIRST_CHARACTER, Harness, failure_of, request, serving

LONG = "the quick brown fox jumps over the lazy dog, and then it does so again and again and again. " * 2
Options = options_pb2.GenerationOptions
Response = generation_pb2.GenerateResponse


async def events_of(harness: Harness, wanted: generation_pb2.GenerateRequest) -> list[Response]:
    return [response async for response in harness.generation.Generate(wanted, timeout=60)]


def blocks_of(responses: Sequence[Response]) -> list[generation_pb2.BlockCommitted]:
    return [response.committed for response in responses if response.HasField("committed")]


def resumed(whole: Sequence[Response], blocks: int) -> generation_pb2.GenerateRequest:
    """The request of a client that has `blocks` blocks of an answer."""
    wanted = request("go", options=whole[0].started.options)
    for block in blocks_of(whole)[:blocks]:
        wanted.resume.committed_token_ids.extend(block.token_ids)
    return wanted


ANSWERS: list[Any] = [
    pytest.param(LONG, {}, id="long"),
    pytest.param(LONG, {"max_output_token_count": 100}, id="cut-at-its-limit"),
    pytest.param(LONG, {"stop_sequences": ["again and again"]}, id="stop-sequence"),
    pytest.param(LONG, {"stop_sequences": [LONG[60:70]]}, id="stop-sequence-over-a-border"),
    pytest.param("[ü€😀] " * 15, {}, id="characters-over-borders"),
    pytest.param("x" * 64, {}, id="ended-at-a-border"),
]


@pytest.mark.parametrize(("answer", "options"), ANSWERS)
async def test_the_rest_is_that_of_the_unbroken_stream(tmp_path: Path, answer: str, options: dict[str, Any]) -> None:
    """From every block on: tokens, texts held back before the break, numbers of blocks, the reason of the end."""
    async with serving(tmp_path, {"go": answer}) as harness:
        whole = await events_of(harness, request("go", options=Options(seed=7, **options)))
        blocks = blocks_of(whole)
        assert len(blocks) >= 3
        for count in range(1, len(blocks)):
            rest = await events_of(harness, resumed(whole, count))
            assert rest[0].started == whole[0].started
            assert blocks_of(rest) == blocks[count:]
            assert rest[-1].finished.finish_reason == whole[-1].finished.finish_reason
            assert rest[-1].finished.stop_sequence == whole[-1].finished.stop_sequence
            usage = rest[-1].finished.usage
            assert usage.output_token_count == whole[-1].finished.usage.output_token_count
            assert usage.block_count == len(blocks)
            assert usage.denoising_step_count == sum(block.step_count for block in blocks[count:])


WRONG: list[Any] = [
    # committed ids, options, field, what the description must say
    pytest.param([5] * 33, {"seed": 1}, "resume.committed_token_ids", "whole blocks of 32", id="no-whole-blocks"),
    pytest.param([5] * 31 + [1], {"seed": 1}, "resume.committed_token_ids", "ends the answer", id="an-end-token"),
    pytest.param(
        [FIRST_CHARACTER + CHARACTERS.index("X")] * 32,
        {"seed": 1, "stop_sequences": ["XXX"]},
        "resume.committed_token_ids",
        "ends the answer",
        id="a-stop-sequence",
    ),
    pytest.param(
        [5] * 32,
        {"seed": 1, "max_output_token_count": 32},
        "resume.committed_token_ids",
        "ends the answer",
        id="nothing-left",
    ),
    pytest.param([5] * 31 + [512], {"seed": 1}, "resume.committed_token_ids[31]", "0 to 511", id="no-token"),
    pytest.param([5] * 32, {}, "options.seed", "started", id="no-seed"),
]


@pytest.mark.parametrize(("ids", "options", "field", "says"), WRONG)
async def test_what_cannot_be_resumed_is_named(
    tmp_path: Path, ids: list[int], options: dict[str, Any], field: str, says: str
) -> None:
    wanted = request("go", options=Options(**options))
    wanted.resume.committed_token_ids.extend(ids)
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.generation.Generate(wanted, timeout=30))
        assert harness.engine.rows == []
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    [violation] = failure.violations
    assert violation.field == field
    assert says in violation.description


# Servers that are killed


@contextmanager
def killed_and_started_again(directory: Path, **options: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """A server's address, and what kills it, as `kill -9` does, and starts another one there."""
    address = f"unix:{directory}/socket"
    with ExitStack() as servers:
        first = servers.enter_context(fake_server(directory, address=address, **options))

        def replace() -> None:
            first.process.kill()
            first.process.wait()
            servers.enter_context(fake_server(directory, address=address, **options))

        yield address, replace


@contextmanager
def dgemma(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from service.cli import main; main()", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1) as process:
        try:
            yield process
        finally:
            process.kill()


LINES = "an answer of several lines, each a block long.\n" * 12


def test_generate_survives_the_server(tmp_path: Path) -> None:
    """Killed in the midst of the answer: the user sees one answer, whole, and an exit code of 0."""
    with (
        killed_and_started_again(tmp_path, answers={"go": LINES}, step_seconds=0.03) as (address, replace),
        dgemma("generate", "go", "--address", address) as client,
    ):
        assert client.stdout is not None
        assert client.stdin is not None
        client.stdin.close()
        first = client.stdout.readline()
        replace()
        assert first + client.stdout.read() == LINES
        assert client.wait(60) == 0


def test_a_chat_survives_the_server(tmp_path: Path) -> None:
    """Killed in the midst of a turn, and between two turns."""
    answers = {"go": LINES, "and": "then"}
    with (
        killed_and_started_again(tmp_path, answers=answers, step_seconds=0.03) as (address, replace),
        dgemma("chat", "--address", address) as client,
    ):
        assert client.stdout is not None
        assert client.stdin is not None
        client.stdin.write("go\n")
        first = client.stdout.readline()
        replace()
        assert first + "".join(client.stdout.readline() for _ in range(11)) == LINES
        client.stdin.write("and\n")
        assert client.stdout.readline() == "then\n"
        client.stdin.close()
        assert client.wait(60) == 0


# Clients


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    answers = {"go": LONG, "short": "one block", "border": "x" * 64, "bytes": "[ü€😀] " * 9}
    with fake_server(tmp_path_factory.mktemp("bundle"), answers=answers) as started:
        yield started


class Flaky:
    """A client whose streams break after a number of events each, until no numbers are left."""

    def __init__(self, client: Client, lengths: Sequence[int]) -> None:
        self._client, self._lengths = client, iter(lengths)
        self.streams = 0

    def generate(self, *arguments: Any, **options: Any) -> Any:
        self.streams += 1
        return _Cut(self._client.generate(*arguments, **options), next(self._lengths, None))


class _Cut:
    def __init__(self, events: Any, length: int | None) -> None:
        self._events, self._length = events, length

    def __iter__(self) -> Iterator[Event]:
        yield from itertools.islice(self._events, self._length)
        if self._length is not None:
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, "the wire was cut")

    def cancel(self) -> None:
        self._events.cancel()


def told(events: Sequence[Event]) -> tuple[list[int], list[list[int]], str, Any]:
    """What a reader has at the end, in blocks, tokens and text."""
    blocks = [event for event in events if isinstance(event, Committed)]
    finished = events[-1]
    assert isinstance(events[0], Started)
    assert isinstance(finished, Finished)
    ids = [block.token_ids.tolist() for block in blocks]
    return [block.block_index for block in blocks], ids, "".join(b.text for b in blocks), finished.reason


SETTINGS = [
    SamplingOverrides(seed=5),
    SamplingOverrides(seed=5, max_output_tokens=64),
    SamplingOverrides(seed=5, stop_strings=("over the", "xxxx")),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=["whole", "limited", "stopped"])
@pytest.mark.parametrize("prompt", ["go", "short", "border", "bytes"])
def test_a_stream_that_breaks_anywhere_loses_nothing(
    server: ServerProcess, prompt: str, sampling: SamplingOverrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its events in turn, the last block's before `finished` among them; and drafts may come again."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    whole = list(server.client.generate(prompt, sampling, timeout=60))
    for length in range(1, len(whole)):
        flaky: Any = Flaky(server.client, [length])
        events = list(generate(flaky, prompt, sampling, timeout=60))
        assert flaky.streams == 2
        assert told(events) == told(whole)


def test_a_stream_that_breaks_again_and_again_loses_nothing(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts, and a seed that the server has drawn: the client takes it over from the first stream."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    flaky: Any = Flaky(server.client, [3, 1, 2, 4, 3, 2, 1, 5, 2, 2])
    events = list(generate(flaky, "go", draft_interval=0.0, timeout=60))
    assert flaky.streams == 11
    assert told(events)[2] == LONG
    assert sum(isinstance(event, Started) for event in events) == 1


STARTED = Started("fake", SamplingParameters(1, 4000, 8, 0.1, 0.4, 0.8, 1, 0.005), 32, 4)


@given(st.lists(st.lists(st.integers(5, 100), min_size=32, max_size=32), max_size=4), st.integers(0, 31))
def test_progress_leaves_out_what_may_be_the_last_block(blocks: list[list[int]], tail: int) -> None:
    """Against plain lists: whole blocks are kept, a short one is not, and nothing is counted twice."""
    progress = Progress()
    assert progress.take(STARTED)
    for index, ids in enumerate([*blocks, [5] * tail]):
        event = Committed(index, np.array(ids, np.int64), "", 1, True)
        assert progress.take(event)
        assert not progress.take(event)
    assert progress.committed_ids == [token for ids in blocks for token in ids]
    assert progress.take(Draft(0, 1, np.zeros(0, np.int64), "", (), np.zeros(0, np.bool_), np.zeros(0, np.float32), 1))
    assert not progress.take(STARTED)


@pytest.mark.parametrize(
    ("code", "reason", "begun"),
    [
        pytest.param(grpc.StatusCode.UNAVAILABLE, "", False, id="never-began"),
        pytest.param(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", True, id="refused"),
        pytest.param(grpc.StatusCode.INTERNAL, "ENGINE_FAULT", True, id="fault"),
        pytest.param(grpc.StatusCode.CANCELLED, "", True, id="cancelled"),
        pytest.param(grpc.StatusCode.DEADLINE_EXCEEDED, "", True, id="too-late"),
        pytest.param(grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE", True, id="too-large"),
    ],
)
def test_what_is_no_use_is_not_tried_again(code: grpc.StatusCode, reason: str, begun: bool) -> None:
    error = CallFailed(code, "x")
    error.reason = reason
    with pytest.raises(CallFailed):
        Retries(60.0, sleep=lambda _: None).wait(error, begun)


def test_the_waits_grow_until_something_comes_and_end_with_the_time() -> None:
    """Catches a client that besieges a server, and one that waits beyond its own deadline."""
    slept: list[float] = []
    retries, error = Retries(60.0, sleep=slept.append), CallFailed(grpc.StatusCode.UNAVAILABLE, "x")
    for _ in range(12):
        retries.wait(error, begun=True)
    for waited, most in zip(slept, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2], strict=False):
        assert 0.5 * most <= waited <= most
    assert all(2.5 <= waited <= 5 for waited in slept[6:])
    retries.went_on()
    retries.wait(error, begun=True)
    assert slept[-1] <= 0.1
    error.retry_after = 7.0
    retries.wait(error, begun=True)
    assert slept[-1] == 7.0
    with pytest.raises(CallFailed):
        Retries(5.0, sleep=slept.append).wait(error, begun=True)
