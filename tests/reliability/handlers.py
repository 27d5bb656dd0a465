"""The service's handlers behind their interceptor, called without a socket: a hundred times as many a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import status_pb2

from diffusiongemma.v1 import generation_pb2_grpc, model_pb2_grpc
from service.calls import Calls
from service.client import CallFailed
from service.generation import GenerationServicer
from service.intake import Intake
from service.interceptor import StatusInterceptor
from service.model import ModelServicer
from service.prompt_threads import PromptThreads
from service.quota import ClientLimits, Quotas
from service.security import Security, SecuritySettings
from service.served import Served
from service.status import DETAILS_KEY, MAX_STATUS_BYTES
from service.transport import MAX_MESSAGE_BYTES

PATIENCE = 0.3
"""Seconds after which the client leaves."""
READ = 12
"""Events after which it leaves as well."""
HANGS = 20.0
"""Seconds within which a handler ends whose client has left."""


class Unmapped(AssertionError):
    """A call ended in a way that no client can make sense of."""


@dataclass
class Ended:
    """How a call ended, as its client sees it."""

    responses: list[Any]
    failure: CallFailed | None = None
    left: bool = False
    """The client had enough."""

    @property
    def name(self) -> str:
        """For counting."""
        return self.failure.reason if self.failure is not None else "left" if self.left else "OK"


@dataclass
class _Context:
    """What a handler sees of its call."""

    serialize: Any
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    written: list[Any] = field(default_factory=list)
    failure: CallFailed | None = None

    async def write(self, response: Any) -> None:
        self.serialize(response)
        self.written.append(response)
        if len(self.written) >= READ:
            self.enough.set()
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, message: str, trailers: Sequence[tuple[str, bytes]]) -> None:
        [(key, raw)] = trailers
        status = status_pb2.Status.FromString(raw)
        if key != DETAILS_KEY or len(raw) > MAX_STATUS_BYTES or status.code != code.value[0]:
            raise Unmapped(f"{code}: {message} with {len(raw)} bytes of details")
        details = grpc.aio.Metadata(*trailers)
        self.failure = CallFailed.of(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), details, message))
        raise grpc.aio.AbortError

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50000"

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        return {}


class Handlers:
    """Every method of the contract, by its name. Needs a running event loop."""

    def __init__(self, served: Served) -> None:
        threads = PromptThreads()
        intake = Intake(served, Calls(), threads, Quotas(lambda _: ClientLimits()))
        self._found: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._interceptor = StatusInterceptor(Security(SecuritySettings()).authenticator, MAX_MESSAGE_BYTES)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(intake), self)  # type: ignore[arg-type]
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(intake), self)  # type: ignore[arg-type]
        self.close = threads.close

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """As a server has it; the registered ones say the same."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """As a server has it."""
        self._found.update(handlers)

    async def call(self, method: str, messages: Sequence[bytes]) -> Ended:
        """Call a method; its client leaves after `PATIENCE` or `READ`.

        Raises:
            Unmapped: the call ended without a status of the contract, or not at all.
        """
        found = self._found[method]

        async def handler(_: object) -> Any:
            return found

        service = "ModelService" if method == "GetModel" else "GenerationService"
        details: Any = _Details(f"/diffusiongemma.v1.{service}/{method}")
        guarded: Any = await self._interceptor.intercept_service(handler, details)
        context = _Context(found.response_serializer)
        requests = _each(messages if found.request_streaming else messages[:1])
        return await _ended(asyncio.create_task(guarded.stream_stream(requests, context)), context)


@dataclass
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


async def _each(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
        await asyncio.sleep(0)


async def _ended(task: asyncio.Task[Any], context: _Context) -> Ended:
    enough = asyncio.create_task(context.enough.wait())
    await asyncio.wait([task, enough], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    enough.cancel()
    left = task.cancel()
    done, _ = await asyncio.wait([task], timeout=HANGS)
    if not done:
        raise Unmapped(f"the handler did not end in {HANGS} s after its client had left")
    if task.cancelled():
        return Ended(context.written, left=True)
    error = task.exception()
    if error is not None and not isinstance(error, grpc.aio.AbortError):
        raise Unmapped(f"{type(error).__name__} left the interceptor: {error}") from error
    return Ended(context.written, context.failure, left and context.failure is None)
