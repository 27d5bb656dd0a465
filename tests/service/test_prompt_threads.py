"""Tokenising is bounded: long prompts wait among themselves, further ones are refused, and nobody else is held up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.errors import Draining, QueueFull
from runtime.vocabulary import Vocabulary
from service.prompt_threads import CLIENT_BYTES, SHORT_BYTES, WAITING_BYTES, PromptThreads
from tests.service.support import Harness, failure_of, finished, reached, request, serving

LONG = "x" * (3 << 20)
"""Two of them fit into the lane of long prompts, three do not."""


class Gate:
    """Holds the tokenising of long texts until it is released."""

    def __init__(self) -> None:
        self._begun, self._released = threading.Event(), threading.Event()

    def pass_through(self, text: str) -> None:
        if len(text) >= len(LONG):
            self._begun.set()
            assert self._released.wait(60)

    def wait_reached(self) -> None:
        assert self._begun.wait(30)

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    encode = Vocabulary.encode

    def held(vocabulary: Vocabulary, text: str) -> list[int]:
        made.pass_through(text)
        return encode(vocabulary, "x" * 5000) if len(text) >= len(LONG) else encode(vocabulary, text)

    monkeypatch.setattr(Vocabulary, "encode", held)
    yield made
    made.release()


@asynccontextmanager
async def two_long_prompts(directory: Path, gate: Gate) -> AsyncIterator[tuple[Harness, list[Any]]]:
    """A server with one long prompt being tokenised and another one that waits."""
    async with serving(directory) as harness:
        calls = [harness.generation.Generate(request(LONG), timeout=60)]
        await reached(gate)
        calls.append(harness.generation.Generate(request(LONG), timeout=60))
        while harness.server._threads._long._prompts < 2:  # noqa: ASYNC110  until it has come whole
            await asyncio.sleep(0.001)
        yield harness, calls


async def test_a_third_long_prompt_is_told_when_to_come_again(tmp_path: Path, gate: Gate) -> None:
    """Catches prompts that pile up behind the threads, and a refusal that tells no time."""
    async with two_long_prompts(tmp_path, gate) as (harness, calls):
        failure = await failure_of(harness.generation.Generate(request(LONG), timeout=30))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert failure.metadata == {"waiting": "2"}
        assert failure.retry_after is not None
        assert failure.retry_after > 1  # six megabytes, at about one a second
        gate.release()
        for call in calls:  # too long for the context, which only a tokenised prompt tells
            assert (await failure_of(call)).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_long_prompts_hold_up_nobody_else(tmp_path: Path, gate: Gate) -> None:
    """Catches threads that long prompts share with short ones, and an event loop that waits for either."""
    async with two_long_prompts(tmp_path, gate) as (harness, _):
        stub: Any = health_pb2_grpc.HealthStub(harness.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
        assert await finished(harness.generation.Generate(request("short"), timeout=10))


async def test_a_prompt_whose_caller_has_gone_makes_room(tmp_path: Path, gate: Gate) -> None:
    """Catches bytes that stay counted when a waiting prompt is taken out, and work for nobody."""
    async with two_long_prompts(tmp_path, gate) as (harness, calls):
        calls[1].cancel()
        # As above: this stands behind the cancellation on the wire.
        assert await finished(harness.generation.Generate(request("behind it"), timeout=30))
        third = harness.generation.Generate(request(LONG), timeout=30)
        gate.release()
        assert (await failure_of(third)).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_shutdown_waits_for_no_prompt(tmp_path: Path, gate: Gate) -> None:
    """Catches callers that are cut off without a reason while theirs is tokenised, and an end that waits for it."""
    async with two_long_prompts(tmp_path, gate) as (harness, calls):
        assert await asyncio.wait_for(harness.server.stop(60), 30)
        for call in calls:
            failure = await failure_of(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_after_the_end_prompts_are_sent_elsewhere() -> None:
    """Catches INTERNAL for a conversation's message that comes while the server ends."""
    threads = PromptThreads()
    threads.close()
    for size in (1, SHORT_BYTES + 1):
        with pytest.raises(Draining):
            await threads.run(size, lambda: None)


async def test_a_lane_takes_one_prompt_of_any_size() -> None:
    """Catches a bound that nothing passes; and counts what is refused and what is not by hand."""
    threads, gate = PromptThreads(), threading.Event()
    huge = asyncio.create_task(threads.run(2 * WAITING_BYTES, gate.wait))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await threads.run(SHORT_BYTES + 1, lambda: None)
    assert caught.value.waiting == 1
    assert await threads.run(SHORT_BYTES, lambda: "short") == "short"
    gate.set()
    assert await huge
    assert await threads.run(SHORT_BYTES + 1, lambda: "long") == "long"
    threads.close()


async def test_clients_take_turns() -> None:
    """Catches one client's many prompts standing before another one's first; the gate is a third client's."""
    threads, gate, done = PromptThreads(), threading.Event(), list[str]()
    waiting = [asyncio.create_task(threads.run(1, gate.wait, "held"))]
    for client, name in [("many", "a"), ("many", "b"), ("many", "c"), ("other", "x"), ("other", "y")]:
        waiting.append(asyncio.create_task(threads.run(1, partial(done.append, name), client)))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*waiting)
    assert "".join(done) == "axbyc"
    threads.close()


async def test_no_client_fills_a_lane_alone() -> None:
    """What one may have waiting is a part of what all may; what is taken out or done makes room, for each by itself."""
    threads, gate = PromptThreads(), threading.Event()
    held = asyncio.create_task(threads.run(CLIENT_BYTES - 1, gate.wait, "many"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await threads.run(SHORT_BYTES + 1, lambda: None, "many")
    other = asyncio.create_task(threads.run(CLIENT_BYTES, lambda: "other", "other"))
    await asyncio.sleep(0)
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    again = asyncio.create_task(threads.run(CLIENT_BYTES, lambda: "again", "other"))
    await asyncio.sleep(0)
    gate.set()
    assert await again == "again"
    assert await held
    assert await threads.run(CLIENT_BYTES, lambda: "many", "many") == "many"
    threads.close()


async def test_the_time_to_come_again_follows_the_pace() -> None:
    """A thousand fast prompts teach the lane that a megabyte takes less than the second it began with."""
    threads, gate = PromptThreads(), threading.Event()
    for _ in range(1000):
        await threads.run(SHORT_BYTES + 1, lambda: None)
    held = asyncio.create_task(threads.run(WAITING_BYTES, gate.wait))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await threads.run(SHORT_BYTES + 1, lambda: None)
    assert caught.value.retry_after < WAITING_BYTES / 1e6
    gate.set()
    await held
    threads.close()


async def test_an_error_of_the_prompt_comes_out() -> None:
    threads = PromptThreads()
    with pytest.raises(ZeroDivisionError):
        await threads.run(1, lambda: 1 // 0)
    threads.close()
