"""A server process from its start to its exit code: signals, health, draining, and what clients are told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diffusiongemma.v1 import generation_pb2, model_pb2, prompt_pb2
from runtime.events import Committed, Event, Finished, Started
from service.client import CallFailed
from service.server import LAST_CALL, LAST_WRITES, SERVICES
from tests.service.processes import ROOT, fake_server
from tests.service.support import failure_of, finished, reached, request, serving

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


def test_a_second_signal_ends_the_grace_time(tmp_path: Path) -> None:
    """An answer that would take minutes and a grace time of an hour: who asks twice does not want to wait."""
    with fake_server(tmp_path, answers={"go": LONG * 10}, step_seconds=0.05, grace=3600.0) as server:
        events = iter(server.client.generate("go", timeout=60))
        next(events)
        with grpc.insecure_channel(server.address) as channel:
            states = watch(channel, "")
            next(states)
            server.process.send_signal(signal.SIGTERM)
            assert next(states).status == Status.NOT_SERVING
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(CallFailed) as caught:
            list(events)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert server.exit_code() == 0
        assert "drained=False" in server.log()


def test_a_signal_while_loading_ends_at_once(tmp_path: Path) -> None:
    """Catches a server that announces itself after it was told to go, and one that loads to the end first."""
    options = json.dumps({"hold_loading": True})
    command = [sys.executable, "-m", "tests.service.fake_server", str(tmp_path), options]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert "bound" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert process.stdout.read() == ""
            log = process.stderr.read()
        finally:
            process.kill()
    assert "stopped" in log
    assert "serving" not in log


async def test_nothing_is_begun_while_draining(tmp_path: Path) -> None:
    """Counting and asking for the model are sent elsewhere like generating, so that a balancer sees one answer."""
    async with serving(tmp_path, {"go": LONG}) as harness:
        with harness.engine.hold("denoise", 2) as gate:
            open_one = harness.generation.Generate(request("go"), timeout=60)
            await reached(gate)
            stopping = asyncio.create_task(harness.server.stop(60))
            stub: Any = health_pb2_grpc.HealthStub(harness.channel)
            async for state in stub.Watch(health_pb2.HealthCheckRequest(), timeout=60):
                if state.status == Status.NOT_SERVING:
                    break
            count = generation_pb2.CountTokensRequest(token_ids=prompt_pb2.TokenIds(ids=[1]))
            for call in (
                harness.generation.Generate(request("new"), timeout=60),
                harness.generation.CountTokens(count, timeout=60),
                harness.models.GetModel(model_pb2.GetModelRequest(), timeout=60),
                harness.generation.Converse(timeout=60),
            ):
                failure = await failure_of(call)
                assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert await finished(open_one)
        assert await stopping


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
        log = second.log()
        assert f"cannot listen on {first.address}: another program does" in log
        assert "add_port" not in log  # gRPC's own account of it
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


def test_a_server_whose_engine_hangs_ends(tmp_path: Path) -> None:
    """Catches a server that stays SERVING, and its clients waiting, while a call of the engine never returns."""
    with (
        fake_server(tmp_path, answers={"go": LONG}, hold=["denoise", 2], stall=0.2) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        states = watch(channel, "")
        assert next(states).status == Status.SERVING
        with pytest.raises(CallFailed) as caught:
            list(server.client.generate("go", timeout=60))
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert [state.status for state in _until_broken(states)] == [Status.NOT_SERVING]
        assert server.exit_code() != 0
        assert "stalled" in server.log()


def test_a_server_whose_engine_hangs_while_it_drains_ends(tmp_path: Path) -> None:
    """Catches a watchdog that looks until the signal alone: clients would wait for a grace time of an hour."""
    with fake_server(tmp_path, answers={"go": LONG}, hold=["denoise", 2], stall=2.0, grace=3600.0) as server:
        events = iter(server.client.generate("go", timeout=60))
        next(events)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(CallFailed) as caught:
            list(events)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert server.exit_code() != 0
        log = server.log()
        assert log.index("draining") < log.index("stalled")


def test_a_call_that_takes_long_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """One that is not taken to hang yet: after the grace time nobody waits half a minute, thrice, for its end."""
    with fake_server(tmp_path, answers={"go": LONG}, hold=["denoise", 2], grace=0.2) as server:
        events = iter(server.client.generate("go", timeout=60))
        next(events)
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(CallFailed) as caught:
            list(events)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert server.exit_code() == 0
        assert time.monotonic() - signalled < 0.2 + 2 * LAST_CALL + LAST_WRITES + 10


def _until_broken(states: Iterator[Any]) -> Iterator[Any]:
    with suppress(grpc.RpcError):
        yield from states


def test_a_server_whose_engine_has_died_ends(tmp_path: Path) -> None:
    """Catches a process that calls itself SERVING for ever and answers nothing: a supervisor must see it go."""
    with fake_server(tmp_path, die=True) as server:
        with pytest.raises(CallFailed) as caught:
            list(server.client.generate("hello", timeout=60))
        assert caught.value.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        assert server.exit_code() != 0
        assert "the engine's thread ended" in server.log()
