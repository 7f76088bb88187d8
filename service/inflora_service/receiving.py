"""The messages of an upload, which LearnTask and Evaluate take alike: a spec, examples, an end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeVar

from inflora.v1 import evaluator_service_pb2, learner_service_pb2
from inflora_core.config import Limits
from inflora_core.errors import InvalidInputError
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


async def first_message(requests: AsyncIterator[Request]) -> Request:
    """Return the first message of an upload.

    Raises:
        InvalidInputError: there is none, or it holds no spec.
    """
    first = await anext(requests, None)
    if first is None or not first.HasField("spec"):
        raise InvalidInputError("the first message must hold the spec", field="spec")
    return first


async def receive(requests: AsyncIterator[Request], receiver: Receiver, limits: Limits) -> None:
    """Give ``receiver`` all examples that follow the first message.

    Raises:
        InvalidInputError: the messages are not examples and then one end, or break off.
        LimitExceededError: a message is over its limit.
        InfloraError: what ``receiver`` raises.
    """
    ended = False
    async for message in requests:
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
        raise InvalidInputError("the upload broke off: it has no end", field="end")
