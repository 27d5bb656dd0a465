"""Clients that misbehave in every way, against one server: nothing is left behind, and every stream ends as it must.

Each request has a behaviour, drawn from the seed. Whatever a client does, what it was sent follows the grammar; where
it stays to the end it has the whole answer, or a status that says why not. Afterwards every page and slot is back.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc

from diffusiongemma.v1 import generation_pb2, generation_pb2_grpc, options_pb2, prompt_pb2
from runtime.engines.fake import Faults
from runtime.runner import Runner
from service.client import CallFailed
from service.lifetime import OPEN
from service.security import Security
from service.server import Server
from tests.reliability.echo import Size, echoing, settled, words
from tests.reliability.grammar import Numbers, Turn, Ungrammatical
from tests.service.support import message, request

SIZE = Size(active=8, waiting=32, park_seconds=0.05)
CROWD = 40
"""Clients at a time, some with two streams: now and then more than the engine and its queue take."""
REFUSED_SECONDS = 0.3
"""What who is refused waits before its place in the crowd is taken again."""
UNREAD = 2
"""Events that may wait for a slow reader, in place of the 32 that no short answer reaches."""
SMALL_WINDOWS = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
FAULTS = Faults(error_rate=0.0005, shortage_rate=0.003)
TIMEOUT = 120.0

EXPECTED = {
    (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
}
"""How a stream may end that its client did not end itself."""


@dataclass
class Chaos:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """By behaviour and end."""
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    suspended: int = 0
    """Most requests that were parked for slow readers, without pages, at a time."""

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not (self.wrong or self.leaks)


@dataclass
class Client:
    """One request, and what it draws from chance."""

    stub: Any
    address: str
    chance: random.Random

    @property
    def options(self) -> options_pb2.GenerationOptions:
        """Any settings that leave the answer what it is."""
        made = options_pb2.GenerationOptions(max_output_token_count=300, seed=self.chance.randrange(1 << 40))
        made.priority = self.chance.choice((0, 1, 2))
        return made

    def ask(self, text: str) -> generation_pb2.GenerateRequest:
        """The request for an answer, with drafts or without."""
        return request(text, options=self.options, drafts=self.chance.random() < 0.5)


async def patient(client: Client) -> str:
    """Reads to the end."""
    text = words(client.chance, 5, 200)
    return await _whole(client.stub.Generate(client.ask(text), timeout=TIMEOUT), text)


async def repeated(client: Client) -> str:
    """Sends the same message twice at once; both are answered, with equal tokens."""
    wanted = client.ask(words(client.chance, 5, 100))
    text = wanted.conversation.messages[0].parts[0].text
    calls = (client.stub.Generate(wanted, timeout=TIMEOUT) for _ in range(2))
    return ", ".join(sorted(await asyncio.gather(*(_whole(call, text) for call in calls))))


async def cancelling(client: Client) -> str:
    """Leaves after some of the events, or before the first."""
    call = client.stub.Generate(client.ask(words(client.chance, 40, 280)), timeout=TIMEOUT)
    turn = await _some(call, client.chance.choice((0, 0, 1, 2, 3, 5, 8, 13)))
    call.cancel()
    return "ended first" if turn.ended else "cancelled"


async def cancelling_late(client: Client) -> str:
    """Leaves at any time, whatever the server is doing."""
    call = client.stub.Generate(client.ask(words(client.chance, 40, 280)), timeout=TIMEOUT)
    asyncio.get_running_loop().call_later(client.chance.expovariate(5), call.cancel)
    return await _whole(call, None)


async def hasty(client: Client) -> str:
    """Has a deadline that may or may not do; gRPC ends the call when it has passed."""
    text = words(client.chance, 5, 280)
    return await _whole(client.stub.Generate(client.ask(text), timeout=client.chance.expovariate(2)), text)


async def vanishing(client: Client) -> str:
    """Closes its connection with two streams open."""
    async with _connection(client.address) as stub:
        calls = [stub.Generate(client.ask(words(client.chance, 40, 280)), timeout=TIMEOUT) for _ in range(2)]
        for call in calls:
            await _some(call, client.chance.choice((0, 1, 2, 5)))
    return "vanished"


async def slow(client: Client) -> str:
    """Reads little by little through a window of 1 kB, with pauses in which the server has nowhere to write to."""
    text = words(client.chance, 200, 280)
    wanted = request(text, options=client.options, drafts=True)
    async with _connection(client.address, *SMALL_WINDOWS) as stub:
        return await _whole(stub.Generate(wanted, timeout=TIMEOUT), text, pause=client.chance.uniform(0.005, 0.05))


async def stalled(client: Client) -> str:
    """Reads one event, then nothing for a while, and goes."""
    wanted = request(words(client.chance, 200, 280), options=client.options, drafts=True)
    async with _connection(client.address, *SMALL_WINDOWS) as stub:
        call = stub.Generate(wanted, timeout=TIMEOUT)
        await _some(call, 1)
        await asyncio.sleep(client.chance.uniform(0.1, 0.4))
        call.cancel()
    return "stalled"


async def talking(client: Client) -> str:
    """A conversation whose client repeats itself: turns, cancellations of turns that have ended, or of each twice."""
    chance, texts = client.chance, [words(client.chance, 5, 120) for _ in range(client.chance.randint(1, 3))]
    texts += texts[-1:] * chance.randint(0, 1)
    call = client.stub.Converse(timeout=TIMEOUT)
    setup = generation_pb2.ConversationSetup(options=client.options)
    setup.history.extend([message("user", "hello"), message("model", "hello")] * chance.randint(0, 1))
    cancelled = set()
    try:
        await call.write(generation_pb2.ConverseRequest(setup=setup))
        for index, text in enumerate(texts):
            start = generation_pb2.TurnStart(parts=[prompt_pb2.ContentPart(text=text)])
            await call.write(generation_pb2.ConverseRequest(start_turn=start))
            if chance.random() < 0.4:
                cancelled.add(index)
                cancel = generation_pb2.TurnCancel(turn_index=index)
                for _ in range(chance.randint(1, 3)):
                    await call.write(generation_pb2.ConverseRequest(cancel_turn=cancel))
        await call.done_writing()
        return await _turns(call, texts, cancelled)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return await _refused(call)


async def muddled(client: Client) -> str:
    """Sends the setup twice, or none, or cancels what was never started: one violation, and no event but of turns."""
    setup = generation_pb2.ConverseRequest(setup=generation_pb2.ConversationSetup())
    cancel = generation_pb2.ConverseRequest(
        cancel_turn=generation_pb2.TurnCancel(turn_index=client.chance.randint(-2, 9))
    )
    messages = client.chance.choice(([setup, setup], [cancel], [setup, cancel], [generation_pb2.ConverseRequest()]))
    call = client.stub.Converse(timeout=TIMEOUT)
    try:
        for each in messages:
            await call.write(each)
        await call.done_writing()
        async for _ in call:
            raise Ungrammatical("an event on a muddled conversation")
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    if await call.code() is not grpc.StatusCode.INVALID_ARGUMENT:
        raise Ungrammatical(f"a muddled conversation ended with {await call.code()}")
    return "refused"


Behaviour = Callable[[Client], Awaitable[str]]
BEHAVIOURS: tuple[tuple[Behaviour, int], ...] = (
    (patient, 30),
    (repeated, 5),
    (cancelling, 20),
    (cancelling_late, 10),
    (hasty, 15),
    (vanishing, 3),
    (slow, 4),
    (stalled, 3),
    (talking, 8),
    (muddled, 2),
)
"""With weights."""


@asynccontextmanager
async def _connection(address: str, *options: tuple[str, int]) -> AsyncIterator[Any]:
    """A stub on a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=(OWN_CONNECTION, *options)) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


