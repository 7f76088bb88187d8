"""``EvaluatorService``: decode, call ``Evaluator``, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from inflora.v1 import evaluator_service_pb2 as pb
from inflora.v1 import evaluator_service_pb2_grpc
from inflora_core.config import Limits
from inflora_service import codec, receiving
from inflora_service.access import principal
from inflora_service.errors import Context, fields_under
from inflora_service.evaluating import Evaluator


class EvaluatorServicer(evaluator_service_pb2_grpc.EvaluatorServiceServicer):
    """Handlers; ``ErrorInterceptor`` turns what they raise into a status."""

    def __init__(self, evaluator: Evaluator, limits: Limits) -> None:
        self._evaluator = evaluator
        self._limits = limits

    async def Evaluate(
        self, request_iterator: AsyncIterator[pb.EvaluateRequest], context: Context
    ) -> pb.EvaluateResponse:
        """Measure a version on an upload."""
        first = await receiving.first_message(request_iterator, self._limits)
        with fields_under("spec."):
            spec = codec.decode_evaluation_spec(first.spec)
        async with AsyncExitStack() as stack:
            with fields_under("spec.", name="version"):
                examination = await stack.enter_async_context(
                    self._evaluator.examination(spec.version)
                )
            await receiving.receive(request_iterator, examination, self._limits)
            keep = principal().may("learn")
            evaluation = await examination.finish(spec.confusions, keep=keep)
        # In a thread: ten thousand classes take tenths of a second.
        encoded = await asyncio.to_thread(codec.encode_evaluation, evaluation, examination.version)
        return pb.EvaluateResponse(evaluation=encoded)
