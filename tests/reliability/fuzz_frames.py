"""Garbage on a real socket: HTTP/2 frames that are mutated, out of order, cut short or none at all.

What gRPC answers to it is its own affair. The server must live on, answer others meanwhile, and keep nothing.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from service.client import CallFailed, Client
from tests.reliability.server import echo_server
from tests.service.support import request

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
METHODS = ("Generate", "Converse", "CountTokens", "Nothing")
STRANGERS = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    b"SSH-2.0-x\r\n",
    b"\x00" * 200,
    PREFACE[:10],
)
LOOK_EVERY = 50
"""Connections between two looks at whether others are answered."""
TIMEOUT = 30.0


@dataclass
class Garbage:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether the server lived on as if nothing had happened."""
        return not (self.wrong or self.leaks)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame (RFC 9113, section 4.1), of a length that may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal header without indexing or Huffman coding (RFC 7541, section 6.2.2); both shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call(stream: int, method: str, message: bytes) -> list[bytes]:
    """The frames of a good call."""
    path = f"/diffusiongemma.v1.GenerationService/{method}".encode()
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost")]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    block = b"".join(header(*each) for each in fields)
    body = b"\x00" + struct.pack(">I", len(message)) + message
    return [frame(HEADERS, 4, stream, block), frame(DATA, 1, stream, body)]


def garbage(chance: random.Random) -> bytes:
    """What one connection sends."""
    if chance.random() < 0.1:
        return chance.choice((*STRANGERS, chance.randbytes(chance.choice((1, 30, 3000)))))
    message = request("hello there", drafts=True).SerializeToString()
    frames = [frame(SETTINGS, 0, 0)]
    for number in range(chance.choice((1, 1, 2, 5))):
        frames += call(2 * number + 1, chance.choice(METHODS), message)
    for _ in range(chance.choice((0, 1, 2, 4))):
        frames.insert(chance.randint(0, len(frames)), _strange(chance))
    if chance.random() < 0.2:
        chance.shuffle(frames)
    if chance.random() < 0.2:
        frames[chance.randrange(len(frames))] *= chance.choice((2, 10, 300))
    sent = bytearray(PREFACE + b"".join(frames))
    for _ in range(chance.choice((0, 1, 1, 3, 10))):
        sent[chance.randrange(len(PREFACE), len(sent))] = chance.randrange(256)
    return bytes(sent[: chance.randint(len(PREFACE), len(sent))] if chance.random() < 0.2 else sent)


def _strange(chance: random.Random) -> bytes:
    """Any frame of any kind, seldom a good one."""
    kind, stream = chance.choice((*range(10), 10, 255)), chance.choice((0, 1, 2, 3, 7, 2**31 - 1, 2**32 - 1))
    payloads = (b"", b"\x00" * 8, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x04\xff\xff\xff\xff", b"\x80" * 40)
    payload = chance.choice((*payloads, chance.randbytes(chance.choice((1, 5, 100, 20_000)))))
    lie = chance.choice((None, None, None, 0, 1, 2**14 + 1, 2**24 - 1))
    return frame(kind, chance.choice((0, 1, 4, 5, 8, 0x20, 0xFF)), stream, payload, lie)


def fuzz_frames(directory: Path, connections: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> Garbage:
    """Open so many connections one after the other, and send garbage on each."""
    result, chance = Garbage(), random.Random(seed)
    with echo_server(directory) as server, Client(server.address) as client:
        host, _, port = server.address.rpartition(":")
        process = psutil.Process(server.process.pid)
        _look(client, result, "at first")
        before = process.num_fds()
        for number in range(connections):
            result.outcomes[_send((host, int(port)), garbage(chance))] += 1
            if number % LOOK_EVERY == LOOK_EVERY - 1:
                _look(client, result, f"after connection {number}")
            if number % 1000 == 999:
                tell(f"  {number + 1} connections")
        _look(client, result, "at last")
        result.leaks = _left(server.accounts, process, before)
        if server.process.poll() is not None:
            result.wrong.append(f"the server ended with {server.process.poll()}")
    return result


def _send(address: tuple[str, int], sent: bytes) -> str:
    """Send, listen for a moment, and go; what was heard."""
    try:
        with socket.create_connection(address, timeout=TIMEOUT) as connection:
            connection.sendall(sent)
            connection.settimeout(0.02)
            heard = b""
            with suppress(TimeoutError):
                while more := connection.recv(1 << 16):
                    heard += more
                return "closed by the server" if heard else "closed without a word"
            return "answered" if heard else "silence"
    except (ConnectionResetError, BrokenPipeError):
        return "reset by the server"


def _look(client: Client, result: Garbage, when: str) -> None:
    """Whether others are answered."""
    try:
        client.count_tokens("hello", timeout=TIMEOUT)
    except CallFailed as error:
        result.wrong.append(f"{when}: {error}")


def _left(accounts: Callable[[], dict[str, list[str]]], process: psutil.Process, before: int) -> list[str]:
    """Requests, pages and sockets that garbage has left behind, once it had time to go."""
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        left, sockets = list(accounts()["leaks"]), process.num_fds() - before
        if not left and sockets <= 0:
            return []
        time.sleep(0.1)
    return [*left, *([f"{sockets} file descriptors"] if sockets > 0 else [])]
