"""Calls of methods that nobody serves, answered before gRPC looks at their names.

gRPC decodes the path of such a call as UTF-8 outside of any handler (grpcio 1.85.1, `_server_main_loop`): one request
whose path is none ends its loop, and with it every call of the server, while the process lives on without a port. It
needs no token. So these calls are taken from gRPC's hands where it asks for the next of them, which is private to it;
`tests/service/test_unknown_methods.py` fails with a version that does it otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server


class _Loop(cygrpc.AioServer):  # type: ignore[misc]
    """gRPC's server, whose loop only ever sees calls of methods that are registered, as all generated code does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *arguments: Any) -> None:
        super().__init__(loop, *arguments)
        self._running_loop = loop
        self._refusals: set[asyncio.Task[None]] = set()

    def _make_request_call_future(self, method: bytes | None) -> Any:
        if method is not None:
            return super()._make_request_call_future(method)
        return self._running_loop.create_task(self._refuse_all())

    async def _refuse_all(self) -> Any:
        """Refuse one call after the other, until the server ends: that raises gRPC's own signal."""
        while True:
            refusal = asyncio.create_task(_refuse(await self._request_call(), self._running_loop))
            self._refusals.add(refusal)
            refusal.add_done_callback(self._refusals.discard)


async def _refuse(call: Any, loop: asyncio.AbstractEventLoop) -> None:
    context = cygrpc._ServicerContext(call, None, None, loop)
    with suppress(grpc.aio.AbortError, grpc.aio.InternalError):  # It is told, or there is nobody left to tell.
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


class _Server(_server.Server):
    """`grpc.aio.Server` around such a loop.

    Made with it and not changed to it afterwards: a loop that was made and never started ends the process with a
    segmentation fault, some time after nobody holds it any more.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, int]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = _Loop(self._loop, None, (), tuple(interceptors), tuple(options), None)


def server(interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """`grpc.aio.server`, which lives on whatever a path holds."""
    return _Server(interceptors, options)  # type: ignore[return-value]  # The stubs know no private names.
