"""``PredictorService``: decode, call ``Host``, encode."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import cast

from inflora.v1 import predictor_service_pb2 as pb
from inflora.v1 import predictor_service_pb2_grpc
from inflora_core.config import Limits
from inflora_core.errors import InvalidInputError, StateError
from inflora_service import codec, names
from inflora_service.aio import in_order
from inflora_service.errors import Context, fields_under
from inflora_service.serving import DEFAULT_TOP_K, Host
from inflora_service.tasks import TaskQueue
from inflora_service.turns import FOREVER

STREAM_AHEAD = 4
"""Requests of a stream worked on at a time: the next are decoded while one is classified."""


class PredictorServicer(predictor_service_pb2_grpc.PredictorServiceServicer):
    """Handlers; ``ErrorInterceptor`` turns what they raise into a status.

    Args:
        host: Answers.
        tasks: Knows tasks that have no version yet; None in a server that follows another.
        limits: What is refused.
    """

    def __init__(self, host: Host, tasks: TaskQueue | None, limits: Limits) -> None:
        self._host = host
        self._tasks = tasks
        self._limits = limits

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Classify images."""
        return await self._predict(request, deadline(context))

    async def PredictStream(
        self, request_iterator: AsyncIterator[pb.PredictStreamRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """Classify images, request by request."""
        until = deadline(context)

        async def answer(message: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
            with fields_under("request."):
                response = await self._predict(message.request, until)
            return pb.PredictStreamResponse(
                response=response, correlation_id=message.correlation_id
            )

        async with aclosing(in_order(request_iterator, answer, STREAM_AHEAD)) as answers:
            async for each in answers:
                yield each

    async def _predict(self, request: pb.PredictRequest, until: float) -> pb.PredictResponse:
        codec.check_size(request, self._limits, field="images")
        names.check_model(request.model, field="model")
        if request.top_k < 0:
            raise InvalidInputError(f"it is {request.top_k}, but at least 0", field="top_k")
        version, task = None, None
        if request.version:
            version = names.parse_version_or_current(request.version, field="version")
        if request.task:
            task = names.parse_task(request.task, field="task")
        try:
            with fields_under("", name="version"):
                answer = await self._host.predict(
                    request.images,
                    version=version,
                    task=task,
                    top_k=request.top_k or DEFAULT_TOP_K,
                    deadline=until,
                )
        except StateError:
            if task is not None and self._tasks is not None:
                with fields_under("", name="task"):
                    await self._tasks.get(task)  # a task that nobody knows is NOT_FOUND
            raise
        return codec.encode_answer(answer, embedding=request.return_embedding)


def deadline(context: Context) -> float:
    """Return until when the caller waits, by ``time.monotonic``."""
    left = cast(float | None, context.time_remaining())  # the stubs forget the None
    return FOREVER if left is None else time.monotonic() + left
