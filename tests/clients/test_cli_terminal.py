"""What the command does where a person can see it and answer: progress, and Ctrl-C."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora.v1 import task_pb2
from inflora_client.cli.progress import TimeLeft, in_words
from tests.clients.peer import Peer
from tests.clients.terminal import CTRL_C, CTRL_D, ENTER, Terminal, terminal


@pytest.fixture
def task(peer: Peer) -> task_pb2.Task:
    """A task that is being learned; whoever watches it hears no more until ``peer.release``."""
    return peer.add_task(
        "t1",
        state="TASK_STATE_LEARNING",
        stage="TASK_STAGE_TRAINING",
        epoch=1,
        epochs=5,
        loss=0.5,
        fraction_done=0.2,
    )


class TestProgress:
    def test_shows_stage_epoch_loss_and_time_left(
        self, peer: Peer, task: task_pb2.Task, tmp_path: Path
    ) -> None:
        with terminal(["--server", peer.address, "watch", "t1"], tmp_path) as screen:
            screen.until("training  epoch 1/5  loss 0.5000")
            screen.until("20%")
            assert "left" not in screen.shown, "nothing tells yet"
            task.MergeFrom(task_pb2.Task(epoch=2, loss=0.25, fraction_done=0.6))
            peer.release.set()
            screen.until("training  epoch 2/5  loss 0.2500")
            screen.until("left")
            assert "about " in screen.shown
            assert "60%" in screen.shown
            task.MergeFrom(
                task_pb2.Task(
                    state="TASK_STATE_PUBLISHED",
                    fraction_done=1.0,
                    version="models/default/versions/3",
                    report=task_pb2.TaskReport(training_accuracy=0.875),
                )
            )
            screen.until("87.5%")
            assert screen.end() == 0

    def test_shows_an_upload(self, peer: Peer, tmp_path: Path) -> None:
        (tmp_path / "pets" / "cat").mkdir(parents=True)
        for number in range(3):
            (tmp_path / "pets" / "cat" / f"{number}.png").write_bytes(b"cat")
        words = ["--server", peer.address, "learn", "pets", "--detach"]
        with terminal(words, tmp_path) as screen:
            screen.until("uploading  image 3/3")
            assert screen.end() == 0
        assert "inflora watch t1" in screen.shown

    def test_a_path_is_no_markup(self, peer: Peer, tmp_path: Path) -> None:
        (tmp_path / "[red]" / "[/x]" / "cat").mkdir(parents=True)
        (tmp_path / "[red]" / "[/x]" / "cat" / "1.png").write_bytes(b"cat")
        words = ["--server", peer.address, "learn", "[red]/[/x]", "--detach"]
        with terminal(words, tmp_path) as screen:
            screen.until("reading [red]/[/x] ...")
            assert screen.end() == 0

    @given(
        rate=st.floats(1e-4, 10),
        start=st.floats(0, 0.5),
        began=st.floats(0, 1e6),
        share=st.floats(0.6, 1),
    )
    def test_time_left_is_exact_where_work_is_steady(
        self, rate: float, start: float, began: float, share: float
    ) -> None:
        left = TimeLeft()
        assert left(start, began) is None
        now = began + (share - start) / rate
        found = left(share, now)
        assert found is not None
        assert math.isclose(found, (1 - share) / rate, rel_tol=1e-3, abs_tol=1e-3)

    @given(st.lists(st.floats(0, 1), max_size=20))
    def test_time_left_is_never_negative_whatever_comes(self, shares: list[float]) -> None:
        left = TimeLeft()
        for now, share in enumerate(shares):
            found = left(share, float(now))
            assert found is None or found >= 0
            if share == 1:
                assert found in (None, 0)

    def test_work_that_begins_again_is_measured_anew(self) -> None:
        left = TimeLeft()
        assert [left(0.5, 0), left(0.75, 10), left(0.25, 20), left(0.5, 30)] == [None, 10, None, 20]

    def test_durations_are_said_as_exactly_as_they_deserve(self) -> None:
        said = [in_words(seconds) for seconds in (0.2, 59.4, 60, 89, 3599, 3600, 7380)]
        assert said == ["0 s", "59 s", "1 min", "1 min", "60 min", "1 h 00 min", "2 h 03 min"]


class TestCtrlC:
    QUESTION = "Detach from task t1, which then goes on, or cancel it? [detach/cancel] (detach)"

    def interrupt(self, screen: Terminal) -> None:
        screen.until("epoch 1/5")
        screen.press(CTRL_C)
        screen.until(self.QUESTION)

    @pytest.mark.usefixtures("task")
    @pytest.mark.parametrize("keys", [ENTER, f"detach{ENTER}", CTRL_C, CTRL_D])
    def test_detaches_unless_told_otherwise(self, peer: Peer, tmp_path: Path, keys: str) -> None:
        with terminal(["--server", peer.address, "watch", "t1"], tmp_path) as screen:
            self.interrupt(screen)
            if keys == CTRL_C:
                assert screen.interrupt() == 130
            else:
                screen.press(keys)
                assert screen.end() == 130
        assert "task t1 goes on without you" in screen.shown
        assert "inflora cancel t1" in screen.shown
        assert "Traceback" not in screen.shown
        assert not peer.calls["CancelTask"]

    @pytest.mark.usefixtures("task")
    def test_cancels_if_told_to(self, peer: Peer, tmp_path: Path) -> None:
        with terminal(["--server", peer.address, "watch", "t1"], tmp_path) as screen:
            self.interrupt(screen)
            screen.press(f"perhaps{ENTER}")
            screen.until(self.QUESTION)
            screen.press(f"cancel{ENTER}")
            assert screen.end() == 130
        assert "task t1 is cancelled" in screen.shown
        assert len(peer.calls["CancelTask"]) == 1

    def test_asks_after_an_upload_as_well(self, peer: Peer, tmp_path: Path) -> None:
        (tmp_path / "pets" / "cat").mkdir(parents=True)
        (tmp_path / "pets" / "cat" / "1.png").write_bytes(b"cat")
        with terminal(["--server", peer.address, "learn", "pets"], tmp_path) as screen:
            screen.until("queued")
            screen.press(CTRL_C)
            screen.until(self.QUESTION)
            screen.press(f"cancel{ENTER}")
            assert screen.end() == 130
        assert peer.tasks["models/default/tasks/t1"].state == task_pb2.TASK_STATE_CANCELLED


class TestPurge:
    QUESTION = "Delete for good all versions that know cat so far (1, 3)? [y/n] (n)"

    @pytest.fixture(autouse=True)
    def _versions(self, peer: Peer) -> None:
        for purged, label in ((False, "cat"), (True, "cat"), (False, "cat"), (False, "dog")):
            version = peer.add_version()
            version.purged = purged
            version.classes[0].label = label

    @pytest.mark.parametrize("keys", [ENTER, f"n{ENTER}", CTRL_D])
    def test_asks_first(self, peer: Peer, tmp_path: Path, keys: str) -> None:
        words = ["--server", peer.address, "forget", "cat", "--purge"]
        with terminal(words, tmp_path) as screen:
            screen.until(self.QUESTION)
            screen.press(keys)
            assert screen.end() == 130
        assert "nothing was forgotten" in screen.shown
        assert not peer.calls["ForgetClasses"]

    @pytest.mark.parametrize("yes", [False, True])
    def test_goes_on_once_it_is_told_to(self, peer: Peer, tmp_path: Path, yes: bool) -> None:
        words = ["--server", peer.address, "forget", "cat", "--purge", "--detach"]
        with terminal([*words, *(["--yes"] if yes else [])], tmp_path) as screen:
            if not yes:
                screen.until(self.QUESTION)
                screen.press(f"y{ENTER}")
            screen.until("inflora watch")
            assert screen.end() == 0
        assert [call.purge for call in peer.calls["ForgetClasses"]] == [True]