async def _some(call: Any, events: int) -> Turn:
    """Read so many events, unless the stream ends first."""
    turn, numbers = Turn(), Numbers()
    try:
        while events and not turn.ended and (response := await call.read()) is not grpc.aio.EOF:
            numbers.take(response)
            turn.take(response)
            events -= 1
    except grpc.aio.AioRpcError as error:
        _check_failure(error)
    return turn


async def _whole(call: Any, text: str | None, pause: float = 0.0) -> str:
    """Read to the end; an answer that is complete must be `text`, unless that is None."""
    turn, numbers = Turn(), Numbers()
    try:
        async for response in call:
            numbers.take(response)
            turn.take(response)
            await asyncio.sleep(pause)
    except grpc.aio.AioRpcError as error:
        return _check_failure(error)
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        return "cancelled"
    if turn.finished is None:
        raise Ungrammatical("the stream ended with OK and without finished")
    if text is not None and turn.text != text:
        raise Ungrammatical(f"the answer is {turn.text!r} in place of {text!r}")
    return "finished"


async def _turns(call: Any, texts: list[str], cancelled: set[int]) -> str:
    """Read a conversation to its end: its turns in order, each of its own grammar."""
    turns, numbers, open_turn = [Turn() for _ in texts], Numbers(), 0
    async for response in call:
        numbers.take(response)
        while turns[open_turn].ended:
            open_turn += 1
        if response.turn_index != open_turn:
            raise Ungrammatical(f"turn {response.turn_index} while {open_turn} is open")
        turns[open_turn].take(response)
    for index, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if not turn.ended or (turn.cancelled and index not in cancelled):
            raise Ungrammatical(f"turn {index} of {len(turns)} did not end as asked")
        if turn.finished is not None and turn.text != text:
            raise Ungrammatical(f"turn {index} is {turn.text!r} in place of {text!r}")
    return "answered"


