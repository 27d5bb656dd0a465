"""What stands beside the streams: the model, counts, health, reflection, channelz, and limits of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from diffusiongemma.v1 import generation_pb2, model_pb2
from runtime.engines.fake import FACTS
from service.authentication import Authenticator
from service.interceptor import StatusInterceptor
from service.server import SERVICES
from service.transport import MAX_MESSAGE_BYTES, OPTIONS
from tests.service.support import CONTROL, DEFAULTS, END, failure_of, finished, message, request, serving


async def test_the_model_is_told_with_its_limits(tmp_path: Path) -> None:
    async with serving(tmp_path, min_draft_interval=0.05) as harness:
        model = (await harness.models.GetModel(model_pb2.GetModelRequest(), timeout=30)).model
    assert (model.name, model.precision, model.engine) == ("fake", "float32", "fake")
    assert (model.canvas_length, model.vocabulary_size) == (FACTS.canvas_length, FACTS.vocab_size)
    assert list(model.end_token_ids) == [END, CONTROL["<turn|>"]]
    assert model.max_context_token_count == FACTS.max_position
    assert model.max_message_byte_count == MAX_MESSAGE_BYTES
    assert model.min_draft_interval.ToMilliseconds() == 50
    assert not model.vision
    assert not model.default_options.HasField("seed")
    assert model.default_options.diffusion.entropy_bound == DEFAULTS.entropy_bound
    assert model.default_options.max_output_token_count == FACTS.max_position - FACTS.canvas_length


async def test_counting_and_generating_agree(tmp_path: Path) -> None:
    """The count is that of the prompt that a generation starts with."""
    conversation = request("Grüße, 😀").conversation
    conversation.messages.insert(0, message("system", "Be brief."))
    async with serving(tmp_path) as harness:
        counted = await harness.generation.CountTokens(
            generation_pb2.CountTokensRequest(conversation=conversation), timeout=30
        )
        call = harness.generation.Generate(generation_pb2.GenerateRequest(conversation=conversation), timeout=30)
        started = (await call.read()).started
    assert counted.token_count == started.prompt_token_count > len("Be brief.Grüße, ")


async def test_a_prompt_beyond_the_context_is_counted(tmp_path: Path) -> None:
    """So that a client learns how much to leave out."""
    async with serving(tmp_path) as harness:
        wanted = generation_pb2.CountTokensRequest(conversation=request("x" * 9000).conversation)
        assert (await harness.generation.CountTokens(wanted, timeout=30)).token_count > 9000


async def test_an_empty_answer_can_be_part_of_the_history(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        wanted = request("and now?")
        first, empty = message("user", "say nothing"), message("model", "")
        del empty.parts[:]
        wanted.conversation.messages.insert(0, first)
        wanted.conversation.messages.insert(1, empty)
        assert await finished(harness.generation.Generate(wanted, timeout=30))


async def test_health_by_service(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        stub: Any = health_pb2_grpc.HealthStub(harness.channel)
        for service in ("", *SERVICES):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        failure = await failure_of(stub.Check(health_pb2.HealthCheckRequest(service="nonsense"), timeout=30))
        assert failure.code is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_every_service(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30)
        [answer] = [response async for response in call]
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == {
        *SERVICES,
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_channelz_counts_calls(tmp_path: Path) -> None:
    """A call is counted a moment after its client has its status, and the questions are calls themselves, the last of
    which may not be counted yet: asked until there are more than those."""
    async with serving(tmp_path) as harness:
        for _ in range(5):
            assert await finished(harness.generation.Generate(request("hello"), timeout=30))
        stub: Any = channelz_pb2_grpc.ChannelzStub(harness.channel)
        counted = asked = 0
        while counted < asked + 3:
            servers = (await stub.GetServers(channelz_pb2.GetServersRequest(start_server_id=0), timeout=30)).server
            counted = sum(server.data.calls_succeeded for server in servers)
            asked += 1


async def test_metadata_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        metadata = (("x-long", "v" * 20_000),)
        call = harness.generation.Generate(request("hello"), timeout=30, metadata=metadata)
        assert (await failure_of(call)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await finished(harness.generation.Generate(request("hello"), timeout=30))


async def test_a_connection_has_an_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that stands ends well on the old connection; the next call opens another one, and nobody notices."""
    young = [option for option in OPTIONS if option[0] != "grpc.max_connection_age_ms"]
    monkeypatch.setattr("service.server.OPTIONS", (*young, ("grpc.max_connection_age_ms", 200)))
    async with serving(tmp_path) as harness:
        with harness.engine.hold("denoise", 2):
            call = asyncio.create_task(finished(harness.generation.Generate(request("hello"), timeout=60)))
            await harness.runner.submitted()
            while (state := harness.channel.get_state()) is not grpc.ChannelConnectivity.IDLE:
                await asyncio.wait_for(harness.channel.wait_for_state_change(state), 30)
            assert (await harness.models.GetModel(model_pb2.GetModelRequest(), timeout=30)).model.name == "fake"
        assert await call


class Handlers:
    """One handler of each shape, to see what the interceptor makes of their ends."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def single(self, request: bytes, context: Any) -> bytes:
        if request == b"abort":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as it is")
        raise KeyError("secret")

    async def generator(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            if request == b"fail":
                raise KeyError("secret")
            while True:
                yield b"x" * 65536
        finally:
            self.closed.set()

    async def gathered(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])


@pytest.fixture
async def guarded() -> AsyncIterator[tuple[Handlers, grpc.aio.Channel]]:
    """The handlers behind the interceptor on a real socket."""
    handlers = Handlers()
    server = grpc.aio.server(interceptors=[StatusInterceptor(Authenticator(), MAX_MESSAGE_BYTES)])
    methods: dict[str, Any] = {
        "single": grpc.unary_unary_rpc_method_handler(handlers.single),
        "generator": grpc.unary_stream_rpc_method_handler(handlers.generator),
        "gathered": grpc.stream_unary_rpc_method_handler(handlers.gathered),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield handlers, channel
    await server.stop(None)


async def test_an_abort_passes_as_it_is(guarded: tuple[Handlers, grpc.aio.Channel]) -> None:
    """Catches an abort that is caught and aborted once more, which gRPC answers with an error of its own."""
    failure = await failure_of(guarded[1].unary_unary("/test/single")(b"abort", timeout=30))
    assert (failure.code, failure.message) == (grpc.StatusCode.FAILED_PRECONDITION, "as it is")


async def test_a_fault_is_told_without_its_text(guarded: tuple[Handlers, grpc.aio.Channel]) -> None:
    failure = await failure_of(guarded[1].unary_unary("/test/single")(b"", timeout=30))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in failure.message
    call = guarded[1].unary_stream("/test/generator")(b"fail", timeout=30)
    assert await call.read() == b"first"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())


async def test_a_generator_is_closed_when_its_call_ends(
    guarded: tuple[Handlers, grpc.aio.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a handler that is left to the garbage collector, and a client's going that is logged as a fault."""
    handlers, channel = guarded
    call = channel.unary_stream("/test/generator")(b"", timeout=30)
    assert await call.read() == b"first"
    call.cancel()
    await asyncio.wait_for(handlers.closed.wait(), 30)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_stream_of_requests_passes(guarded: tuple[Handlers, grpc.aio.Channel]) -> None:
    assert await guarded[1].stream_unary("/test/gathered")(iter([b"a", b"b"]), timeout=30) == b"ab"
