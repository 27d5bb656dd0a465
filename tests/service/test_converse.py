"""Converse over a real socket and the fake engine: turns, history, cancellation, and what ends the stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import service.conversation
from diffusiongemma.v1 import generation_pb2, options_pb2, prompt_pb2
from runtime.runner import Runner
from service.client import CallFailed
from service.conversation import FEW_PARTS, MAX_CANCELLED_TURNS, MAX_WAITING_TURNS
from service.served import Served
from tests.service.support import Harness, message, reached, serving

Request, Response = generation_pb2.ConverseRequest, generation_pb2.ConverseResponse
LONG = "an answer of several blocks, each one of thirty-two tokens. " * 3


def setup(*history: prompt_pb2.Message, **fields: Any) -> Request:
    return Request(setup=generation_pb2.ConversationSetup(history=history, **fields))


def turn(text: str, options: options_pb2.GenerationOptions | None = None) -> Request:
    parts = [prompt_pb2.ContentPart(text=text)]
    return Request(start_turn=generation_pb2.TurnStart(parts=parts, options=options))


def cancel(index: int) -> Request:
    return Request(cancel_turn=generation_pb2.TurnCancel(turn_index=index))


DRAFTS = options_pb2.GenerationOptions(drafts=options_pb2.DraftOptions(mode=options_pb2.DRAFT_MODE_ON))


class Stream:
    """The client's side, step by step."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.responses: list[Response] = []

    async def send(self, *requests: Request) -> None:
        for request in requests:
            await self.call.write(request)

    async def until(self, kind: str) -> Response:
        """Read up to the next event of a kind."""
        while (response := await self.read()) is not None:
            if response.WhichOneof("event") == kind:
                return response
        raise AssertionError(f"the stream ended before {kind}")

    async def read(self) -> Response | None:
        response = await self.call.read()
        if response is grpc.aio.EOF:
            return None
        self.responses.append(response)
        return response  # type: ignore[no-any-return]

    async def rest(self) -> list[Response]:
        """Half-close and read to the end; all responses of the stream."""
        await self.call.done_writing()
        while await self.read() is not None:
            pass
        return self.responses

    async def failure(self) -> CallFailed:
        """Read to the status that ends the stream."""
        try:
            while await self.read() is not None:
                pass
        except grpc.aio.AioRpcError as error:
            return CallFailed.of(error)
        raise AssertionError(f"the stream went well: {self.responses}")


@asynccontextmanager
async def conversing(directory: Path, answers: dict[str, str], **options: Any) -> AsyncIterator[tuple[Harness, Stream]]:
    async with serving(directory, answers, **options) as harness:
        yield harness, Stream(harness.generation.Converse(timeout=60))


def by_turn(responses: list[Response]) -> dict[int, list[str]]:
    """Kinds of events by turn, after checking that numbers have no gaps and turns do not mingle."""
    assert [response.sequence_number for response in responses] == list(range(len(responses)))
    indices = [response.turn_index for response in responses]
    assert indices == sorted(indices)
    found: dict[int, list[str]] = {}
    for response in responses:
        found.setdefault(response.turn_index, []).append(str(response.WhichOneof("event")))
    return found


def text_of(responses: list[Response], index: int) -> str:
    return "".join(response.committed.text for response in responses if response.turn_index == index)


def prompts_of(harness: Harness) -> list[str]:
    """The prompts that reached the engine, in characters."""
    vocabulary = harness.vocabulary
    prompts: list[list[int]] = []
    for row in harness.engine.rows:
        if hasattr(row, "token_ids"):
            if row.start == 0:
                prompts.append([])
            prompts[-1].extend(row.token_ids.tolist())
    return [
        b"".join(vocabulary.token_bytes(token) or vocabulary.spelling(token).encode() for token in prompt).decode()
        for prompt in prompts
    ]


async def test_turns_build_on_each_other(tmp_path: Path) -> None:
    """The history reaches the engine: what was set up, what was asked, and what was answered."""
    history = (message("system", "Be brief."), message("user", "one"), message("model", "ONE"))
    async with conversing(tmp_path, {"two": "TWO", "three": "THREE"}) as (harness, stream):
        await stream.send(setup(*history), turn("two"))
        await stream.until("finished")
        await stream.send(turn("three"))
        responses = await stream.rest()
        assert by_turn(responses) == {0: ["started", "committed", "finished"], 1: ["started", "committed", "finished"]}
        assert (text_of(responses, 0), text_of(responses, 1)) == ("TWO", "THREE")
        head = "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\none<turn|>\n<|turn>assistant\nONE<turn|>\n"
        asked = f"{head}<|turn>user\ntwo<turn|>\n"
        assert prompts_of(harness) == [
            f"{asked}<|turn>model",
            f"{asked}<|turn>assistant\nTWO<turn|>\n<|turn>user\nthree<turn|>\n<|turn>model",
        ]


