"""Bad input over a real socket: a status whose details name field and limit, and an engine that never hears of it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from diffusiongemma.v1 import generation_pb2, model_pb2, options_pb2, prompt_pb2
from runtime.scheduler import Limits
from service.transport import HARD_MESSAGE_BYTES, MAX_MESSAGE_BYTES
from tests.service.support import Harness, failure_of, finished, message, reached, request, serving, until_failure

Request = generation_pb2.GenerateRequest
Code = grpc.StatusCode


def with_options(**fields: Any) -> Request:
    return request("hello", options=options_pb2.GenerationOptions(**fields))


def with_diffusion(**fields: Any) -> Request:
    return with_options(diffusion=options_pb2.DiffusionOptions(**fields))


def with_messages(*messages: prompt_pb2.Message) -> Request:
    return Request(conversation=prompt_pb2.Conversation(messages=messages))


def with_ids(*ids: int) -> Request:
    return Request(token_ids=prompt_pb2.TokenIds(ids=ids))


def with_draft_interval(seconds: int, nanos: int) -> Request:
    made = with_options(drafts=options_pb2.DraftOptions(mode=options_pb2.DRAFT_MODE_ON))
    made.options.drafts.min_draft_interval.seconds = seconds
    made.options.drafts.min_draft_interval.nanos = nanos
    return made


def with_role(role: int) -> Request:
    made = with_messages(message("user", "hello"))
    made.conversation.messages[0].role = role  # type: ignore[assignment]
    return made


def with_draft_mode(mode: int) -> Request:
    made = with_options()
    made.options.drafts.mode = mode  # type: ignore[assignment]
    return made


IMAGE = prompt_pb2.ContentPart(image=b"\x89PNG")
USER = prompt_pb2.ROLE_USER

WRONG: list[Any] = [
    # request, field, what the description must say
    pytest.param(Request(), "prompt", "missing", id="no-prompt"),
    pytest.param(with_messages(), "conversation.messages", "at least", id="no-message"),
    pytest.param(
        with_messages(prompt_pb2.Message(role=USER)), "conversation.messages[0].parts", "one part", id="no-part"
    ),
    pytest.param(
        with_messages(prompt_pb2.Message(role=USER, parts=[prompt_pb2.ContentPart()])),
        "conversation.messages[0].parts[0]",
        "no content",
        id="empty-part",
    ),
    pytest.param(
        with_messages(message("user", "")), "conversation.messages[0].parts[0]", "no content", id="empty-text"
    ),
    pytest.param(with_ids(), "token_ids.ids", "at least one", id="no-ids"),
    pytest.param(with_ids(5, 512), "token_ids.ids[1]", "0 to 511", id="id-beyond-the-vocabulary"),
    pytest.param(with_ids(5, -1), "token_ids.ids[1]", "0 to 511", id="negative-id"),
    pytest.param(with_ids(*[5] * 4065), "token_ids", "4064", id="prompt-one-token-too-long"),
    pytest.param(request("x" * 9000), "conversation", "4064", id="conversation-too-long"),
    pytest.param(with_role(0), "conversation.messages[0].role", "ROLE_USER", id="role-unspecified"),
    pytest.param(with_role(77), "conversation.messages[0].role", "ROLE_USER", id="role-unknown"),
    pytest.param(
        with_messages(message("user", "a"), message("user", "b")),
        "conversation.messages[1].role",
        "user",
        id="two-users",
    ),
    pytest.param(with_messages(message("model", "a")), "conversation.messages[0].role", "follow", id="model-first"),
    pytest.param(
        with_messages(message("user", "a"), message("system", "b"), message("user", "c")),
        "conversation.messages[1].role",
        "first",
        id="system-inside",
    ),
    pytest.param(
        with_messages(message("user", "a"), message("model", "b")),
        "conversation.messages[1].role",
        "end",
        id="model-last",
    ),
    pytest.param(with_options(max_output_token_count=0), "options.max_output_token_count", "from 1", id="no-tokens"),
    pytest.param(
        with_options(max_output_token_count=-5), "options.max_output_token_count", "from 1", id="minus-tokens"
    ),
    pytest.param(
        with_options(max_output_token_count=5000), "options.max_output_token_count", "to 40", id="too-many-tokens"
    ),
    pytest.param(with_options(seed=-1), "options.seed", "from 0", id="negative-seed"),
    pytest.param(
        with_diffusion(max_denoising_step_count=0), "options.diffusion.max_denoising_step_count", "1 to", id="0-steps"
    ),
    pytest.param(
        with_diffusion(max_denoising_step_count=257),
        "options.diffusion.max_denoising_step_count",
        "256",
        id="257-steps",
    ),
    pytest.param(with_diffusion(entropy_bound=math.nan), "options.diffusion.entropy_bound", "finite", id="nan-bound"),
    pytest.param(
        with_diffusion(entropy_bound=math.inf), "options.diffusion.entropy_bound", "finite", id="infinite-bound"
    ),
    pytest.param(
        with_diffusion(entropy_bound=-0.1), "options.diffusion.entropy_bound", "at least 0", id="negative-bound"
    ),
    pytest.param(with_diffusion(temperature_min=0.0), "options.diffusion.temperature_min", "0.001", id="cold"),
    pytest.param(
        with_diffusion(temperature_max=math.nan), "options.diffusion.temperature_max", "1000", id="nan-temperature"
    ),
    pytest.param(
        with_diffusion(temperature_min=0.9), "options.diffusion.temperature_min", "0.8", id="schedule-upside-down"
    ),
    pytest.param(
        with_diffusion(stability_threshold=-1), "options.diffusion.stability_threshold", "from 0", id="stability"
    ),
    pytest.param(
        with_diffusion(confidence_threshold=-math.inf),
        "options.diffusion.confidence_threshold",
        "finite",
        id="confidence",
    ),
    pytest.param(with_options(stop_sequences=["a", ""]), "options.stop_sequences[1]", "from 1", id="empty-stop"),
    pytest.param(with_options(stop_sequences=["a" * 257]), "options.stop_sequences[0]", "256", id="long-stop"),
    pytest.param(with_options(stop_sequences=["a"] * 17), "options.stop_sequences", "at most 16", id="many-stops"),
    pytest.param(with_options(priority=7), "options.priority", "PRIORITY_BATCH", id="priority-unknown"),
    pytest.param(with_draft_mode(9), "options.drafts.mode", "DRAFT_MODE_ON", id="draft-mode-unknown"),
    pytest.param(with_draft_interval(-1, 0), "options.drafts.min_draft_interval", "from 0", id="negative-interval"),
    # More than Duration allows, though its field holds it: echoed in `started` it would overflow.
    pytest.param(with_draft_interval(2**63 - 1, 0), "options.drafts.min_draft_interval", "to 3", id="endless-interval"),
    pytest.param(with_draft_interval(0, 10**9), "options.drafts.min_draft_interval", "10^9", id="too-many-nanoseconds"),
]


@pytest.mark.parametrize(("wrong", "field", "says"), WRONG)
async def test_a_wrong_value_is_named(tmp_path: Path, wrong: Request, field: str, says: str) -> None:
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.generation.Generate(wrong, timeout=30))
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert field in [violation.field for violation in failure.violations]
        assert says in next(violation.description for violation in failure.violations if violation.field == field)
        assert field in failure.message
        assert harness.engine.rows == []


async def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    wrong = with_options(seed=-1, max_output_token_count=0, diffusion=options_pb2.DiffusionOptions(entropy_bound=-1))
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.generation.Generate(wrong, timeout=30))
    fields = {violation.field for violation in failure.violations}
    assert fields == {"options.seed", "options.max_output_token_count", "options.diffusion.entropy_bound"}


async def test_an_image_is_unimplemented(tmp_path: Path) -> None:
    picture = prompt_pb2.Message(role=USER, parts=[prompt_pb2.ContentPart(text="what is this?"), IMAGE])
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.generation.Generate(with_messages(picture), timeout=30))
        assert harness.engine.rows == []
    assert (failure.code, failure.reason) == (Code.UNIMPLEMENTED, "UNSUPPORTED_REQUEST")
    assert failure.metadata == {"field": "conversation.messages[0].parts[1].image"}


CALLS: list[Any] = [
    pytest.param(lambda harness: harness.generation.Generate(request("x", model="gemma"), timeout=30), id="generate"),
    pytest.param(
        lambda harness: harness.generation.CountTokens(
            generation_pb2.CountTokensRequest(model="gemma", token_ids=prompt_pb2.TokenIds(ids=[1])), timeout=30
        ),
        id="count-tokens",
    ),
    pytest.param(
        lambda harness: harness.models.GetModel(model_pb2.GetModelRequest(model="gemma"), timeout=30), id="get-model"
    ),
    pytest.param(
        lambda harness: harness.generation.Converse(
            iter([generation_pb2.ConverseRequest(setup=generation_pb2.ConversationSetup(model="gemma"))]), timeout=30
        ),
        id="converse",
    ),
]


@pytest.mark.parametrize("call", CALLS)
async def test_an_unknown_model_is_not_found(tmp_path: Path, call: Callable[[Harness], Any]) -> None:
    async with serving(tmp_path) as harness:
        failure = await failure_of(call(harness))
    assert (failure.code, failure.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert failure.metadata == {"model": "gemma", "served": "fake"}


@asynccontextmanager
async def raw_method(harness: Harness, name: str) -> AsyncIterator[Any]:
    """A method that sends bytes as they are."""
    yield harness.channel.unary_stream(
        f"/diffusiongemma.v1.GenerationService/{name}", request_serializer=bytes, response_deserializer=bytes
    )


async def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    raw = request("@@@@").SerializeToString().replace(b"@@@@", b"\xed\xa0\x80a")  # a lone surrogate
    async with serving(tmp_path) as harness, raw_method(harness, "Generate") as generate:
        failure = await failure_of(generate(raw, timeout=30))
        assert harness.engine.rows == []
    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    [violation] = failure.violations
    assert violation.field == "conversation.messages[0].parts[0].text"
    assert "UTF-8" in violation.description


async def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness, raw_method(harness, "Generate") as generate:
        failure = await failure_of(generate(b"\x12\x7fnonsense", timeout=30))
    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_message_over_the_limit_is_refused_with_the_limit(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.generation.Generate(request("x" * MAX_MESSAGE_BYTES), timeout=30))
        assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert failure.metadata["limit"] == str(MAX_MESSAGE_BYTES)
        # A message far beyond is refused by gRPC from its header; the server goes on.
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(harness.address, options=options) as channel:
            generate = channel.unary_stream("/diffusiongemma.v1.GenerationService/Generate", request_serializer=bytes)
            failure = await failure_of(generate(b"\0" * (HARD_MESSAGE_BYTES + 1), timeout=30))
        assert failure.code is Code.RESOURCE_EXHAUSTED
        assert await finished(harness.generation.Generate(request("hello"), timeout=30))


async def test_a_long_prompt_is_refused_with_many_violations_capped(tmp_path: Path) -> None:
    """Catches details that outgrow the trailers, which would turn INVALID_ARGUMENT into RESOURCE_EXHAUSTED."""
    many = with_messages(*[message("system", "s")] * 400)
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.generation.Generate(many, timeout=30))
    assert failure.code is Code.INVALID_ARGUMENT
    assert failure.violations[-1].description.startswith("and ")


async def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_active=1, max_waiting=1)) as harness:
        with harness.engine.hold("encode", 1) as gate:
            first = harness.generation.Generate(request("one"), timeout=30)
            await reached(gate)
            second = harness.generation.Generate(request("two"), timeout=30)
            await harness.runner.submitted()
            await harness.runner.submitted()
            failure = await failure_of(harness.generation.Generate(request("three"), timeout=30))
        assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert failure.retry_after is not None
        assert failure.retry_after > 0
        for call in (first, second):
            assert await finished(call)


async def test_a_fault_of_the_engine_tells_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets a correlation id that the log has too; the text stays in the log; the next request is served."""
    async with serving(tmp_path) as harness:
        harness.engine.fail("denoise", 1, RuntimeError("secret of the engine"))
        responses, failure = await until_failure(harness.generation.Generate(request("hello"), timeout=30))
        assert [response.WhichOneof("event") for response in responses] == ["started"]
        assert (failure.code, failure.reason) == (Code.INTERNAL, "ENGINE_FAULT")
        assert "secret" not in failure.message
        assert failure.metadata["correlation_id"] in caplog.text
        assert await finished(harness.generation.Generate(request("hello"), timeout=30))


async def test_a_bug_tells_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception from outside the tree, in a stream and in a single answer."""

    def broken(*_: object) -> None:
        raise ValueError("secret of the service")

    async with serving(tmp_path) as harness:
        monkeypatch.setattr("service.served.Served.prompt_ids", broken)
        stream = await failure_of(harness.generation.Generate(request("hello"), timeout=30))
        single = await failure_of(harness.generation.CountTokens(generation_pb2.CountTokensRequest(), timeout=30))
        for failure in (stream, single):
            assert (failure.code, failure.reason) == (Code.INTERNAL, "INTERNAL")
            assert "secret" not in failure.message
            assert failure.metadata["correlation_id"] in str(
                [vars(record).get("fields") for record in caplog.records if record.levelname == "ERROR"]
            )


async def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness, raw_method(harness, "Telepathy") as method:
        failure = await failure_of(method(b"", timeout=30))
    assert failure.code is Code.UNIMPLEMENTED
