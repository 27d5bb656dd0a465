"""Calls of methods that nobody serves: refused, whatever their path holds, and nobody else notices."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import grpc
import pytest

from tests.reliability.fuzz_frames import HEADERS, PREFACE, SETTINGS, frame, header
from tests.service.support import Harness, finished, reached, request, serving

PATHS = [
    pytest.param(b"/a.B/C\xa4", id="no-utf-8"),
    pytest.param(b"/diffusiongemma.v1.GenerationService/Generate\xff", id="of-a-known-service"),
    pytest.param(b"\x00", id="no-path"),
]

STATUS = re.compile(rb"grpc-status\x02\d\d")
"""A header whose value has two digits, which may come in a packet of its own."""


async def send(harness: Harness, path: bytes) -> bytes:
    """Call a method by its path's bytes; what the server answered up to its status, or until it closed."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost")]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    block = b"".join(header(*each) for each in fields)
    host, _, port = harness.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 5, 1, block))
    heard = b""
    try:
        while not STATUS.search(heard) and (more := await asyncio.wait_for(reader.read(4096), 10)):
            heard += more
    finally:
        writer.close()
    return heard


@pytest.mark.parametrize("path", PATHS)
async def test_no_path_ends_the_server(tmp_path: Path, path: bytes) -> None:
    """Catches gRPC's own loop dying of a path that is no UTF-8, and with it a stream that is under way."""
    async with serving(tmp_path) as harness:
        with harness.engine.hold("denoise", 1) as gate:
            stream = harness.generation.Generate(request("a stream that is under way"), timeout=60)
            await reached(gate)
            assert b"grpc-status\x0212" in await send(harness, path)
        assert await finished(stream)
        assert await finished(harness.generation.Generate(request("the next one"), timeout=60))


async def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    """With a message or without: clients of later versions must be told so."""
    async with serving(tmp_path) as harness:
        method = harness.channel.unary_unary("/diffusiongemma.v1.GenerationService/Later")
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(b"x", timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        stream = harness.channel.stream_stream("/Later/Later")(iter([]), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_who_left_before_the_refusal_hurts_nobody(tmp_path: Path) -> None:
    """Catches a refusal whose failure ends the loop."""
    async with serving(tmp_path) as harness:
        method = harness.channel.unary_unary("/Later/Later")
        calls = [method(b"x", timeout=30) for _ in range(50)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert await finished(harness.generation.Generate(request("still there"), timeout=60))