async def _refused(call: Any) -> str:
    code = await call.code()
    if code is grpc.StatusCode.OK:
        raise Ungrammatical("a stream that was written to ended with OK")
    details = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), await call.trailing_metadata(), await call.details())
    return _check_failure(details)


def _check_failure(error: grpc.aio.AioRpcError) -> str:
    """The status' name, which must be one that the client can have met without a fault of ours."""
    failure = CallFailed.of(error)
    # gRPC's own, without details: the client's deadline passed, or it cancelled.
    if not failure.reason and failure.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return failure.code.name
    # Also gRPC's own, of the client's library: a write met a stream that the server had just ended, whose status is
    # then lost.
    if not failure.reason and failure.message == "Internal error from Core":
        return "ended while it was written to"
    if (failure.code, failure.reason) not in EXPECTED:
        raise Ungrammatical(f"the status {failure} of reason {failure.reason!r}")
    if failure.code is grpc.StatusCode.INTERNAL and not failure.metadata.get("correlation_id"):
        raise Ungrammatical(f"{failure} without a correlation id")
    if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED and failure.retry_after is None:
        raise Ungrammatical(f"{failure} does not say when to come again")
    return failure.reason


@asynccontextmanager
async def server_of(directory: Path, seed: int) -> AsyncIterator[tuple[str, Runner]]:
    """A server of this process whose engine fails now and then, and its runner."""
    faults = Faults(seed, FAULTS.error_rate, FAULTS.shortage_rate)
    served = echoing(directory, SIZE, faults=faults, step_seconds=0.0005)
    server = Server("127.0.0.1:0", Security(OPEN))
    await server.start(served)
    try:
        with patch("service.mailbox.MAX_UNREAD", UNREAD):
            yield server.address, served.runner
    finally:
        await server.stop(0)
        await asyncio.to_thread(served.runner.close)


async def chaos(directory: Path, requests: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> Chaos:
    """Have `requests` clients misbehave, `CROWD` at a time, and see what is left of it."""
    result, began = Chaos(), time.monotonic()
    behaviours, weights = zip(*BEHAVIOURS, strict=True)
    numbers = iter(range(requests))
    async with server_of(directory, seed) as (address, runner), _connection(address) as stub:

        async def crowd() -> None:
            for number in numbers:
                # Of its own: what a request does depends on its number alone.
                chance = random.Random(f"{seed}/{number}")
                behaviour = chance.choices(behaviours, weights)[0]
                await _behave(partial(behaviour, Client(stub, address, chance)), behaviour.__name__, number, result)
                result.suspended = max(result.suspended, runner.load.suspended)
                if number % 1000 == 999:
                    tell(f"  {number + 1} requests after {time.monotonic() - began:.0f} s")

        await asyncio.gather(*(crowd() for _ in range(CROWD)))
        result.leaks = await asyncio.to_thread(settled, runner)
    return result


async def _behave(behave: Callable[[], Awaitable[str]], name: str, number: int, result: Chaos) -> None:
    try:
        ended = await asyncio.wait_for(behave(), TIMEOUT)
        result.outcomes[f"{name}: {ended}"] += 1
        if "QUEUE_FULL" in ended:
            await asyncio.sleep(REFUSED_SECONDS)
    except Exception as error:
        result.wrong.append(f"request {number}, {name}: {type(error).__name__}: {error}")
