"""Calls that no client of ours would make, to a server process that has to outlive them all."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from grpc_status import rpc_status
from hypothesis import strategies as st

from inflora.v1 import evaluator_service_pb2 as evaluator_pb
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.model import TaskState
from inflora_core.spool import ORIGIN
from inflora_service.doctor import Severity, examine
from inflora_service.records import TaskRecords
from tests.core import tiny
from tests.durability.hostile_images import IMAGE, Edit, Hostile
from tests.durability.scene import DEADLINE, HangError
from tests.running_server import RunningServer

_UPLOAD = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
_TASK = {"INVALID_ARGUMENT", "NOT_FOUND"}
DOCUMENTED = {
    "Predict": _UPLOAD,
    "PredictStream": _UPLOAD,
    "Evaluate": _UPLOAD,
    "LearnTask": _UPLOAD | {"ALREADY_EXISTS"},
    "QueryUpload": _TASK | {"RESOURCE_EXHAUSTED"},
    "GetTask": _TASK,
    "CancelTask": _TASK | {"FAILED_PRECONDITION"},
    "RetryTask": _TASK | {"FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"},
}
"""What a server that is well may answer. UNAVAILABLE and DATA_LOSS would say that it is not."""

OPEN_FILES_MORE = 4
"""Descriptors that a server may have more than at the beginning: SQLite opens its log of changes
at the first one, gRPC a socket or two for what it resolves, and keeps both."""

GOOD = tuple(tiny.png(colour, 900) for colour in ("red", "blue"))


class Live:
    """A server process, and raw calls to it.

    Args:
        server: It runs.
        temp: Its folder for temporary files.

    Attributes:
        channel: To the server.
    """

    def __init__(self, server: RunningServer, temp: Path) -> None:
        self.server, self.temp = server, temp
        self.channel = grpc.insecure_channel(server.address)
        self._names = itertools.count()
        self._asked = 0
        self._version = ""
        self._expected = self._answer()
        self._version = self._expected.version  # others may be published meanwhile
        self.open_files = self._open_files()
        self.memory = self.resident_bytes()

    def close(self) -> None:
        self.channel.close()

    def new_name(self) -> str:
        """Return a request id that nobody else has."""
        return f"{os.getpid()}-{self.server.process.pid}-{next(self._names)}"

    @cached_property
    def calls(self) -> dict[str, Any]:
        """What can be called, with messages as bytes."""
        learner = "/inflora.v1.LearnerService"
        unary = {
            name: self.channel.unary_unary(f"{learner}/{name}")
            for name in ("QueryUpload", "GetTask", "CancelTask", "RetryTask")
        }
        return unary | {
            "Predict": self.channel.unary_unary("/inflora.v1.PredictorService/Predict"),
            "PredictStream": self.channel.stream_stream(
                "/inflora.v1.PredictorService/PredictStream"
            ),
            "Evaluate": self.channel.stream_unary("/inflora.v1.EvaluatorService/Evaluate"),
            "LearnTask": self.channel.stream_unary(f"{learner}/LearnTask"),
        }

    def call(self, name: str, request: bytes | Sequence[bytes]) -> bytes | list[bytes] | None:
        """Make a call; return the answer, None if it was refused as it may be."""
        sent = request if isinstance(request, bytes) else iter(request)
        try:
            answer = self.calls[name](sent, timeout=DEADLINE)
            return answer if isinstance(answer, bytes) else list(answer)
        except grpc.RpcError as error:
            self.refused(name, error)
            return None

    def refused(self, name: str, error: grpc.RpcError) -> None:
        """See that a call was refused in a way that is documented."""
        code = error.code().name
        if code == "DEADLINE_EXCEEDED":
            raise HangError(f"{name} has taken more than {DEADLINE:g} s")
        assert code in DOCUMENTED[name], f"{name}: {code}: {error.details()}"
        # What gRPC refuses itself, messages over twice our limit, has no details.
        if code != "RESOURCE_EXHAUSTED":
            status = rpc_status.from_call(error)
            assert status is not None, f"{name}: {code} without details"

    def check_alive(self) -> None:
        """See that the server is there, and now and then that it answers what it always did."""
        assert self.server.process.poll() is None, "the server has ended"
        self._asked += 1
        if self._asked % 10 == 0:
            assert self._answer() == self._expected, "a sound image is answered otherwise"

    def _answer(self) -> predictor_pb.PredictResponse:
        request = predictor_pb.PredictRequest(images=GOOD, version=self._version, top_k=100)
        answer = self.call("Predict", request.SerializeToString())
        assert isinstance(answer, bytes), "a sound image is refused"
        return predictor_pb.PredictResponse.FromString(answer)

    def cancel(self, task: str) -> None:
        """Give a task up that was accepted."""
        self.call("CancelTask", learner_pb.CancelTaskRequest(name=task).SerializeToString())

    # -- what it may leave behind ---------------------------------------------------------------

    def leaks(self) -> Iterator[str]:
        """Yield what is left of calls that have all ended."""
        wait = threading.Event()
        for _ in range(500):
            found = list(self._leaks())
            if not found:
                return
            wait.wait(0.02)  # what has been answered is tidied up behind the caller's back
        yield from found

    def _leaks(self) -> Iterator[str]:
        more = len(self._open_files()) - len(self.open_files)
        if more > OPEN_FILES_MORE:
            new = sorted(set(self._open_files()) - set(self.open_files))
            yield f"{more} files more are open, among them {new[:10]}"
        store = self.server.store
        for path in self._open_files():
            if path.startswith((str(store / "spool"), str(store / "drafts"))):
                yield f"{path} is open"
        yield from (f"drafts/{path.name} is left" for path in (store / "drafts").iterdir())
        yield from (
            f"{path} is left in the folder of temporary files" for path in self.temp.iterdir()
        )
        unfinished = self._unfinished()
        for folder in (store / "spool").iterdir():
            if folder.name not in unfinished and not (folder / ORIGIN).exists():
                yield f"nobody owns spool/{folder.name}"
        for finding in examine(store, read_only=True).found:
            if finding.severity is not Severity.NOTE:
                yield f"{finding.path}: {finding.problem}"

    def _unfinished(self) -> set[str]:
        records = TaskRecords(self.server.store)
        try:
            kept = TaskState.SET_ASIDE
            states = records.states()
            return {task for task, state in states if not state.ended or state is kept}
        finally:
            records.close()

    def _open_files(self) -> list[str]:
        found = []
        for link in Path(f"/proc/{self.server.process.pid}/fd").iterdir():
            try:
                found.append(str(link.readlink()))
            except FileNotFoundError:
                continue  # closed meanwhile
        return found

    def resident_bytes(self) -> int:
        """Return the memory that the server's process takes."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


