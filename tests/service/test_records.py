"""Task records, and what happens when the disk does not take what must be durable."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from inflora.v1 import task_pb2 as pb
from inflora_core.errors import NotFoundError, StoreFormatError, UnavailableError
from inflora_core.evaluation import TaskFigures
from inflora_core.model import (
    ClassUpdate,
    Failure,
    Forget,
    Progress,
    Stage,
    Task,
    TaskState,
)
from inflora_core.spool import SpoolWriter
from inflora_service import tasks
from inflora_service.evaluations import VERSIONS, Evaluations
from inflora_service.records import Score, Snapshot, TaskRecords
from tests.service.conftest import Running, Script, fails, png
from tests.service.test_bad_input import assert_unharmed


def make_task(number: int, **changes: Any) -> Task:
    fields: dict[str, Any] = {
        "id": f"task-{number}",
        "display_name": "ünï",
        "request_id": "",
        "content_sha256": "0" * 64,
        "labels": ("a", "b"),
        "example_counts": (1, 2),
        "example_bytes": 3,
        "settings": {"epochs": 3, "learning_rate": 0.1},
        "create_time": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Task(**{**fields, **changes})


def test_records_are_as_they_were_after_opening_again(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    waiting = make_task(1, request_id="r")
    failed = make_task(2, state=TaskState.FAILED, failure=Failure("PARITY", "they differ"))
    edits = [
        make_task(3, labels=(), example_counts=(), state=TaskState.CANCELLED, edit=edit)
        for edit in (Forget(("a", "b"), purge=True), ClassUpdate("a", None, ("x",), ("y", "z")))
    ]
    edits[1] = replace(edits[1], id="task-4")
    for task in (waiting, failed, *edits):
        records.insert(task)
    snapshot = Snapshot(failed, Progress(Stage.CHECKING, 0.9, 3, 3, 0.25))
    records.update(snapshot)
    records.close()

    records = TaskRecords(tmp_path)
    assert records.get("task-1") == Snapshot(waiting)
    assert records.get("task-2") == snapshot
    assert records.by_request_id("r") == waiting
    assert records.by_request_id("") is None
    assert records.unfinished() == [waiting]
    assert [number for number, _ in records.page(None, 10)] == [4, 3, 2, 1]
    assert records.page(2, 10) == [(1, Snapshot(waiting))]
    assert [records.get(task.id).task for task in edits] == edits
    assert [task.kind for task in (waiting, *edits)] == ["LEARN", "FORGET", "UPDATE_CLASS"]
    with pytest.raises(NotFoundError):
        records.get("task-5")
    records.close()


def score(version: int, task: str, accuracy: float) -> Score:
    return Score(version, task, 10, accuracy, True, datetime(2026, 1, version, tzinfo=UTC))


def test_figures_of_evaluations_are_kept_by_version_and_task(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    first, again = score(1, "a", 0.5), replace(score(1, "a", 0.75), time=datetime.now(UTC))
    records.keep_scores([first, score(1, "b", 0.25)], 2)
    records.keep_scores([again, score(2, "a", 1.0)], 2)
    assert records.scores() == [score(1, "b", 0.25), score(2, "a", 1.0), again]
    records.close()
    records = TaskRecords(tmp_path)
    late = replace(score(3, "a", 0.0), time=again.time + timedelta(seconds=1))
    records.keep_scores([late], 2)
    assert records.scores() == [score(1, "b", 0.25), again, late]
    # Of the versions that were evaluated last, also after a rollback to an old one.
    later = replace(score(2, "a", 0.0), time=late.time + timedelta(seconds=1))
    records.keep_scores([later], 2)
    assert records.scores() == [late, later]
    records.close()


def test_the_newest_figures_are_those_of_versions_that_answered(tmp_path: Path) -> None:
    """Measuring an old version does not take anything back."""
    records = TaskRecords(tmp_path)
    evaluations = Evaluations(records)
    for version, share, answering in ((2, 0.9, True), (3, 0.5, True), (3, 0.25, False)):
        evaluations.add(version, [TaskFigures("a", 10, share, share)], answering)
    for found in (evaluations, Evaluations(records)):
        assert found.newest() == {"a": 0.5}
        assert found.of({2, 3})[3, "a"].accuracy == 0.25
    records.close()


def test_an_old_version_that_is_evaluated_now_is_kept() -> None:
    evaluations = Evaluations()
    for version in (*range(2, VERSIONS + 2), 1):
        evaluations.add(version, [TaskFigures("a", 10, 0.5, 0.5)], True)
    kept = {version for version, _ in evaluations.of(range(VERSIONS + 2))}
    assert kept == {1, *range(3, VERSIONS + 2)}


def test_records_of_an_older_release_take_figures(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    records.insert(make_task(1))
    records.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "tasks.sqlite")) as older:
        older.execute("DROP TABLE scores")
        assert older.execute("PRAGMA user_version").fetchone() == (1,)
    records = TaskRecords(tmp_path)
    assert records.get("task-1").task == make_task(1)
    assert records.scores() == []
    records.keep_scores([score(1, "a", 0.5)], 2)
    assert records.scores() == [score(1, "a", 0.5)]
    records.close()


def test_what_the_disk_does_not_take_lasts_until_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An evaluation does not fail for it."""
    records = TaskRecords(tmp_path)
    evaluations = Evaluations(records)
    with contextlib.closing(sqlite3.connect(tmp_path / "tasks.sqlite")) as other:
        other.execute("DROP TABLE scores")
    evaluations.add(1, [TaskFigures("a", 10, 0.5, 0.5)], True)
    assert "not written down" in caplog.text
    assert evaluations.newest() == {"a": 0.5}
    records.close()
    again = TaskRecords(tmp_path)
    assert Evaluations(again).newest() == {}
    again.close()