async def test_turns_typed_ahead_wait_and_half_close_ends_after_all(tmp_path: Path) -> None:
    """Everything is sent before anything is read; all turns are answered, in order, and the stream ends with OK."""
    async with conversing(tmp_path, {"a": LONG}) as (_, stream):
        await stream.send(setup(options=DRAFTS), turn("a"), turn("b"), turn("c"))
        responses = await stream.rest()
        assert await stream.call.code() is grpc.StatusCode.OK
    assert [text_of(responses, index) for index in range(3)] == [LONG, "b", "c"]
    for kinds in by_turn(responses).values():
        assert (kinds[0], kinds[-1]) == ("started", "finished")
        assert set(kinds[1:-1]) <= {"draft", "committed"}


async def test_a_conversation_without_turns_ends_well(tmp_path: Path) -> None:
    async with conversing(tmp_path, {}) as (_, stream):
        await stream.send(setup())
        assert await stream.rest() == []
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_a_cancelled_turn_leaves_no_trace(tmp_path: Path) -> None:
    """Cancelled while its second block is open: the engine stops, and the next turn's prompt does not hold it."""
    async with conversing(tmp_path, {"long": LONG, "next": "NEXT"}) as (harness, stream):
        with harness.engine.hold("denoise", 6) as gate:
            await stream.send(setup(options=DRAFTS), turn("long"))
            await reached(gate)
            handle = await harness.runner.submitted()
            await stream.send(cancel(0), turn("next"))
            await handle.wait_cancelled()
        responses = await stream.rest()
        kinds = by_turn(responses)
        assert kinds[0][0] == "started"
        assert kinds[0].count("committed") == 1
        assert kinds[0][-1] == "cancelled"
        assert "finished" not in kinds[0]
        assert kinds[1][-1] == "finished"
        assert text_of(responses, 1) == "NEXT"
        assert "long" not in prompts_of(harness)[1]
        # Six steps for the first turn, the held one being the last, and four for the second.
        assert harness.engine.calls["denoise"] == 6 + 4


async def test_a_waiting_turn_is_cancelled_unstarted(tmp_path: Path) -> None:
    """It is not even looked at: this one is too long, and would end the stream."""
    async with conversing(tmp_path, {}) as (harness, stream):
        with harness.engine.hold("encode", 1) as gate:
            await stream.send(setup(), turn("first"), turn("second" * 1000), turn("third"))
            await reached(gate)
            await stream.send(cancel(1), turn("fourth"))
        responses = await stream.rest()
    kinds = by_turn(responses)
    assert kinds[1] == ["cancelled"]
    assert [kinds[index][-1] for index in (0, 2, 3)] == ["finished"] * 3
    assert all("second" not in prompt for prompt in prompts_of(harness))


async def test_cancelling_a_turn_that_has_ended_does_nothing(tmp_path: Path) -> None:
    async with conversing(tmp_path, {"a": "A"}) as (_, stream):
        await stream.send(setup(), turn("a"))
        await stream.until("finished")
        await stream.send(cancel(0), cancel(0), turn("b"))
        responses = await stream.rest()
    assert by_turn(responses)[0][-1] == "finished"
    assert text_of(responses, 1) == "b"


async def test_a_turn_can_bring_its_own_options(tmp_path: Path) -> None:
    """They replace the setup's as a whole, for one turn."""
    two = options_pb2.GenerationOptions(max_output_token_count=2)
    three = options_pb2.GenerationOptions(stop_sequences=["d"])
    async with conversing(tmp_path, {}) as (_, stream):
        await stream.send(setup(options=two), turn("abcdef"), turn("abcdef", three), turn("ghijkl"))
        responses = await stream.rest()
    assert [text_of(responses, index) for index in range(3)] == ["ab", "abc", "gh"]


