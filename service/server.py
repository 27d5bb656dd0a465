"""A server's life: port, bundle, engine, warm-up, SERVING; a signal, NOT_SERVING, drain, engine down, exit.

1. The port is bound: a taken one is told before gigabytes are read. Clients that come early wait.
2. The bundle and its engine load, and one short generation warms it up, so that the first client pays nothing.
3. The server starts, its services turn SERVING, and its address is announced.
4. A signal turns them NOT_SERVING. New requests get UNAVAILABLE, open ones may end within the grace time; what is
   left then ends with UNAVAILABLE.
5. The engine's thread ends and gives its memory back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from diffusiongemma.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from runtime.errors import DgemmaError
from runtime.runner import Runner
from service.calls import Calls
from service.generation import GenerationServicer
from service.interceptor import StatusInterceptor
from service.model import ModelServicer
from service.served import Served

logger = logging.getLogger(__name__)

T = TypeVar("T")

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)

MAX_MESSAGE_BYTES = 4 << 20
"""Largest message that is read. A prompt that fills a context of 262,144 tokens is about 1 MB, as text or as ids."""

HARD_MESSAGE_BYTES = 4 * MAX_MESSAGE_BYTES
"""Up to here an oversized message is read and refused with its details; beyond, gRPC refuses it by its header alone,
with a bare RESOURCE_EXHAUSTED, so that nobody makes the server hold more."""

LAST_WRITES = 1.0
"""Seconds after the grace time in which statuses still reach clients that read; the others are cut off."""

UNIX = "unix:"
"""What the address of a socket in the file system begins with."""

LIVENESS_INTERVAL = 1.0
"""Seconds between two looks at the engine's thread: as long as a dead server may call itself SERVING."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers on one port would take turns at random, where the second should say that the port is taken.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", HARD_MESSAGE_BYTES),
    # Room for trace headers and credentials; above the soft limit gRPC refuses some requests, above the hard one all.
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # One connection cannot take all of the queue; more calls wait in the client.
    ("grpc.max_concurrent_streams", 128),
    # A client that vanished without a word is noticed within 40 s, and its generation ends.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # An idle stream is normal (no drafts, or a conversation between turns): clients may ping every 10 s, with or
    # without calls, and are not sent away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # What is written ahead of the client is stale when it is read: a small buffer leaves drafts in the mailbox, where
    # newer ones replace them.
    ("grpc.http2.write_buffer_size", 4 << 10),
)


class AddressTaken(DgemmaError):
    """The server cannot listen on its address."""


class EngineDied(DgemmaError):
    """The engine's thread has ended, so that nothing more can be answered."""


class Server:
    """A gRPC server for one model, from its address on; `start` and `stop` make up its life."""

    def __init__(self, address: str) -> None:
        """Bind `address`, `host:port` or `unix:path`; port 0 takes a free one. Needs a running event loop.

        Raises:
            AddressTaken: something else listens there, or the address is none.
        """
        self._server = grpc.aio.server(interceptors=[StatusInterceptor(MAX_MESSAGE_BYTES)], options=OPTIONS)
        self.address = _bind(self._server, address)
        self._health = health.aio.HealthServicer()
        self._calls = Calls()
        self._runner: Runner | None = None

    async def start(self, served: Served) -> None:
        """Answer clients for `served`, whose runner runs; health then says SERVING, for the server and each service."""
        self._runner = served.runner
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(served, self._calls), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(served), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        reflected = (health.SERVICE_NAME, channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name)
        reflection.enable_server_reflection((*SERVICES, *reflected, reflection.SERVICE_NAME), self._server)
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> bool:
        """Turn NOT_SERVING, let open requests end within `grace` seconds, end the others with UNAVAILABLE.

        Returns:
            Whether all requests ended by themselves.
        """
        self._calls.drain()
        await self._health.enter_graceful_shutdown()
        drained = True
        if self._runner is not None:
            drained = await on_own_thread(partial(self._runner.drain, grace))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._calls.wait_idle(), LAST_WRITES)
        # What still stands are streams that nobody reads and the watchers of health, which would never end.
        await self._server.stop(None)
        return drained


async def on_own_thread(act: Callable[[], T]) -> T:
    """`act`'s result, from a thread that no request can occupy.

    Prompts are tokenised on the event loop's few threads: a shutdown that waited there for its turn came behind all of
    them, 38 s with 24 prompts of 4 MB and a grace time of 1 s.
    """
    with ThreadPoolExecutor(max_workers=1) as own:
        return await asyncio.get_running_loop().run_in_executor(own, act)


async def serve(
    address: str, load: Callable[[], Served], grace: float, announce: Callable[[str], None] = lambda address: None
) -> None:
    """Serve what `load` returns until SIGTERM or SIGINT, then drain.

    Args:
        address: where to listen.
        load: makes what is served, with a runner that is warmed up; called on a thread of its own.
        grace: seconds that open requests have to end after the signal.
        announce: told the address once the services are SERVING.

    Raises:
        AddressTaken: the address cannot be listened on.
        BundleError: the bundle cannot be loaded.
        EngineDied: the engine's thread ended; another process should take over.
    """
    requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, requested.set)
    began = time.monotonic()
    server = Server(address)
    _log("bound", address=server.address)
    served = await asyncio.to_thread(load)
    try:
        await server.start(served)
        _log("serving", address=server.address, model=served.facts.name, seconds=round(time.monotonic() - began, 3))
        announce(server.address)
        await _until(requested, served.runner)
        _log("draining", grace=grace)
        drained = await server.stop(grace)
        _log("stopped", drained=drained)
        if not requested.is_set():
            raise EngineDied("the engine's thread ended by itself, which is a bug; the log above tells of it")
    finally:
        await on_own_thread(served.runner.close)


async def _until(requested: asyncio.Event, runner: Runner) -> None:
    """Wait for the signal, or for the end of the engine's thread, which nothing tells of: it is looked for."""
    while runner.alive and not requested.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(requested.wait(), LIVENESS_INTERVAL)


def _log(event: str, **fields: object) -> None:
    logger.info(event, extra={"fields": fields})


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Bind and return the address with the port that it really got."""
    taken = AddressTaken(
        f"cannot listen on {address}: another program does, or it is no address of this machine; "
        "choose another one with --address"
    )
    if _answered(address):
        raise taken
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise taken from error
    return address if address.startswith(UNIX) else f"{address.rpartition(':')[0]}:{port}"


def _answered(address: str) -> bool:
    """Whether a program listens on a socket in the file system: gRPC would take its name away from it."""
    if not address.startswith(UNIX):
        return False
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        return client.connect_ex(address.removeprefix(UNIX)) in (0, errno.EAGAIN)  # EAGAIN: its queue is full
