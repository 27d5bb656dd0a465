"""The standard health service, in which no watcher can hold up another one or the server.

The one that comes with grpcio-health-checking writes to its watchers under the lock that a change of status needs: a
watcher that opens its window for no byte keeps everybody from the news, and the server from shutting down.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

Status: TypeAlias = int
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Health(health_pb2_grpc.HealthServicer):
    """The status of the server, whose name is empty, and of its services. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}
        self._changed = asyncio.Event()
        """Of the statuses as they are; the next ones have another event."""

    def turn(self, status: Status, *services: str) -> None:
        """Give services a status and tell whoever watches; without names, all that have one."""
        self._statuses |= dict.fromkeys(services or self._statuses, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Tells a service's status."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service; leave the name empty")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        """Writes a service's status and whatever becomes of it, until the call ends."""
        told = None
        while True:
            # Taken before the status: what changes while a slow client is written to is seen in the next round.
            changed = self._changed
            status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await changed.wait()
