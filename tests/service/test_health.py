"""Health is open to strangers, so none of them may hold up others or the server."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.service.support import serving

Status = health_pb2.HealthCheckResponse
DATA, HEADERS, SETTINGS = 0, 1, 4
INITIAL_WINDOW_SIZE = 4
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header that is not indexed (RFC 7541, 6.2.2)."""
    return b"\x00" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


WATCH = b"".join(
    literal(name, value)
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/grpc.health.v1.Health/Watch"),
        (":authority", "stranger"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
)


async def watch_without_a_window(address: str) -> asyncio.StreamWriter:
    """A watcher that has a status coming, and lets no byte of it through."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    no_window = frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    empty_message = frame(DATA, END_STREAM, 1, bytes(5))
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + no_window + frame(HEADERS, END_HEADERS, 1, WATCH) + empty_message
    )
    kind = None
    while kind != HEADERS:  # which no window holds back: the status is being written
        head = await asyncio.wait_for(reader.readexactly(9), 30)
        kind = head[3]
        await reader.readexactly(int.from_bytes(head[:3]))
    return writer


async def test_a_watcher_that_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    """Catches a status that is written under a lock: the server could then not even be shut down."""
    async with serving(tmp_path) as harness:
        stuck = await watch_without_a_window(harness.address)
        stub: Any = health_pb2_grpc.HealthStub(harness.channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert (await watched.read()).status == Status.SERVING
        stopping = asyncio.create_task(harness.server.stop(0))
        assert (await watched.read()).status == Status.NOT_SERVING
        await asyncio.wait_for(stopping, 30)
        stuck.close()


async def test_a_service_that_is_not_here(tmp_path: Path) -> None:
    """As the protocol of health checking says: NOT_FOUND to who asks, SERVICE_UNKNOWN to who watches."""
    async with serving(tmp_path) as harness:
        stub: Any = health_pb2_grpc.HealthStub(harness.channel)
        asked = health_pb2.HealthCheckRequest(service="elsewhere.Service")
        call = stub.Check(asked, timeout=30)
        assert await call.code() is grpc.StatusCode.NOT_FOUND
        assert (await stub.Watch(asked, timeout=30).read()).status == Status.SERVICE_UNKNOWN
