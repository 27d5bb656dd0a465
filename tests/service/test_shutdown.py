"""A server process from its start to its exit code: signals, health, draining, and what clients are told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.events import Committed, Event, Finished, Started
from service.client import CallFailed
from service.server import SERVICES
from tests.service.processes import ROOT, fake_server

LONG = "an answer of several blocks, each one of thirty-two tokens. " * 3
Status = health_pb2.HealthCheckResponse


def watch(channel: grpc.Channel, service: str) -> Iterator[Any]:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return iter(stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tmp_path: Path, number: signal.Signals) -> None:
    """Health turns, new requests are sent elsewhere, the open one ends well, and the process exits with 0."""
    with (
        fake_server(tmp_path, answers={"go": LONG}, hold=["denoise", 2]) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watched = {service: watch(channel, service) for service in ("", *SERVICES)}
        assert {next(states).status for states in watched.values()} == {Status.SERVING}
        events = iter(server.client.generate("go", timeout=60))
        assert isinstance(next(events), Started)
        server.process.send_signal(number)
        assert {next(states).status for states in watched.values()} == {Status.NOT_SERVING}
        with pytest.raises(CallFailed) as caught:
            list(server.client.generate("hello", timeout=10))
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        server.release()
        rest = list(events)
        assert "".join(event.text for event in rest if isinstance(event, Committed)) == LONG
        assert isinstance(rest[-1], Finished)
        assert server.exit_code() == 0
        assert "draining" in server.log()


def test_what_outlasts_the_grace_time_is_cut_with_unavailable(tmp_path: Path) -> None:
    """An answer of minutes, and a grace time of a moment."""
    with fake_server(tmp_path, answers={"go": LONG * 10}, step_seconds=0.05, grace=0.2) as server:
        received: list[Event] = []

        def read() -> None:
            for event in server.client.generate("go", timeout=60):
                received.append(event)
                if len(received) == 2:
                    server.process.send_signal(signal.SIGTERM)

        with pytest.raises(CallFailed) as caught:
            read()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert len(received) >= 2
        assert server.exit_code() == 0


def test_an_idle_conversation_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """Between turns there is nothing to wait for: the stream ends at once, though the grace time is long."""
    with (
        fake_server(tmp_path, grace=50.0) as server,
        server.client.converse(timeout=100) as conversation,
    ):
        conversation.start_turn("hello")
        for _, event in conversation:
            if isinstance(event, Finished):
                break
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(CallFailed) as caught:
            list(conversation)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert server.exit_code() == 0


def test_a_turn_ends_well_and_its_conversation_is_then_sent_elsewhere(tmp_path: Path) -> None:
    with (
        fake_server(tmp_path, answers={"go": LONG}, hold=["denoise", 2]) as server,
        server.client.converse(timeout=100) as conversation,
    ):
        conversation.start_turn("go")
        events = iter(conversation)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        server.release()
        turn = []
        while not (turn and isinstance(turn[-1], Finished)):
            turn.append(next(events)[1])
        assert "".join(event.text for event in turn if isinstance(event, Committed)) == LONG
        with pytest.raises(CallFailed) as caught:
            next(events)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert server.exit_code() == 0


def test_a_stream_that_nobody_reads_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """A watcher of health, which would never end, and a client that has stopped reading its answer."""
    with (
        fake_server(tmp_path, answers={"go": LONG * 10}, grace=1.0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watching = watch(channel, "")
        next(watching)
        unread = server.client.generate("go", draft_interval=0.0, timeout=100)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        del unread


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """Catches two servers that share a port and answer in turn."""
    (tmp_path / "second").mkdir()
    with (
        fake_server(tmp_path) as first,
        fake_server(tmp_path / "second", address=first.address) as second,
    ):
        assert second.address == ""
        assert second.exit_code() != 0
        assert f"cannot listen on {first.address}" in second.log()
        assert first.client.model(timeout=30).name == "fake"


def test_a_unix_socket_serves(tmp_path: Path) -> None:
    with fake_server(tmp_path, address=f"unix:{tmp_path}/socket") as server:
        assert server.address == f"unix:{tmp_path}/socket"
        assert server.client.model(timeout=30).name == "fake"


def test_a_taken_unix_socket_is_told(tmp_path: Path) -> None:
    """Catches a second server that takes the first one's name away, and at its end leaves it without any."""
    (tmp_path / "second").mkdir()
    address = f"unix:{tmp_path}/socket"
    with (
        fake_server(tmp_path, address=address) as first,
        fake_server(tmp_path / "second", address=address) as second,
    ):
        assert second.address == ""
        assert second.exit_code() != 0
        assert f"cannot listen on {address}" in second.log()
        assert first.client.model(timeout=30).name == "fake"


def test_a_socket_that_a_killed_server_left_is_used_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/socket")
    with fake_server(tmp_path, address=address) as server:
        assert server.client.model(timeout=30).name == "fake"


def test_an_address_that_nobody_reads_ends_no_server() -> None:
    """Catches a server that goes down with a traceback since whoever started it has closed its standard output."""
    program = "from service.cli.serve import announce; announce('here')"
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_waiting_for_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    """A client may come first; it sees SERVING as soon as the server is."""
    address = f"unix:{tmp_path}/socket"
    outcome: list[BaseException | None] = []

    def wait() -> None:
        from service.client import Client

        try:
            with Client(address) as client:
                client.wait_serving(timeout=60)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    with fake_server(tmp_path, address=address):
        waiting.join(60)
    assert outcome == [None]


def test_a_server_whose_engine_has_died_ends(tmp_path: Path) -> None:
    """Catches a process that calls itself SERVING for ever and answers nothing: a supervisor must see it go."""
    with fake_server(tmp_path, die=True) as server:
        with pytest.raises(CallFailed) as caught:
            list(server.client.generate("hello", timeout=60))
        assert caught.value.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        assert server.exit_code() != 0
        assert "the engine's thread ended" in server.log()