async def test_a_turn_goes_on_in_another_stream(tmp_path: Path) -> None:
    """What is left of its answer comes, and the history of the next turn holds all of it."""
    answers = {"long": LONG, "next": "NEXT"}
    options = options_pb2.GenerationOptions(seed=3)
    async with conversing(tmp_path, answers) as (harness, stream):
        await stream.send(setup(options=options), turn("long"))
        whole = await stream.rest()
        blocks = [response.committed for response in whole if response.HasField("committed")]
        other = Stream(harness.generation.Converse(timeout=60))
        going_on = turn("long", whole[0].started.options)
        for block in blocks[:2]:
            going_on.start_turn.resume.committed_token_ids.extend(block.token_ids)
        await other.send(setup(), going_on, turn("next"))
        rest = await other.rest()
        assert [r.committed for r in rest if r.HasField("committed") and r.turn_index == 0] == blocks[2:]
        assert f"{LONG}<turn|>\n<|turn>user\nnext" in prompts_of(harness)[-1]


WRONG: list[Any] = [
    pytest.param([turn("hi")], "start_turn", "setup comes first", id="no-setup"),
    pytest.param([cancel(0)], "cancel_turn", "setup comes first", id="cancel-before-setup"),
    pytest.param([setup(), setup()], "setup", "once", id="two-setups"),
    pytest.param([setup(), Request()], "action", "missing", id="no-action"),
    pytest.param([setup(), cancel(0)], "cancel_turn.turn_index", "0 turns", id="cancel-unstarted"),
    pytest.param([setup(), turn("a"), cancel(-1)], "cancel_turn.turn_index", "from 0", id="cancel-negative"),
    pytest.param([setup(message("user", "a"))], "setup.history[0].role", "start_turn", id="history-ends-with-user"),
    pytest.param(
        [setup(message("model", "a")), turn("b")], "setup.history[0].role", "follow", id="history-begins-with-model"
    ),
    pytest.param([setup(prompt_pb2.Message())], "setup.history[0].role", "ROLE_USER", id="history-without-role"),
    pytest.param([setup(), turn("")], "start_turn.parts[0]", "no content", id="empty-turn"),
    pytest.param(
        [setup(), Request(start_turn=generation_pb2.TurnStart())],
        "start_turn.parts",
        "one part",
        id="turn-without-parts",
    ),
    pytest.param([setup(), turn("x" * 5000)], "start_turn.parts", "4064", id="turn-too-long"),
    pytest.param(
        [
            setup(),
            Request(
                start_turn=generation_pb2.TurnStart(
                    parts=[prompt_pb2.ContentPart(text="x")],
                    options=options_pb2.GenerationOptions(seed=1),
                    resume=generation_pb2.Resume(committed_token_ids=[5] * 33),
                )
            ),
        ],
        "start_turn.resume.committed_token_ids",
        "whole blocks",
        id="resumed-within-a-block",
    ),
    pytest.param(
        [setup(), turn("x", options_pb2.GenerationOptions(seed=-1))],
        "start_turn.options.seed",
        "from 0",
        id="own-options",
    ),
    # With the setup: nobody should have to ask first.
    pytest.param(
        [setup(options=options_pb2.GenerationOptions(seed=-1))], "setup.options.seed", "from 0", id="options-at-once"
    ),
    pytest.param(
        [setup(options=options_pb2.GenerationOptions(max_output_token_count=4096))],
        "setup.options.max_output_token_count",
        "to 4064",
        id="more-tokens-than-ever-fit",
    ),
    pytest.param(
        [setup(options=options_pb2.GenerationOptions(drafts=options_pb2.DraftOptions(mode=7)))],  # type: ignore[arg-type]
        "setup.options.drafts.mode",
        "DRAFT_MODE_ON",
        id="draft-mode-at-once",
    ),
]


@pytest.mark.parametrize(("requests", "field", "says"), WRONG)
async def test_a_wrong_message_ends_the_stream(tmp_path: Path, requests: list[Request], field: str, says: str) -> None:
    async with conversing(tmp_path, {}) as (_, stream):
        await stream.send(*requests)
        failure = await stream.failure()
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    [violation] = failure.violations
    assert violation.field == field
    assert says in violation.description


async def test_an_image_ends_the_stream(tmp_path: Path) -> None:
    picture = generation_pb2.TurnStart(parts=[prompt_pb2.ContentPart(image=b"\x89PNG")])
    async with conversing(tmp_path, {}) as (_, stream):
        await stream.send(setup(), Request(start_turn=picture))
        failure = await stream.failure()
    assert (failure.code, failure.metadata) == (grpc.StatusCode.UNIMPLEMENTED, {"field": "start_turn.parts[0].image"})