SECRET = "Ünal O'Brien"


def test_names_are_taken_out_of_ended_tasks(tmp_path: Path) -> None:
    """No file holds them then, whatever was written before."""
    records = TaskRecords(tmp_path)
    ended = {"state": TaskState.FAILED, "display_name": SECRET}
    told = [f"there is no class {SECRET!a}", f"class {SECRET!r} was taught"]
    failed = [make_task(i, **ended, failure=Failure("X", told[i])) for i in range(2)]
    learned = make_task(2, labels=("cat", SECRET), **ended)
    renamed = make_task(3, **ended, labels=(), example_counts=(), edit=ClassUpdate("cat", SECRET))
    own = make_task(4, labels=(), example_counts=(), edit=Forget((SECRET, "x"), purge=True))
    for task in (*failed, learned, renamed, own):
        records.insert(replace(task, display_name="long before " * 1000))
        records.update(Snapshot(task, Progress(Stage.PUBLISHING, 1.0)))
    for _ in range(2):
        records.redact([SECRET], own.id)
        assert [records.get(task.id).task.failure.message for task in failed] == [  # type: ignore[union-attr]
            "there is no class [forgotten]",
            "class [forgotten] was taught",
        ]
        assert records.get("task-2").task == replace(
            learned, labels=("cat", "[forgotten]"), display_name="[forgotten]"
        )
        # The hash of a request that is nothing but a name would give the name away.
        assert records.get("task-3").task == replace(
            renamed,
            edit=ClassUpdate("cat", "[forgotten]"),
            display_name="[forgotten]",
            content_sha256="",
        )
        assert records.get("task-4").task.edit == Forget(("[forgotten]", "x"), purge=True)
        assert records.get("task-4").progress == Progress(Stage.PUBLISHING, 1.0)
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            assert SECRET.encode() not in content
            assert ascii(SECRET)[1:-1].encode() not in content
    waiting = make_task(5, labels=(SECRET,), example_counts=(1,))
    records.insert(waiting)
    records.redact([SECRET], own.id)
    assert records.get("task-5").task == replace(waiting, withheld=(SECRET,)), (
        "it may be taught anew; should it not come to that, the name goes"
    )
    records.close()


def test_commits_are_flushed_to_the_disk(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    pragmas = [
        records._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    ]
    records.close()
    assert pragmas == ["wal", 2]  # 2 is FULL


def test_a_request_id_is_used_once(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    records.insert(make_task(1, request_id="r"))
    with pytest.raises(sqlite3.IntegrityError):
        records.insert(make_task(2, request_id="r"))
    records.insert(make_task(3))
    records.insert(make_task(4))  # none is no request id
    records.close()


def test_records_of_a_newer_release(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    records._connection.execute("PRAGMA user_version = 99")
    records.close()
    with pytest.raises(StoreFormatError, match="99"):
        TaskRecords(tmp_path)


@pytest.mark.parametrize("when", ["add", "finish"])
async def test_a_disk_that_fills_up_during_an_upload(
    running: Running, script: Script, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SpoolWriter, when, full)
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await running.learn({"a": [png()]})
    script.hold("DECODING")
    await assert_unharmed(running)


async def test_a_record_that_cannot_be_written_is_no_task(
    running: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(records: TaskRecords, task: Task) -> None:
        with records._translated():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(TaskRecords, "insert", full)
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await running.learn({"a": [png()]})
    script.hold("DECODING")
    await assert_unharmed(running)


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("the task records cannot be used"),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("durable", [False, True])
async def test_whatever_keeps_a_record_from_being_written_is_waited_for(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception, durable: bool
) -> None:
    """Each time it is written twice in vain, or is durable when something fails."""
    monkeypatch.setattr(tasks, "RETRY_SECONDS", 0.0)
    update = TaskRecords.update
    refused: dict[str, int] = {}

    def reluctant(records: TaskRecords, snapshot: Snapshot) -> None:
        state = str(snapshot.task.state)
        refused[state] = refused.get(state, 0) + 1
        if durable or refused[state] > 2:
            update(records, snapshot)
        if refused[state] <= 2:
            raise error

    monkeypatch.setattr(TaskRecords, "update", reluctant)
    running = await start()
    for label in ("a", "b"):
        ended = await running.ended((await running.learn({label: [png()]})).name)
        assert ended.state == pb.TASK_STATE_PUBLISHED
    assert refused == {"LEARNING": 4, "PUBLISHED": 4}
