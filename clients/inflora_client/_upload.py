"""What an upload consists of: a spec, then examples in batches of a size that streams well."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from typing import TypedDict

from inflora.v1 import learner_service_pb2, task_pb2
from inflora_client._images import ImageSource, read_image
from inflora_client._names import Names, new_request_id, normalised

_BATCH_BYTES = 512 * 1024  # gRPC streams best with messages of 256 KiB to 1 MiB

LabelledImage = tuple[ImageSource, str]
Examples = Iterable[LabelledImage]
AnyExamples = Examples | AsyncIterable[LabelledImage]


class LearnOptions(TypedDict, total=False):
    """What a caller may choose for one task; the server's setting holds for what is left out.

    Attributes:
        display_name: Free text for people, at most 200 characters.
        request_id: At most 128 characters. The same id with the same content returns the task that
            exists. By default, or empty, a new random one.
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


def task_spec(names: Names, options: LearnOptions) -> task_pb2.TaskSpec:
    """Return the spec, with a random request id where the caller gave none."""
    spec = task_pb2.TaskSpec(parent=names.model, **options)
    spec.request_id = spec.request_id or new_request_id()
    return spec


def repeatable(examples: AnyExamples) -> bool:
    """Whether the examples can be sent once more: an iterator is used up by the first upload."""
    return isinstance(examples, Sequence)


def messages(
    spec: task_pb2.TaskSpec, examples: Examples
) -> Iterator[learner_service_pb2.LearnTaskRequest]:
    """Yield the messages of an upload, reading images as they are needed."""
    batcher, count = Batcher(), 0
    yield learner_service_pb2.LearnTaskRequest(spec=spec)
    for image, label in examples:
        yield from batcher.add(read_image(image), label)
        count += 1
    yield from batcher.flush()
    end = learner_service_pb2.UploadEnd(example_count=count)
    yield learner_service_pb2.LearnTaskRequest(end=end)


class Batcher:
    """Collects examples into messages of about 512 KiB.

    A larger image goes into a message of its own.
    """

    def __init__(self) -> None:
        self._pending: list[task_pb2.Example] = []
        self._pending_bytes = 0

    def add(self, image: bytes, label: str) -> Iterator[learner_service_pb2.LearnTaskRequest]:
        """Take one example in; yield the message that became full by it, if one did."""
        example = task_pb2.Example(image=image, label=normalised(label))
        size = example.ByteSize()
        if self._pending_bytes + size > _BATCH_BYTES:
            yield from self.flush()
        self._pending.append(example)
        self._pending_bytes += size

    def flush(self) -> Iterator[learner_service_pb2.LearnTaskRequest]:
        """Yield what is left, if anything is."""
        if self._pending:
            batch = task_pb2.ExampleBatch(examples=self._pending)
            yield learner_service_pb2.LearnTaskRequest(examples=batch)
        self._pending, self._pending_bytes = [], 0
