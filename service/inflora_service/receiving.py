"""The messages of an upload, which LearnTask and Evaluate take alike: a spec, examples, an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeVar

from inflora.v1 import evaluator_service_pb2, learner_service_pb2
from inflora_core.config import Limits
from inflora_core.errors import BrokenOffError, InvalidInputError, UnavailableError
from inflora_service import codec
from inflora_service.uploads import Example

Request = TypeVar(
    "Request", learner_service_pb2.LearnTaskRequest, evaluator_service_pb2.EvaluateRequest
)


class Receiver(Protocol):
    """Takes the examples of an upload."""

    async def add(self, examples: Sequence[Example]) -> None:
        """Take a batch, which may be refused."""

    def check_count(self, count: int) -> None:
        """Raise ``InvalidInputError`` unless ``count`` examples have arrived."""


async def first_message(requests: AsyncIterator[Request], limits: Limits) -> Request:
    """Return the first message of an upload.

    Raises:
        InvalidInputError: there is none, or it holds no spec.
        UnavailableError: it does not come in time.
    """
    first = await _next(requests, limits)
    if first is None or not first.HasField("spec"):
        raise InvalidInputError("the first message must hold the spec", field="spec")
    return first


async def receive(requests: AsyncIterator[Request], receiver: Receiver, limits: Limits) -> None:
    """Give ``receiver`` all examples that follow the first message.

    Raises:
        InvalidInputError: the messages are not examples and then one end.
        BrokenOffError: there is no end.
        UnavailableError: the next message does not come in time.
        LimitExceededError: a message is over its limit.
        InfloraError: what ``receiver`` raises.
    """
    ended = False
    while (message := await _next(requests, limits)) is not None:
        if ended:
            raise InvalidInputError("nothing may follow the end", field="payload")
        codec.check_size(message, limits, field="examples")
        match message.WhichOneof("payload"):
            case "examples":
                await receiver.add(codec.decode_examples(message.examples))
            case "end":
                receiver.check_count(message.end.example_count)
                ended = True
            case "spec":
                raise InvalidInputError("only the first message holds a spec", field="spec")
            case _:
                raise InvalidInputError("the message is empty", field="payload")
    if not ended:
        # A client that vanished can look like one that closed its side of the stream.
        raise BrokenOffError("the upload broke off: it has no end", field="end")


async def _next(requests: AsyncIterator[Request], limits: Limits) -> Request | None:
    """Return the next message, None if there is none any more."""
    seconds = limits.upload_idle_seconds
    try:
        async with asyncio.timeout(seconds):
            return await anext(requests, None)
    except TimeoutError:
        # A connection can be half dead for hours before the system notices.
        raise UnavailableError(
            f"the upload is ended: there was no message for {seconds:g} s"
        ) from None
