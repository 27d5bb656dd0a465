"""A server over the fake engine, on a real socket, for the tests of the service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
from tokenizers import Tokenizer, decoders, models, normalizers

from diffusiongemma.v1 import generation_pb2, generation_pb2_grpc, model_pb2_grpc, options_pb2, prompt_pb2
from runtime.bundle import (
    CHAT_TEMPLATE,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    Bundle,
    FileRecord,
    GenerationDefaults,
    Manifest,
    ModelFacts,
    sha256,
)
from runtime.engines.fake import FACTS, POOL, FakeEngine
from runtime.engines.protocol import PoolGeometry
from runtime.errors import DgemmaError
from runtime.events import Draft, Event
from runtime.generation import Generation
from runtime.job import Prepared
from runtime.prompt import PromptBuilder
from runtime.request import GenerationRequest
from runtime.runner import Handle, Runner, Sink
from runtime.scheduler import Limits
from runtime.vocabulary import Vocabulary
from service.client import CallFailed
from service.lifetime import OPEN
from service.mailbox import Mailbox
from service.security import Security, SecuritySettings
from service.served import Served
from service.server import Server
from service.transport import MAX_MESSAGE_BYTES

END, BOS = 1, 2
CONTROL = {"<pad>": 0, "<eos>": END, "<bos>": BOS, "<|turn>": 3, "<turn|>": 4}
FIRST_BYTE, FIRST_CHARACTER = 16, 300
CHARACTERS = "\n▁!\"'(),-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Characters with a token of their own; others are spelled in bytes."""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message.role }}\n{{ message.content }}<turn|>\n{% endfor %}"
    "<|turn>model\n"
)
DEFAULTS = GenerationDefaults(
    max_denoising_steps=8,
    entropy_bound=0.1,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=0.005,
    end_token_ids=(END, 4),
    pad_token_id=0,
    bos_token_id=BOS,
)


