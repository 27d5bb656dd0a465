"""A client that goes frees the engine within one step: in every phase, however it goes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import msgspec
import pytest

from diffusiongemma.v1 import options_pb2
from runtime.engines.fake import FACTS, Call
from runtime.engines.protocol import DenoiseRow, EncodeRow, PoolGeometry
from runtime.scheduler import Limits
from service.mailbox import Mailbox
from tests.service.support import Harness, failure_of, finished, reached, request, serving, until_failure

ANSWER = "an answer of several blocks, each one of thirty-two tokens, so that there is always more to come. " * 2
PROMPT = "a prompt that is longer than two chunks of the encoder, " * 12
"""672 tokens and the template: three chunks."""

Way = Literal["cancel", "deadline", "disconnect"]


@dataclass(frozen=True)
class Phase:
    """Where the engine is held, and by whose request."""

    kind: Call
    call: int
    queued: bool = False
    """The client under test waits behind another one, whose call is held."""


PHASES = [
    pytest.param(Phase("encode", 1, queued=True), id="queued"),
    pytest.param(Phase("encode", 2), id="prefill"),
    pytest.param(Phase("denoise", 2), id="denoising-the-first-block"),
    pytest.param(Phase("encode", 4), id="encoding-a-committed-block"),
    pytest.param(Phase("denoise", 7), id="denoising-a-later-block"),
]


async def end(way: Way, call: Any, channel: grpc.aio.Channel) -> None:
    """Let the client go, and see what it is told."""
    if way == "cancel":
        call.cancel()
    elif way == "disconnect":
        await channel.close()
    code = grpc.StatusCode.DEADLINE_EXCEEDED if way == "deadline" else grpc.StatusCode.CANCELLED
    assert await call.code() is code


def work_of(harness: Harness) -> tuple[int, int]:
    """Encode and denoise calls so far."""
    return harness.engine.calls["encode"], harness.engine.calls["denoise"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", ["cancel", "deadline", "disconnect"])
async def test_the_engine_is_free_after_the_call_in_progress(tmp_path: Path, way: Way, phase: Phase) -> None:
    """The held call is the last that is made for a client that has gone; the one behind it gets all of the rest."""
    async with (
        serving(tmp_path, {PROMPT: ANSWER}, limits=Limits(max_active=1, max_waiting=4)) as harness,
        grpc.aio.insecure_channel(harness.address) as channel,
    ):
        with harness.engine.hold(phase.kind, phase.call) as gate:
            if phase.queued:
                other = harness.generation.Generate(request("other"), timeout=60)
                await reached(gate)
                await harness.runner.submitted()  # by the other one
            call = Harness.generation_of(channel).Generate(
                request(PROMPT, drafts=True), timeout=2.0 if way == "deadline" else 60
            )
            handle = await harness.runner.submitted()
            if not phase.queued:
                await reached(gate)
            await end(way, call, channel)
            await handle.wait_cancelled()
            before = work_of(harness)
        if phase.queued:
            assert await finished(other)
            before = before[0], before[1] + 4
        assert await finished(harness.generation.Generate(request("probe"), timeout=60))
        # The probe: one chunk, and one block of four steps.
        assert work_of(harness) == (before[0] + 1, before[1] + 4)
        queued_rows = [row for row in harness.engine.rows if isinstance(row, EncodeRow) and len(row.token_ids) > 200]
        assert not (phase.queued and queued_rows)
        assert harness.runner.load.active == harness.runner.load.waiting == 0


WIDE = msgspec.structs.replace(FACTS, canvas_length=256, max_position=1 << 14)
WIDE_POOL = PoolGeometry(page_size=256, sliding_pages=64, full_pages=512, canvas_slots=4)
SMALL_WINDOWS = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
"""A client that takes little ahead of its reader, so that the server is soon blocked."""


@pytest.mark.parametrize("way", ["cancel", "deadline", "disconnect"])
async def test_a_handler_blocked_by_a_slow_reader_notices(
    tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client reads one event of many; the server's write is stuck when it goes, with the engine at work.

    gRPC then ends the write with an error of its own, which is no fault and must not be logged as one.
    """
    mailboxes: list[Mailbox] = []

    def remember(interval: float | None) -> Mailbox:
        mailboxes.append(Mailbox(interval))
        return mailboxes[-1]

    monkeypatch.setattr("service.intake.Mailbox", remember)
    options: dict[str, Any] = {"facts": WIDE, "pool": WIDE_POOL, "channel_options": SMALL_WINDOWS}
    async with serving(tmp_path, {"go": "long answer " * 850}, **options) as harness:
        with harness.engine.hold("denoise", 100) as gate:  # block 25 of 40
            long = options_pb2.GenerationOptions(max_output_token_count=10_240)
            wanted = request("go", drafts=True, options=long)
            call = harness.generation.Generate(wanted, timeout=4 if way == "deadline" else 60)
            assert (await call.read()).HasField("started")
            await reached(gate)
            handle = await harness.runner.submitted()
            await end_without_reading(way, call, harness.channel)
            await handle.wait_cancelled()
        async with grpc.aio.insecure_channel(harness.address) as channel:
            assert await finished(Harness.generation_of(channel).Generate(request("probe"), timeout=60))
        assert harness.engine.calls["denoise"] == 100 + 4
        # Commits were left, so that the handler must have been in the midst of writing; and one draft at most.
        assert mailboxes[0].unread >= 1
    assert isinstance(harness.engine.rows[-1], DenoiseRow)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a generation waits for its reader, who is taken to be slow after four blocks."""
    event = threading.Event()
    ready = Mailbox.ready

    def watched(mailbox: Mailbox) -> bool:
        found = ready(mailbox)
        if not found:
            event.set()
        return found

    monkeypatch.setattr(Mailbox, "ready", watched)
    monkeypatch.setattr("service.mailbox.MAX_UNREAD", 4)
    return event


VERY_LONG = "long answer " * 1200
"""57 blocks of the wide canvas: more than the socket takes ahead."""
ALL_OF_IT = options_pb2.GenerationOptions(max_output_token_count=15_360)


async def test_a_slow_reader_loses_nothing_and_holds_up_nobody(tmp_path: Path, parked: threading.Event) -> None:
    """Its generation stops for it, others go on, and when it reads again it gets every word."""
    options: dict[str, Any] = {"facts": WIDE, "pool": WIDE_POOL, "channel_options": SMALL_WINDOWS}
    async with serving(tmp_path, {"go": VERY_LONG}, **options) as harness:
        call = harness.generation.Generate(request("go", drafts=True, options=ALL_OF_IT), timeout=100)
        assert (await call.read()).HasField("started")
        assert await asyncio.to_thread(parked.wait, 60)
        made = harness.engine.calls["denoise"]
        async with grpc.aio.insecure_channel(harness.address) as channel:
            assert await finished(Harness.generation_of(channel).Generate(request("probe"), timeout=60))
        assert harness.engine.calls["denoise"] == made + 4
        responses = []
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)
        assert "".join(response.committed.text for response in responses) == VERY_LONG
        assert responses[-1].HasField("finished")


async def test_a_reader_that_never_comes_back_is_given_up(
    tmp_path: Path, parked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed still reaches it, should it read after all; then it is told why there is no more."""
    monkeypatch.setattr("service.running.READER_PATIENCE", 0.2)
    options: dict[str, Any] = {"facts": WIDE, "pool": WIDE_POOL, "channel_options": SMALL_WINDOWS}
    async with serving(tmp_path, {"go": VERY_LONG}, **options) as harness:
        call = harness.generation.Generate(request("go", options=ALL_OF_IT), timeout=100)
        handle = await harness.runner.submitted()
        await handle.wait_cancelled()
        assert parked.is_set()
        assert await asyncio.to_thread(harness.runner.drain, 30)
        responses, failure = await until_failure(call)
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "READER_TOO_SLOW")
    text = "".join(response.committed.text for response in responses)
    assert VERY_LONG.startswith(text)
    assert len(text) >= 4 * 256


