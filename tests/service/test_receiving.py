"""Messages that come in part, over a real socket: what they may hold, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from diffusiongemma.v1 import model_pb2
from runtime.errors import InvalidRequest, SenderTooSlow
from service.interceptor import StatusInterceptor
from service.receiving import PLACES, Receiving
from service.transport import HARD_MESSAGE_BYTES, WINDOW_BYTES
from tests.reliability.fuzz_frames import (
    DATA,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    header,
)
from tests.service.support import Harness, failure_of, finished, request, serving

INITIAL_WINDOW_SIZE = 4
"""RFC 9113, section 6.5.2."""
METHOD = "/diffusiongemma.v1.GenerationService/Generate"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Sender:
    """A client of bare frames, whose messages are announced and never come whole."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.windows: dict[int, int] = {}
        """Bytes that the server takes of each stream."""
        self.initial_windows: set[int] = set()
        """What it said to take of a stream that nobody reads yet."""

    @classmethod
    async def connected(cls, harness: Harness) -> Sender:
        host, _, port = harness.address.rpartition(":")
        sender = cls(*await asyncio.open_connection(host, int(port)))
        sender._writer.write(PREFACE + frame(SETTINGS, 0, 0))
        return sender

    def begin(self, stream: int, method: str, length: int) -> None:
        """Open a call and announce a message, of which nothing comes."""
        fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", method.encode()), (b":authority", b"x")]
        fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
        block = b"".join(header(*each) for each in fields)
        self.windows[stream] = WINDOW_BYTES
        self._writer.write(frame(HEADERS, 4, stream, block) + frame(DATA, 0, stream, b"\0" + length.to_bytes(4)))

    def leave(self, stream: int) -> None:
        del self.windows[stream]
        self._writer.write(frame(RST_STREAM, 0, stream, (8).to_bytes(4)))

    @property
    def taken(self) -> set[int]:
        """Streams that may send more than what the server takes of everybody."""
        return {stream for stream, size in self.windows.items() if size > 2 * WINDOW_BYTES}

    async def until_taken(self, streams: int) -> None:
        """Read until there are so many of them."""
        while len(self.taken) < streams:
            await self._read()

    async def told_all(self) -> None:
        """Read what the server has said up to now."""
        self._writer.write(frame(PING, 0, 0, b"all read"))
        while await self._read() != (PING, b"all read"):
            pass

    async def _read(self) -> tuple[int, bytes]:
        head = await asyncio.wait_for(self._reader.readexactly(9), 30)
        payload = await self._reader.readexactly(int.from_bytes(head[:3]))
        stream = int.from_bytes(head[5:])
        if head[3] == WINDOW_UPDATE and stream in self.windows:
            self.windows[stream] += int.from_bytes(payload)
        if head[3] == SETTINGS:
            entries = [payload[begin : begin + 6] for begin in range(0, len(payload), 6)]
            self.initial_windows |= {
                int.from_bytes(entry[2:]) for entry in entries if int.from_bytes(entry[:2]) == INITIAL_WINDOW_SIZE
            }
        return head[3], payload

    def close(self) -> None:
        self._writer.close()


@pytest.mark.parametrize("method", [METHOD, REFLECTION])
async def test_no_client_fills_the_memory_with_messages_in_part(tmp_path: Path, method: str) -> None:
    """Catches a server that makes room for as many as there are calls: 128 of 4 MB, on each connection. It makes room
    for some, and for the next one once one of them has gone; meanwhile its other services answer."""
    async with serving(tmp_path) as harness:
        with closing(await Sender.connected(harness)) as sender:
            for stream in range(1, 2 * (PLACES + 4), 2):
                sender.begin(stream, method, 4 << 20)
            for _ in range(2):
                await sender.until_taken(PLACES)
                assert (await harness.models.GetModel(model_pb2.GetModelRequest(), timeout=30)).model.name == "fake"
                await sender.told_all()
                assert len(sender.taken) == PLACES
                assert sender.initial_windows == {WINDOW_BYTES}
                sender.leave(min(sender.taken))
        assert await finished(harness.generation.Generate(request("hello"), timeout=60))
    assert PLACES * HARD_MESSAGE_BYTES == 160 << 20


async def test_what_waits_for_a_place_is_served_in_time(tmp_path: Path) -> None:
    """Catches places that are never given back, however a call ends, and clients that go without notice."""
    async with serving(tmp_path) as harness:
        generate = harness.channel.stream_stream(METHOD)
        held = [generate(timeout=60) for _ in range(PLACES)]
        for call in held:
            await call.wait_for_connection()
        waiting = harness.generation.Generate(request("hello"), timeout=60)
        held[0].cancel()
        assert await finished(waiting)
        for call in held[1:]:
            await call.done_writing()  # without a message
            failure = await failure_of(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert await finished(harness.generation.Generate(request("hello again"), timeout=60))


async def test_a_message_is_not_unpacked_beyond_the_limit(tmp_path: Path) -> None:
    """A hundred megabytes in a hundred kilobytes: it depends on gRPC alone, and its versions."""
    packed: dict[str, Any] = {"compression": grpc.Compression.Gzip, "options": [("grpc.max_send_message_length", -1)]}
    async with serving(tmp_path) as harness, grpc.aio.insecure_channel(harness.address, **packed) as channel:
        bomb = b"\0" * (100 << 20)
        failure = await failure_of(channel.unary_stream(METHOD)(bomb, timeout=60))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await finished(harness.generation.Generate(request("hello"), timeout=60))


async def endless() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def empty() -> AsyncIterator[bytes]:
    for nothing in ():
        yield nothing


async def test_a_message_must_come_in_time() -> None:
    receiving = Receiving(patience=0.01)
    with pytest.raises(SenderTooSlow, match=r"0\.01 s"):
        await receiving.only_message(endless(), "client", "service")
    with pytest.raises(InvalidRequest, match="no message"):
        await receiving.only_message(empty(), "client", "service")
    assert not receiving._lines, "a client is remembered for ever"


async def test_each_client_has_places_of_its_own() -> None:
    receiving = Receiving()
    held = [asyncio.create_task(receiving.only_message(endless(), "many", "service")) for _ in range(PLACES + 1)]
    await asyncio.sleep(0)

    async def one() -> AsyncIterator[bytes]:
        yield b"message"

    assert await asyncio.wait_for(receiving.only_message(one(), "other", "service"), 30) == b"message"
    late = asyncio.create_task(receiving.only_message(one(), "many", "service"))
    for task in held[:2]:
        task.cancel()
    assert await asyncio.wait_for(late, 30) == b"message"
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    assert not receiving._lines


async def test_a_slow_sender_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*arguments: Any) -> StatusInterceptor:
        return StatusInterceptor(*arguments, Receiving(patience=0.05))

    monkeypatch.setattr("service.server.StatusInterceptor", impatient)
    async with serving(tmp_path) as harness:
        failure = await failure_of(harness.channel.stream_stream(METHOD)(timeout=60))
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "SENDER_TOO_SLOW")
