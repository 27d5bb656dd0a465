"""The gRPC server of one model: its address, its services, and how it drains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from diffusiongemma.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from runtime.runner import Runner
from service import unknown_methods
from service.address import AddressTaken, check_free, with_port
from service.calls import Calls
from service.generation import GenerationServicer
from service.health import SERVICE_NAME as HEALTH
from service.health import Health
from service.intake import Intake
from service.interceptor import StatusInterceptor
from service.model import ModelServicer
from service.prompt_threads import PromptThreads
from service.quota import Quotas
from service.security import Security
from service.served import Served
from service.transport import MAX_MESSAGE_BYTES, OPTIONS

T = TypeVar("T")

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)

LAST_CALL = 2.0
"""Seconds that the engine's call in progress has to return once nobody waits for it any more. It may take minutes (a
large model on few cores) or never return: the process ends all the same."""

LAST_WRITES = 1.0
"""Seconds after the grace time in which statuses still reach clients that read; the others are cut off."""


class Server:
    """A gRPC server for one model, from its address on; `start` and `stop` make up its life."""

    def __init__(self, address: str, security: Security) -> None:
        """Bind `address`, `host:port` or `unix:path`; port 0 takes a free one. Needs a running event loop.

        Raises:
            AddressTaken: something else listens there, or the address is none.
        """
        check_free(address)
        interceptor = StatusInterceptor(security.authenticator, MAX_MESSAGE_BYTES)
        self._server = unknown_methods.server([interceptor], OPTIONS)
        self.address = with_port(address, _bind(self._server, address, security.credentials))
        self._quotas = Quotas(security.limits_of)
        self._health = Health()
        self._calls = Calls()
        self._threads = PromptThreads()
        self._runner: Runner | None = None

    async def start(self, served: Served) -> None:
        """Answer clients for `served`, whose runner runs; health then says SERVING, for the server and each service."""
        self._runner = served.runner
        intake = Intake(served, self._calls, self._threads, self._quotas)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(intake), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(intake), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        reflected = (HEALTH, channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name)
        reflection.enable_server_reflection((*SERVICES, *reflected, reflection.SERVICE_NAME), self._server)
        await self._server.start()
        self._health.turn(health_pb2.HealthCheckResponse.SERVING, "", *SERVICES)

    async def stop(self, grace: float, hurried: asyncio.Event | None = None) -> bool:
        """Turn NOT_SERVING, let open requests end within `grace` seconds, end the others with UNAVAILABLE.

        Args:
            grace: seconds.
            hurried: ends the grace time when it is set.

        Returns:
            Whether all requests ended by themselves.
        """
        self._calls.drain()
        self._health.turn(health_pb2.HealthCheckResponse.NOT_SERVING)
        drained = True
        if self._runner is not None:
            drained = await _drained(self._runner, grace, hurried or asyncio.Event())
        self._threads.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._calls.wait_idle(), LAST_WRITES)
        # What still stands are streams that nobody reads and the watchers of health, which would never end.
        await self._server.stop(None)
        return drained

    async def abandon(self) -> None:
        """Turn NOT_SERVING and end all calls with UNAVAILABLE, whatever the runner does."""
        self._calls.drain()
        self._health.turn(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._threads.close()
        await self._server.stop(None)


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """The port that was got."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:  # taken since it was looked at
        raise AddressTaken(address, "another program does") from error


async def _drained(runner: Runner, grace: float, hurried: asyncio.Event) -> bool:
    """Whether the runner's requests ended by themselves, in the grace time or until somebody was in a hurry."""
    draining = asyncio.create_task(on_own_thread(partial(runner.drain, grace, LAST_CALL)))
    hurry = asyncio.create_task(hurried.wait())
    await asyncio.wait([draining, hurry], return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if draining.done():
        return await draining
    await on_own_thread(partial(runner.drain, 0, LAST_CALL))
    draining.cancel()
    return False


async def on_own_thread(act: Callable[[], T]) -> T:
    """`act`'s result, from a thread that no request can occupy, and that nobody waits for where this is cancelled."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if done.done() else result())

    def run() -> None:
        try:
            result = act()
        except BaseException as error:
            tell(partial(done.set_exception, error))
        else:
            tell(partial(done.set_result, result))

    threading.Thread(target=run, name="ending", daemon=True).start()
    return await done
