"""Health of the server's services, by gRPC's own protocol (grpc.health.v1).

Not grpc_health's servicer for asyncio: that writes to a client while it holds the lock that every
change takes. One who opens a ``Watch`` and reads nothing would keep all states as they are, and the
server from stopping.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inflora_service.errors import Context

_States = health_pb2.HealthCheckResponse
_LONGEST_NAME = 256
"""Of a service: what is asked for is kept as long as the call."""


class Health(health_pb2_grpc.HealthServicer):
    """Tells how services are, until ``end``."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._ended = False
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Say from now on that a service is, or is not, serving."""
        self._serving[service] = serving and not self._ended
        self._changed.set()
        self._changed = asyncio.Event()

    def of(self, service: str) -> bool | None:
        """Return whether a service is serving, None if there is no such."""
        return self._serving.get(service)

    def end(self) -> None:
        """Say of all services, for good, that they are not serving."""
        self._ended = True
        for service in self._serving:
            self.set(service, serving=False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Say how a service is."""
        await _check_name(request, context)
        if self.of(request.service) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return self._said(request.service)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Say how a service is, and again whenever it changes."""
        await _check_name(request, context)
        last = None
        while True:
            changed, state = self._changed, self._said(request.service)
            if state != last:
                last = state
                yield state
            else:
                await changed.wait()

    async def List(self, request: object, context: Context) -> None:
        """Say that there is no such rpc."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask Check or Watch")

    def _said(self, service: str) -> health_pb2.HealthCheckResponse:
        serving = self.of(service)
        if serving is None:
            return _States(status=_States.SERVICE_UNKNOWN)
        return _States(status=_States.SERVING if serving else _States.NOT_SERVING)


class CheckOnly(health_pb2_grpc.HealthServicer):
    """The same for probes: a call that stays open would take the place of one of theirs."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Say how a service is."""
        return await self._health.Check(request, context)

    async def Watch(self, request: object, context: Context) -> None:
        """Say that there is no such rpc here."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask Check, or Watch on the main port")

    async def List(self, request: object, context: Context) -> None:
        """Likewise."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask Check")


async def _check_name(request: health_pb2.HealthCheckRequest, context: Context) -> None:
    if len(request.service) > _LONGEST_NAME:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "that is no name of a service")
