"""The one place where a call's errors become its status.

Around every handler: who calls is found out (`service.authentication`), then its requests are read and parsed
(`service.wire`). An error of the project's tree becomes the status of `service.status`, any other exception INTERNAL
with a correlation id. gRPC's own signals pass through untouched: an abort that is under way, a cancelled task
(CancelledError), a generator that is closed (GeneratorExit), and the failed write to a client that has gone. Each call
leaves one line in the log, without any of its content.

All handlers are run as coroutines that read and write. gRPC would read the one message of a call before anybody is
asked, so that who sends many of them in part fills the memory: here it is read when its client has a place for it
(`service.receiving`). And a call that ends while its handler is suspended at `yield` would leave the generator to the
garbage collector, one that awaits `write` learns of it there.
"""

from __future__ import annotations

import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, cast

import grpc
from google.rpc import status_pb2

from runtime.errors import DgemmaError
from service.authentication import CALLER, Authenticator, Caller, by_peer
from service.receiving import Receiving
from service.status import DETAILS_KEY, code_of, internal_status, status_of
from service.wire import parse

logger = logging.getLogger(__name__)

OWN_METHODS = "/diffusiongemma."
"""Calls of these are logged at INFO; those of health, reflection and channelz, which poll, at DEBUG."""

# Quoted: gRPC's classes take parameters in their stubs alone.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Guards every handler of a server."""

    def __init__(
        self, authenticator: Authenticator, max_message_bytes: int, receiving: Receiving | None = None
    ) -> None:
        self._authenticator, self._max_message_bytes = authenticator, max_message_bytes
        self._receiving = receiving or Receiving()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler that `continuation` finds, guarded; None where there is none, which gRPC answers itself."""
        handler, method = await continuation(handler_call_details), str(handler_call_details.method)
        if handler is None:
            return None
        try:
            caller = self._authenticator.by_token(method, handler_call_details.invocation_metadata or ())
        except Exception as error:  # what is no refusal, a bug, becomes INTERNAL like those of handlers
            return _refusal(method, error)
        return self._guard(handler, method, caller)

    def _guard(
        self, handler: grpc.RpcMethodHandler[Any, Any], method: str, caller: Caller | None
    ) -> grpc.RpcMethodHandler[Any, Any]:
        inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        if inspect.isasyncgenfunction(inner):
            inner = partial(_write_all, inner)
        kind = getattr(handler.request_deserializer, "__self__", None)
        service = method.rpartition("/")[0]
        # `SomeMessage.FromString`, as all generated code hands in; anything else is left to gRPC.
        read = _as_it_is if kind is None else partial(parse, kind, limit=self._max_message_bytes)

        async def guarded(requests: AsyncIterator[Any], context: Context) -> None:
            async with _translated(method, context):
                CALLER.set(caller or by_peer(context))
                client = CALLER.get().name
                if not handler.request_streaming:
                    request = await self._receiving.only_message(requests, client, service)
                    response = await inner(read(request), context)
                elif method.startswith(OWN_METHODS):
                    response = await inner(_each(read, requests), context)
                else:
                    async with self._receiving.place(client, service):
                        response = await inner(_each(read, requests), context)
                if not handler.response_streaming:
                    await context.write(response)

        deserializer = handler.request_deserializer if kind is None else None
        return grpc.stream_stream_rpc_method_handler(cast(Any, guarded), deserializer, handler.response_serializer)


def _refusal(method: str, error: Exception) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that refuses, and reads nothing: a stranger cannot make the server hold a message."""

    async def refuse(_: Any, context: Context) -> None:
        async with _translated(method, context):
            raise error

    return grpc.stream_stream_rpc_method_handler(cast(Any, refuse))


def _as_it_is(request: Any) -> Any:
    return request


async def _each(read: Callable[[Any], Any], requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield read(request)


async def _write_all(generator: Callable[[Any, Context], AsyncIterator[Any]], request: Any, context: Context) -> None:
    async with aclosing(generator(request, context)) as responses:  # type: ignore[type-var]
        async for response in responses:
            await context.write(response)


@asynccontextmanager
async def _translated(method: str, context: Context) -> AsyncIterator[None]:
    """Turns what leaves the block into the call's status, and logs how the call went."""
    started = time.monotonic()
    code = "CANCELLED"  # what is left where none of the branches below is reached
    try:
        yield
        code = "OK"
    except grpc.aio.AbortError:
        code = "ABORTED"
        raise
    except grpc.aio.InternalError:
        pass  # A write failed: the client has gone, and there is nobody left to tell.
    except DgemmaError as error:
        status = status_of(error)
        code = code_of(status).name
        await _abort(context, status)
    except Exception:
        correlation_id = uuid.uuid4().hex[:12]
        logger.exception("fault", extra={"fields": {"method": method, "correlation_id": correlation_id}})
        code = "INTERNAL"
        await _abort(context, internal_status(correlation_id))
    finally:
        level = logging.INFO if method.startswith(OWN_METHODS) else logging.DEBUG
        fields = {"method": method, "code": code, "seconds": round(time.monotonic() - started, 4)}
        caller = CALLER.get(None)
        if caller is not None and caller.known:
            fields["client"] = caller.name
        logger.log(level, "call", extra={"fields": fields})


async def _abort(context: Context, status: status_pb2.Status) -> None:
    details = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(code_of(status), status.message, details)
