"""From an exception in a handler to what a client is told."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora_core import errors as core
from inflora_service import errors
from inflora_service.records import TaskRecords
from tests.service.conftest import Running, fails, fault_of


def _kinds(kind: type[core.InfloraError]) -> Iterator[type[core.InfloraError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


def test_every_error_has_its_status() -> None:
    kinds = set(_kinds(core.InfloraError))
    assert set(errors.CODES) == kinds
    assert set(core.ERRORS_BY_REASON.values()) == kinds


@pytest.mark.parametrize("kind", errors.CODES)
def test_a_status_says_reason_and_field(kind: type[core.InfloraError]) -> None:
    status = errors.to_status(kind("what is wrong", field="images[3]"))
    assert status.code == errors.CODES[kind].value[0]
    assert status.message == "what is wrong"
    info, request = status.details
    assert info.type_url.endswith("google.rpc.ErrorInfo")
    assert kind.reason.encode() in info.value
    assert request.type_url.endswith("google.rpc.BadRequest")
    assert b"images[3]" in request.value


def test_no_field_no_bad_request() -> None:
    (info,) = errors.to_status(core.UnavailableError("later")).details
    assert info.type_url.endswith("google.rpc.ErrorInfo")


@given(st.text(st.characters(), max_size=5000))
def test_any_message_fits_the_metadata(message: str) -> None:
    status = errors.to_status(core.InvalidInputError(message, field=message))
    assert len(status.message.encode()) <= errors.MAX_MESSAGE_BYTES
    assert len(status.SerializeToString()) < 4096


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), core.LimitExceededError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), core.LimitExceededError),
        (OSError(errno.EFBIG, "File too large"), core.LimitExceededError),
        (OSError(errno.EMFILE, "Too many open files"), core.LimitExceededError),
        (OSError(errno.ENFILE, "Too many open files in system"), core.LimitExceededError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), core.LimitExceededError),
        (MemoryError(), core.LimitExceededError),
        (OSError(errno.EROFS, "Read-only file system"), core.UnavailableError),
        (OSError(errno.EIO, "secret"), core.UnavailableError),
        (PermissionError(errno.EACCES, "secret"), core.UnavailableError),
        (KeyError("secret"), core.InfloraError),
        (core.NotFoundError("no such thing"), core.NotFoundError),
    ],
)
def test_what_handlers_may_raise(error: Exception, kind: type[core.InfloraError]) -> None:
    found = errors.from_exception(error)
    assert type(found) is kind
    assert "secret" not in found.message


async def test_a_bug_is_logged_and_not_told(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*arguments: object) -> None:
        raise ZeroDivisionError("the secret of the house")

    with monkeypatch.context() as patch:
        patch.setattr(TaskRecords, "get", bug)
        for name in ("models/default/tasks/a", "models/default/tasks/b"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await running.get(name)
            fault = fault_of(caught.value)
            assert (fault.code, fault.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert "secret" not in str(caught.value)
            reference = fault.message.split("error ")[2].split(" ")[0]
            (record,) = [r for r in caplog.records if reference in r.getMessage()]
            assert record.levelno == logging.ERROR
            assert record.exc_info is not None
    with fails("NOT_FOUND", "NOT_FOUND", "name"):
        await running.get("models/default/tasks/a")


async def test_a_bug_in_a_stream_is_told_as_well(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TaskRecords, "get", full)
    with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
        await running.watched("models/default/tasks/a")


@pytest.mark.parametrize("name", ["/inflora.v1.LearnerService/Forget", "/other.Service/Method"])
async def test_an_unknown_method_has_details_too(running: Running, name: str) -> None:
    with fails("UNIMPLEMENTED", "NOT_FOUND"):
        await running.channel.unary_unary(name)(b"")
    with fails("UNIMPLEMENTED", "NOT_FOUND"):
        await running.channel.stream_unary(name)(iter([b"", b""]))


async def test_a_message_that_is_no_message_harms_nothing(running: Running) -> None:
    call = running.channel.unary_unary("/inflora.v1.LearnerService/GetTask")
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"\xff\xff\xff")
    with fails("NOT_FOUND", "NOT_FOUND", "name"):
        await running.get("models/default/tasks/a")


async def test_health_and_reflection_keep_their_own_statuses(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.serving("no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert await running.serving("inflora.v1.LearnerService") == "SERVING"
    response = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert not response.tasks