async def test_text_that_is_no_utf8_ends_the_stream(tmp_path: Path) -> None:
    """Catches a message inside a stream that is read otherwise than a single one."""
    raw = turn("@@@@").SerializeToString().replace(b"@@@@", b"\xff\xfe\xfd\xfc")
    async with serving(tmp_path) as harness:
        converse = harness.channel.stream_stream(
            "/diffusiongemma.v1.GenerationService/Converse",
            request_serializer=bytes,
            response_deserializer=Response.FromString,
        )
        stream = Stream(converse(iter([setup().SerializeToString(), raw]), timeout=30))
        failure = await stream.failure()
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.violations[0].field == "start_turn.parts[0].text"


async def test_a_wrong_message_stops_the_open_turn(tmp_path: Path) -> None:
    """The engine is free after the call in progress, though the turn itself was good."""
    async with conversing(tmp_path, {"long": LONG}) as (harness, stream):
        with harness.engine.hold("denoise", 2) as gate:
            await stream.send(setup(), turn("long"))
            await reached(gate)
            await stream.send(setup())
            handle = await harness.runner.submitted()
            await handle.wait_cancelled()
        failure = await stream.failure()
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert harness.engine.calls["denoise"] == 2
        assert "committed" not in by_turn(stream.responses)[0]


async def test_too_many_waiting_turns_are_refused(tmp_path: Path) -> None:
    async with conversing(tmp_path, {}) as (harness, stream):
        with harness.engine.hold("encode", 1) as gate:
            await stream.send(setup(), turn("open"))
            await reached(gate)
            await stream.send(*(turn(f"waiting {index}") for index in range(MAX_WAITING_TURNS + 1)))
            handle = await harness.runner.submitted()
            await handle.wait_cancelled()
        failure = await stream.failure()
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


async def test_cancelled_turns_make_room_for_others(tmp_path: Path) -> None:
    """Catches a limit that counts what nobody waits for; the cancelled ones still end in their order."""
    async with conversing(tmp_path, {}) as (harness, stream):
        with harness.engine.hold("encode", 1) as gate:
            await stream.send(setup(), turn("open"))
            await reached(gate)
            await stream.send(*(turn(f"withdrawn {index}") for index in range(MAX_WAITING_TURNS)))
            await stream.send(*(cancel(1 + index) for index in range(MAX_WAITING_TURNS)))
            await stream.send(*(turn(f"waiting {index}") for index in range(MAX_WAITING_TURNS)))
        kinds = by_turn(await stream.rest())
    assert [kinds[1 + index] for index in range(MAX_WAITING_TURNS)] == [["cancelled"]] * MAX_WAITING_TURNS
    assert [kinds[1 + MAX_WAITING_TURNS + index][-1] for index in range(MAX_WAITING_TURNS)] == ["finished"] * 8


async def test_too_many_cancelled_turns_are_refused(tmp_path: Path) -> None:
    """Catches a client that starts and cancels without reading, and grows the server for ever."""
    async with conversing(tmp_path, {}) as (harness, stream):
        with harness.engine.hold("encode", 1) as gate:
            await stream.send(setup(), turn("open"))
            await reached(gate)
            for index in range(1, MAX_CANCELLED_TURNS + 2):
                await stream.send(turn("withdrawn"), cancel(index))
            handle = await harness.runner.submitted()
            await handle.wait_cancelled()
        failure = await stream.failure()
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


async def test_messages_are_looked_at_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches work that grows with a message and holds up every stream: 4 MB of tiny parts take seconds to go through,
    and so do a quarter of a million committed tokens with many stop strings."""
    threads: dict[str, str] = {}

    def note(place: Any, name: str) -> None:
        act = getattr(place, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            threads[name] = threading.current_thread().name
            return act(*arguments, **named)

        monkeypatch.setattr(place, name, noted)

    note(service.conversation, "messages_of")
    note(service.conversation, "text_of")
    note(Runner, "prepare")
    note(Served, "committed_text")
    async with conversing(tmp_path, {}) as (_, stream):
        await stream.send(setup(message("system", "be brief")))
        many = [prompt_pb2.ContentPart(text="x")] * (FEW_PARTS + 1)
        await stream.send(Request(start_turn=generation_pb2.TurnStart(parts=many)))
        await stream.rest()
    names = ("messages_of", "text_of", "prepare", "committed_text")
    assert threads == dict.fromkeys(names, "short-prompts_0")


async def test_what_conversations_hold_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches histories and waiting turns that pile up over many streams, and bytes that stay counted when one ends."""
    monkeypatch.setattr("service.held_texts.CLIENT_BYTES", 8000)
    history = [message("user", "x" * 2000), message("model", "x" * 2000)]
    async with serving(tmp_path) as harness:
        first, second = (Stream(harness.generation.Converse(timeout=60)) for _ in range(2))
        await first.send(setup(*history), turn("hello"))
        await first.until("finished")
        await second.send(setup(*history))
        failure = await second.failure()
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_LIMIT_REACHED")
        assert failure.metadata == {"limit": "conversation_bytes", "value": "8000"}
        assert failure.retry_after is not None
        await first.rest()
        third = Stream(harness.generation.Converse(timeout=60))
        await third.send(setup(*history), turn("hello"))
        await third.until("finished")
        await third.rest()