# -- image files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageCall:
    """Files that pretend to be images, on their way into the server.

    Attributes:
        way: Name of the method.
        images: The files.
        company: Whether a sound image goes with them.
        sealed: Whether an upload ends as it should, so that it may become a task.
    """

    way: str
    images: tuple[Hostile, ...]
    company: bool
    sealed: bool

    def files(self) -> list[bytes]:
        return [*GOOD[: self.company], *(image.data() for image in self.images)]

    def key(self) -> list[object]:
        return [self.way, self.company, self.sealed, *(image.data() for image in self.images)]

    def make(self, live: Live) -> None:
        files = self.files()
        predict = predictor_pb.PredictRequest(images=files)
        match self.way:
            case "Predict":
                answer = live.call(self.way, predict.SerializeToString())
                if isinstance(answer, bytes):
                    found = predictor_pb.PredictResponse.FromString(answer).predictions
                    assert len(found) == len(files)
                    assert all(0 <= each.novelty <= 1 and each.scores for each in found)
            case "PredictStream":
                message = predictor_pb.PredictStreamRequest(request=predict)
                live.call(self.way, [message.SerializeToString()])
            case "Evaluate":
                live.call(self.way, self._upload(evaluator_pb.EvaluateRequest, len(files)))
            case _:
                # Most do not end as they should: what is accepted has to be learned or given up.
                count = len(files) + (not self.sealed)
                answer = live.call(self.way, self._upload(learner_pb.LearnTaskRequest, count))
                if isinstance(answer, bytes):
                    assert self.sealed
                    live.cancel(learner_pb.LearnTaskResponse.FromString(answer).task.name)

    def _upload(self, kind: Any, count: int) -> list[bytes]:
        batch = [pb.Example(image=image, label="red") for image in self.files()]
        first = kind()
        first.spec.SetInParent()
        messages = [
            first,
            kind(examples=pb.ExampleBatch(examples=batch)),
            kind(end=learner_pb.UploadEnd(example_count=count)),
        ]
        return [message.SerializeToString() for message in messages]


