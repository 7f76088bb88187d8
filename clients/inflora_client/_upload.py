"""What an upload consists of: a spec, then examples in batches of a size that streams well."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypedDict, TypeVar

from google.protobuf.message import Message

from inflora.v1 import evaluator_service_pb2, learner_service_pb2, task_pb2
from inflora_client import _channel as channel
from inflora_client import _parse as parse
from inflora_client._images import ImageSource, read_image
from inflora_client._names import Names, VersionRef, new_request_id, normalised
from inflora_client.resources import Evaluation, Task

T = TypeVar("T")

_BATCH_BYTES = 512 * 1024  # gRPC streams best with messages of 256 KiB to 1 MiB

LabelledImage = tuple[ImageSource, str]
Examples = Iterable[LabelledImage]
AnyExamples = Examples | AsyncIterable[LabelledImage]


class LearnOptions(TypedDict, total=False):
    """What a caller may choose for one task; the server's setting holds for what is left out.

    Attributes:
        display_name: Free text for people, at most 200 characters.
        request_id: At most 128 characters. The same id with the same content returns the task that
            exists. By default, or empty, a new random one. The server knows a broken upload by it.
        epochs: Passes over the training images, 1 to 10000.
        learning_rate: Base learning rate, above 0 and at most 10.
        rank: Upper bound of the rank of the update in every layer, 1 to 1024.
        batch_size: Images per step, 1 to 4096.
        seed: Seed of every random choice in this task, >= 0.
        held_out_share: Share of each class's images kept out of training, 0 to 0.5.
    """

    display_name: str
    request_id: str
    epochs: int | None
    learning_rate: float | None
    rank: int | None
    batch_size: int | None
    seed: int | None
    held_out_share: float | None


@dataclass(frozen=True, slots=True)
class Upload(Generic[T]):
    """All of an upload but the examples.

    Attributes:
        rpc: The method.
        request: Type of its requests, whose fields are ``spec``, ``examples`` and ``end``.
        spec: What goes first.
        parse: Turns the response into what the caller gets.
        request_id: Under which the server keeps what there is of it when it breaks off; empty if
            it does not.
        own_id: Whether nobody else can have used that id.
    """

    rpc: channel.Rpc
    request: Callable[..., Message]
    spec: Message
    parse: Callable[[Any], T]
    request_id: str = ""
    own_id: bool = False

    def messages(self, examples: Examples, start: int = 0) -> Iterator[Message]:
        """Yield the messages, reading images as they are needed.

        Args:
            examples: All of them.
            start: How many of them the server has already; their images are not read.
        """
        batcher, count = Batcher(), start
        yield self.request(spec=self._spec_from(start))
        for image, label in islice(examples, start, None):
            for batch in batcher.add(read_image(image), label):
                yield self.request(examples=batch)
            count += 1
        for batch in batcher.flush():
            yield self.request(examples=batch)
        yield self.request(end=learner_service_pb2.UploadEnd(example_count=count))

    def _spec_from(self, start: int) -> Message:
        if not isinstance(self.spec, task_pb2.TaskSpec):
            return self.spec
        spec = task_pb2.TaskSpec()
        spec.CopyFrom(self.spec)
        spec.resume_from = start
        return spec


def learn(names: Names, options: LearnOptions) -> Upload[Task]:
    """LearnTask, with a random request id where the caller gave none."""
    spec = task_pb2.TaskSpec(parent=names.model, **options)
    own_id = not spec.request_id
    spec.request_id = spec.request_id or new_request_id()
    return Upload(
        channel.LEARN_TASK,
        learner_service_pb2.LearnTaskRequest,
        spec,
        lambda r: parse.task(r.task),
        request_id=spec.request_id,
        own_id=own_id,
    )


def evaluate(names: Names, version: VersionRef | None, confusions: int) -> Upload[Evaluation]:
    """Evaluate."""
    spec = evaluator_service_pb2.EvaluationSpec(
        model=names.model,
        version="" if version is None else names.version(version),
        confusions=confusions,
    )
    request = evaluator_service_pb2.EvaluateRequest
    return Upload(channel.EVALUATE, request, spec, lambda r: parse.evaluation(r.evaluation))


def repeatable(examples: AnyExamples) -> bool:
    """Whether the examples can be sent once more: an iterator is used up by the first upload."""
    return not isinstance(examples, Iterator | AsyncIterator)


class Batcher:
    """Collects examples into batches of about 512 KiB.

    A larger image goes into a batch of its own.
    """

    def __init__(self) -> None:
        self._pending: list[task_pb2.Example] = []
        self._pending_bytes = 0

    def add(self, image: bytes, label: str) -> Iterator[task_pb2.ExampleBatch]:
        """Take one example in; yield the batch that became full by it, if one did."""
        example = task_pb2.Example(image=image, label=normalised(label))
        size = example.ByteSize()
        if self._pending_bytes + size > _BATCH_BYTES:
            yield from self.flush()
        self._pending.append(example)
        self._pending_bytes += size

    def flush(self) -> Iterator[task_pb2.ExampleBatch]:
        """Yield what is left, if anything is."""
        if self._pending:
            yield task_pb2.ExampleBatch(examples=self._pending)
        self._pending, self._pending_bytes = [], 0