async def test_answers_are_held_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches histories that grow by what the server itself has said, which nobody counts; the answer is still told."""
    monkeypatch.setattr("service.held_texts.CLIENT_BYTES", 2000)
    async with conversing(tmp_path, {"go": "x" * 1500}) as (_, stream):
        await stream.send(setup(), turn("go"))
        await stream.until("finished")
        await stream.send(turn("y" * 600))
        failure = await stream.failure()
    assert failure.metadata == {"limit": "conversation_bytes", "value": "2000"}


@pytest.mark.parametrize("whose", ["CLIENT", "ALL"])
async def test_open_conversations_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """Each may hold a message that came in part; one that ends makes room for the next."""
    monkeypatch.setattr(f"service.held_texts.{whose}_CONVERSATIONS", 1)
    async with serving(tmp_path) as harness:
        first = Stream(harness.generation.Converse(timeout=60))
        await first.send(setup(), turn("hello"))
        await first.until("finished")
        second = Stream(harness.generation.Converse(timeout=60))
        failure = await second.failure()
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.retry_after is not None
        await first.rest()
        third = Stream(harness.generation.Converse(timeout=60))
        await third.send(setup(), turn("hello"))
        await third.until("finished")
        await third.rest()


async def test_what_was_cancelled_is_no_longer_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches turns that count for the whole life of a stream though their text was let go."""
    monkeypatch.setattr("service.held_texts.CLIENT_BYTES", 8000)
    async with conversing(tmp_path, {}) as (harness, stream):
        with harness.engine.hold("encode", 1) as gate:
            await stream.send(setup(), turn("open"))
            await reached(gate)
            await stream.send(turn("x" * 3500), turn("x" * 3500), cancel(1), cancel(2))
            handle = await harness.runner.submitted()
            await stream.send(cancel(0))
            await handle.wait_cancelled()
        while (response := await stream.read()) is None or response.turn_index < 2:
            pass
        await stream.send(turn("y" * 3500))
        assert by_turn(await stream.rest())[3][-1] == "finished"


@pytest.mark.parametrize("way", ["cancel", "disconnect"])
async def test_a_client_that_goes_frees_the_engine(tmp_path: Path, way: str) -> None:
    async with conversing(tmp_path, {"long": LONG}) as (harness, stream):
        with harness.engine.hold("denoise", 2) as gate:
            await stream.send(setup(), turn("long"), turn("next"))
            await reached(gate)
            handle = await harness.runner.submitted()
            if way == "cancel":
                stream.call.cancel()
            else:
                await harness.channel.close()
            await handle.wait_cancelled()
        await blocking_drain(harness)
        assert harness.engine.calls["denoise"] == 2


async def blocking_drain(harness: Harness) -> None:
    """Wait until the engine has nothing left to do."""
    assert await asyncio.to_thread(harness.runner.drain, 30)


async def test_a_long_conversation_reaches_its_end_with_a_sentence(tmp_path: Path) -> None:
    """A history that outgrows the context is refused with its length; what was answered before stands."""
    async with conversing(tmp_path, {}) as (_, stream):
        await stream.send(setup())
        text = "x" * 1000  # answered with itself: 2000 tokens a turn, of 4096
        failure = None
        for _ in range(3):
            await stream.send(turn(text))
            try:
                await stream.until("finished")
            except grpc.aio.AioRpcError as error:
                failure = CallFailed.of(error)
                break
    assert failure is not None
    assert failure.violations[0].field == "start_turn.parts"
    assert by_turn(stream.responses)[1][-1] == "finished"