IMAGE_CALL = st.builds(
    ImageCall,
    st.sampled_from(["Predict", "Predict", "LearnTask", "LearnTask", "PredictStream", "Evaluate"]),
    st.lists(IMAGE, min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from([False] * 7 + [True]),
)

# -- messages of uploads ------------------------------------------------------------------------

LABELS = (
    "red",
    "red",
    "blue",
    "e\N{COMBINING ACUTE ACCENT}",
    "",
    " red",
    "a\0b",
    "x" * 201,
    "x" * 10**5,
)
LABELS += (
    "\N{ZERO WIDTH JOINER}",
    "\N{RIGHT-TO-LEFT OVERRIDE}x",
    "\N{ZERO WIDTH NO-BREAK SPACE}",
    "[forgotten]",
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
INT32, INT64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
PARENTS = st.sampled_from(
    ["models/default", "models/other", "models/", "models/default/tasks/a", "\0"]
)


@dataclass(frozen=True)
class Spec:
    """A spec, whose request is one of a few of the history, or none, or what a text says."""

    request: int | str | None
    fields: dict[str, Any]

    def put(self, message: learner_pb.LearnTaskRequest, names: Names) -> None:
        message.spec.CopyFrom(pb.TaskSpec(request_id=names.of(self.request), **self.fields))


@dataclass(frozen=True)
class Examples:
    """Labelled files."""

    examples: tuple[tuple[bytes, str], ...]

    def put(self, message: learner_pb.LearnTaskRequest, names: Names) -> None:
        names.sent += len(self.examples)
        message.examples.SetInParent()
        for image, label in self.examples:
            message.examples.examples.add(image=image, label=label)


@dataclass(frozen=True)
class End:
    """An end, that says how many examples there were beyond those that there were."""

    beyond: int = 0

    def put(self, message: learner_pb.LearnTaskRequest, names: Names) -> None:
        count = names.sent + self.beyond
        message.end.example_count = max(-(2**31), min(count, 2**31 - 1))


@dataclass(frozen=True)
class Nothing:
    """A message without content."""

    def put(self, message: learner_pb.LearnTaskRequest, names: Names) -> None:
        pass


@dataclass
class Names:
    """What a history calls its requests, and how many examples an upload has sent."""

    prefix: str
    sent: int = 0

    def of(self, request: int | str | None) -> str:
        return f"{self.prefix}-{request}" if isinstance(request, int) else request or ""


@dataclass(frozen=True)
class Message:
    """A message of an upload, in bytes that may have been changed.

    Attributes:
        content: What it holds.
        more: Bytes behind it: fields that nobody knows, or another content.
        edits: Changes of the bytes.
    """

    content: Spec | Examples | End | Nothing
    more: bytes = b""
    edits: tuple[Edit, ...] = ()

    def data(self, names: Names) -> bytes:
        message = learner_pb.LearnTaskRequest()
        self.content.put(message, names)
        data = message.SerializeToString() + self.more
        for edit in self.edits:
            data = edit.applied(data)
        return data


@dataclass(frozen=True)
class Upload:
    """An upload.

    Attributes:
        messages: What is sent.
        pause: Before which message other steps are made, if any are.
        meanwhile: These.
        leave: Whether the caller is gone then.
    """

    messages: tuple[Message, ...]
    pause: int = 0
    meanwhile: tuple[Ask, ...] = ()
    leave: bool = False

    def make(self, live: Live, prefix: str) -> None:
        names = Names(prefix)
        reached, go_on = threading.Event(), threading.Event()
        data = [message.data(names) for message in self.messages]

        def outgoing() -> Iterator[bytes]:
            yield from data[: self.pause]
            reached.set()
            go_on.wait(DEADLINE)
            yield from () if self.leave else data[self.pause :]

        call = live.calls["LearnTask"].future(outgoing(), timeout=DEADLINE)
        call.add_done_callback(lambda _: reached.set())
        try:
            reached.wait(DEADLINE)
            for step in self.meanwhile:
                step.make(live, prefix)
            if self.leave:
                call.cancel()
        finally:
            go_on.set()
        self._take(live, call)

    def _take(self, live: Live, call: Any) -> None:
        try:
            answer = call.result(DEADLINE)
        except grpc.FutureCancelledError:
            return
        except grpc.FutureTimeoutError as error:
            raise HangError("an upload has not ended") from error
        except grpc.RpcError as error:
            live.refused("LearnTask", error)
            return
        task = learner_pb.LearnTaskResponse.FromString(answer).task
        assert task.example_count > 0, "a task without examples was accepted"
        live.cancel(task.name)


@dataclass(frozen=True)
class Ask:
    """A question about an upload or a task, or something that is asked of a task."""

    method: str
    subject: int | str | None

    def make(self, live: Live, prefix: str) -> None:
        subject = Names(prefix).of(self.subject)
        kind = getattr(learner_pb, f"{self.method}Request")
        field = "request_id" if self.method == "QueryUpload" else "name"
        live.call(self.method, kind(**{field: subject}).SerializeToString())


@dataclass(frozen=True)
class History:
    """Some uploads and questions, one after the other, that go by the same few names."""

    steps: tuple[Upload | Ask, ...]

    def key(self) -> list[object]:
        return [repr(self.steps)]

    def make(self, live: Live) -> None:
        prefix = live.new_name()
        for step in self.steps:
            step.make(live, prefix)


REQUEST = st.one_of(st.sampled_from([0, 0, 0, 1, None]), st.sampled_from(["x" * 129, "\0", "é"]))
SPEC = st.builds(
    Spec,
    REQUEST,
    st.fixed_dictionaries(
        {},
        optional={
            "resume_from": st.one_of(st.integers(-1, 5), INT64),
            "display_name": TEXT,
            "parent": PARENTS,
            "epochs": st.one_of(st.integers(0, 2), INT32),
            "rank": st.one_of(st.integers(0, 4), INT32),
            "batch_size": INT32,
            "seed": INT64,
            "learning_rate": NUMBER,
            "held_out_share": NUMBER,
        },
    ).filter(lambda fields: len(fields) < 4),
)
PLAIN_SPEC = st.builds(
    Spec,
    REQUEST,
    st.fixed_dictionaries({}, optional={"resume_from": st.integers(0, 4)}),
)
FILES = st.sampled_from([*GOOD * 4, b"", b"\x89PNG\r\n\x1a\n", GOOD[0][:-5]])
PLAIN_EXAMPLES = st.builds(
    Examples,
    st.lists(
        st.tuples(st.sampled_from(GOOD), st.sampled_from(["red", "blue"])), min_size=1, max_size=3
    ).map(tuple),
)
EXAMPLES = st.builds(
    Examples,
    st.lists(st.tuples(FILES, st.one_of(st.sampled_from(LABELS), TEXT)), max_size=3).map(tuple),
)
ENDS = st.builds(End, st.one_of(st.integers(-3, 3), INT32))
UNKNOWN = st.sampled_from(
    [
        b"",
        b"",
        b"\xa0\x06\x01",
        b"\xfa\x7f\x03abc",
        b"\x0a\x00",
        b"\x12\x00",
        b"\x1a\x02\x08\x01",
        b"\xff",
    ]
)
BYTE_EDITS = st.lists(
    st.builds(
        Edit,
        st.sampled_from(["cut", "set", "insert"]),
        st.integers(0, 1000).map(lambda thousandths: thousandths / 1000),
        st.binary(min_size=1, max_size=8),
    ),
    max_size=2,
).map(tuple)
MESSAGE = st.builds(
    Message, st.one_of(SPEC, EXAMPLES, ENDS, st.just(Nothing())), UNKNOWN, BYTE_EDITS
)

Change = Callable[[list[Message], int], None]


def _drop(messages: list[Message], at: int) -> None:
    del messages[at]


def _repeat(messages: list[Message], at: int) -> None:
    messages.insert(at, messages[at])


def _to_the_end(messages: list[Message], at: int) -> None:
    messages.append(messages.pop(at))


@st.composite
def _messages(draw: st.DrawFn) -> tuple[Message, ...]:
    """An upload as it should be, with some changes."""
    middle = draw(st.lists(PLAIN_EXAMPLES, max_size=3))
    messages = [Message(part) for part in (draw(PLAIN_SPEC), *middle, End())]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        if not messages:
            break
        at = draw(st.integers(0, len(messages) - 1))
        change = draw(st.sampled_from([_drop, _repeat, _to_the_end, None, None]))
        if change is not None:
            change(messages, at)
        elif draw(st.booleans()):
            messages[at] = draw(MESSAGE)
        else:
            messages.insert(at, draw(MESSAGE))
    return tuple(messages)


ASK = st.builds(
    Ask,
    st.sampled_from(["QueryUpload", "QueryUpload", "GetTask", "CancelTask", "RetryTask"]),
    st.one_of(
        st.sampled_from([0, 0, 1, None]),
        st.sampled_from(["models/default/tasks/x", "models/default/tasks/../x", "x" * 200, "\0"]),
    ),
)
UPLOAD = st.builds(
    Upload,
    st.one_of(_messages(), _messages(), _messages(), st.lists(MESSAGE, max_size=4).map(tuple)),
    st.integers(0, 4),
    st.lists(ASK, max_size=1).map(tuple),
    st.sampled_from([False, False, True]),
)
HISTORY = st.builds(
    History, st.lists(st.one_of(UPLOAD, UPLOAD, ASK), min_size=1, max_size=3).map(tuple)
)