async def end_without_reading(way: Way, call: Any, channel: grpc.aio.Channel) -> None:
    if way == "cancel":
        call.cancel()
    elif way == "disconnect":
        await channel.close()


CLIENT = """
import sys
from service.client import Client
with Client(sys.argv[1]) as client:
    for event in client.generate(sys.argv[2], draft_interval=0.0, timeout=60):
        print("event", flush=True)
"""


async def test_a_client_that_is_killed_frees_the_engine(tmp_path: Path) -> None:
    """Another process, ended by SIGKILL in the midst of an answer: its socket closes without a goodbye."""
    async with serving(tmp_path, {PROMPT: ANSWER}) as harness:
        with harness.engine.hold("denoise", 2) as gate:
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CLIENT, harness.address, PROMPT, stdout=asyncio.subprocess.PIPE
            )
            await reached(gate)
            assert client.stdout is not None
            assert await client.stdout.readline() == b"event\n"
            handle = await harness.runner.submitted()
            os.kill(client.pid, signal.SIGKILL)
            await handle.wait_cancelled()
            await client.wait()
        assert await finished(harness.generation.Generate(request("probe"), timeout=60))
        assert harness.engine.calls["denoise"] == 2 + 4
        client._transport.close()  # type: ignore[attr-defined]


async def test_a_deadline_that_has_passed_is_refused(tmp_path: Path) -> None:
    """Work that cannot start in time is not begun: the queue is looked through at every step."""
    async with serving(tmp_path, limits=Limits(max_active=1, max_waiting=4)) as harness:
        with harness.engine.hold("denoise", 1) as gate:
            first = harness.generation.Generate(request("first"), timeout=60)
            await reached(gate)
            late = harness.generation.Generate(request("late"), timeout=0.2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await finished(late)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await finished(first)
        assert harness.engine.calls["denoise"] == 4


EIGHT_STEPS = options_pb2.GenerationOptions(diffusion=options_pb2.DiffusionOptions(confidence_threshold=0.0))
"""Never sure, so that a block takes all the steps it may."""


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(tmp_path: Path) -> None:
    """The engine has shown that a step takes 0.3 s: eight, which this one must make, do not fit into two seconds."""
    async with serving(tmp_path) as harness:
        for call in range(1, 5):
            harness.engine.before("denoise", call, lambda: time.sleep(0.3))
        assert await finished(harness.generation.Generate(request("hello"), timeout=60))
        before = work_of(harness)
        failure = await failure_of(harness.generation.Generate(request("hello", options=EIGHT_STEPS), timeout=2))
        assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")
        assert work_of(harness) == before
        assert await finished(harness.generation.Generate(request("hello"), timeout=2))


async def test_who_waits_until_it_is_too_late_is_not_begun(tmp_path: Path) -> None:
    """Eight steps of 0.3 s do not fit any more when its turn comes: it is told so long before its deadline."""
    async with serving(tmp_path, limits=Limits(max_active=1, max_waiting=4)) as harness:
        for call in range(1, 5):
            harness.engine.before("denoise", call, lambda: time.sleep(0.3))
        assert await finished(harness.generation.Generate(request("hello"), timeout=60))
        with harness.engine.hold("encode", 2) as gate:
            first = harness.generation.Generate(request("first"), timeout=60)
            await reached(gate)
            failure = await failure_of(harness.generation.Generate(request("late", options=EIGHT_STEPS), timeout=4))
        assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")
        assert await finished(first)
        assert work_of(harness) == (2, 8)


async def test_prompts_that_are_tokenised_hold_up_no_shutdown(tmp_path: Path) -> None:
    """Catches a drain that waits for a thread behind all the prompts that came before it."""
    gate = threading.Event()
    async with serving(tmp_path) as harness:
        prompts = [asyncio.create_task(asyncio.to_thread(gate.wait, 60)) for _ in range(100)]
        try:
            await asyncio.wait_for(harness.server.stop(0), 30)
        finally:
            gate.set()
            await asyncio.gather(*prompts)