def tokenizer() -> Tokenizer:
    """Characters and bytes as tokens, in Gemma's manner."""
    vocabulary = {**CONTROL, **{f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}}
    vocabulary |= {character: FIRST_CHARACTER + index for index, character in enumerate(CHARACTERS)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(list(CONTROL))
    return made


def write_bundle(directory: Path, facts: ModelFacts = FACTS) -> Bundle:
    """A bundle without a graph: enough for prompts and facts."""
    tokenizer().save(str(directory / TOKENIZER))
    (directory / CHAT_TEMPLATE).write_text(TEMPLATE)
    files = {
        name: FileRecord((directory / name).stat().st_size, sha256(directory / name))
        for name in (TOKENIZER, CHAT_TEMPLATE)
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=facts,
        precision="float32",
        generation=DEFAULTS,
        graph_inputs=(),
        graph_outputs=(),
        operator_versions={},
        expert_body="loop",
        source="fake",
        source_sha256={},
        exporter={},
        files=files,
    )
    (directory / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return Bundle(directory)


class PacedMailbox(Mailbox):
    """A mailbox that holds the engine until each draft has been taken, so that a test sees every one of them."""

    def __init__(self, min_draft_interval: float | None = None) -> None:
        super().__init__(min_draft_interval)
        self._taken = threading.Event()

    def put(self, outcome: Event | DgemmaError) -> None:
        super().put(outcome)
        if isinstance(outcome, Draft):
            self._taken.wait(10)
            self._taken.clear()

    async def get(self) -> Event:
        event = await super().get()
        if isinstance(event, Draft):
            self._taken.set()
        return event


@dataclass(eq=False)
class Scripts:
    """Answers by what the user said last; anything else is answered with itself."""

    vocabulary: Vocabulary
    answers: Mapping[str, str | Sequence[int]]

    def __call__(self, prompt: tuple[int, ...]) -> Sequence[int]:
        spelled = b"".join(
            self.vocabulary.token_bytes(token) or self.vocabulary.spelling(token).encode() for token in prompt
        ).decode(errors="replace")
        asked = spelled.rpartition("<|turn>user\n")[2].partition("<turn|>")[0]
        answer = self.answers.get(asked, asked)
        return self._encode(answer) if isinstance(answer, str) else answer

    @cache  # noqa: B019  a test's script lives as long as its test
    def _encode(self, answer: str) -> Sequence[int]:
        return self.vocabulary.encode(answer)


class WatchedHandle(Handle):
    """A handle whose cancellation a test can wait for: every handler cancels when it is left."""

    def __init__(self, handle: Handle) -> None:
        self._handle, self._cancelled = handle, asyncio.Event()

    def cancel(self) -> None:
        self._handle.cancel()
        self._cancelled.set()

    def wake(self) -> None:
        self._handle.wake()

    @property
    def made_tokens(self) -> int:
        return self._handle.made_tokens

    async def wait_cancelled(self) -> None:
        """Wait until the handler has been left."""
        await asyncio.wait_for(self._cancelled.wait(), 30)


class WatchedRunner(Runner):
    """A runner whose submissions a test on the event loop can wait for."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._submissions: asyncio.Queue[WatchedHandle] = asyncio.Queue()

    def submit(
        self, request: GenerationRequest | Prepared, sink: Sink, deadline: float | None = None, **options: Any
    ) -> Handle:
        handle = WatchedHandle(super().submit(request, sink, deadline, **options))
        self._submissions.put_nowait(handle)
        return handle

    async def submitted(self) -> WatchedHandle:
        """Wait for the next request to be queued."""
        return await asyncio.wait_for(self._submissions.get(), 10)


@dataclass
class Harness:
    """A running server and what lies behind it."""

    engine: FakeEngine
    runner: WatchedRunner
    served: Served
    server: Server
    channel: grpc.aio.Channel
    vocabulary: Vocabulary

    @property
    def generation(self) -> Any:
        return self.generation_of(self.channel)

    @staticmethod
    def generation_of(channel: grpc.aio.Channel) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(channel)

    @property
    def models(self) -> Any:
        return model_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def address(self) -> str:
        return self.server.address


def make_served(
    directory: Path,
    answers: Mapping[str, str | Sequence[int]],
    *,
    facts: ModelFacts = FACTS,
    pool: PoolGeometry = POOL,
    steps: int = 3,
    limits: Limits | None = None,
    min_draft_interval: float = 0.0,
    runner_type: type[Runner] = Runner,
) -> tuple[FakeEngine, Served]:
    """The fake engine behind a started runner, ready to be served."""
    bundle = write_bundle(directory, facts)
    vocabulary = Vocabulary.load(bundle)
    engine = FakeEngine(facts, pool, answer=Scripts(vocabulary, answers), steps=steps, end_token_id=END)
    runner = runner_type(
        engine, partial(Generation, facts=facts, defaults=DEFAULTS, vocabulary=vocabulary), limits=limits
    )
    runner.start()
    return engine, Served(
        facts=facts,
        defaults=DEFAULTS,
        precision="float32",
        engine="fake",
        prompts=PromptBuilder(bundle, vocabulary),
        vocabulary=vocabulary,
        runner=runner,
        min_draft_interval=min_draft_interval,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )


@asynccontextmanager
async def serving(
    directory: Path,
    answers: Mapping[str, str | Sequence[int]] | None = None,
    *,
    channel_options: Sequence[tuple[str, int]] = (),
    security: SecuritySettings = OPEN,
    credentials: grpc.ChannelCredentials | None = None,
    **options: Any,
) -> AsyncIterator[Harness]:
    """Serve `answers` on a free port for the time of the block."""
    engine, served = make_served(directory, answers or {}, runner_type=WatchedRunner, **options)
    runner = served.runner
    assert isinstance(runner, WatchedRunner)
    server = Server("127.0.0.1:0", Security(security))
    await server.start(served)
    if credentials is None:
        channel = grpc.aio.insecure_channel(server.address, options=channel_options)
    else:
        channel = grpc.aio.secure_channel(server.address, credentials, options=channel_options)
    try:
        yield Harness(engine, runner, served, server, channel, Vocabulary.load(Bundle(directory)))
    finally:
        await channel.close()
        await server.stop(0)
        await asyncio.to_thread(served.runner.close)


def request(
    text: str, *, drafts: bool = False, options: options_pb2.GenerationOptions | None = None, **fields: Any
) -> generation_pb2.GenerateRequest:
    """A request with one user's message."""
    made = generation_pb2.GenerateRequest(options=options, **fields)
    made.conversation.messages.append(message("user", text))
    if drafts:
        made.options.drafts.mode = options_pb2.DRAFT_MODE_ON
    return made


def message(role: str, text: str) -> prompt_pb2.Message:
    return prompt_pb2.Message(
        role=prompt_pb2.Role.Value(f"ROLE_{role.upper()}"), parts=[prompt_pb2.ContentPart(text=text)]
    )


async def until_failure(call: Any) -> tuple[list[Any], CallFailed]:
    """What a call brings, and the status that then ends it."""
    brought: list[Any] = []
    try:
        if hasattr(call, "__aiter__"):
            async for response in call:
                brought.append(response)
        else:
            brought.append(await call)
    except grpc.aio.AioRpcError as error:
        return brought, CallFailed.of(error)
    raise AssertionError(f"the call went well: {brought}")


async def failure_of(call: Any) -> CallFailed:
    """The status that ends a call, which must bring nothing before it."""
    brought, failure = await until_failure(call)
    assert brought == []
    return failure


async def finished(call: Any) -> bool:
    """Whether a stream came to its end."""
    return bool([response async for response in call][-1].HasField("finished"))


async def blocking(act: Any, *arguments: Any) -> Any:
    """Run something that waits for another thread without holding up the event loop."""
    return await asyncio.to_thread(act, *arguments)


def reached(gate: Any) -> Any:
    """Await that the engine stands at a gate."""
    return blocking(gate.wait_reached)
