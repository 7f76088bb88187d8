"""The ``inflora`` command against a peer server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inflora.v1 import evaluator_service_pb2 as evaluator_pb
from inflora.v1 import task_pb2
from inflora_client.cli import app
from tests.clients.peer import Peer, status

Run = Callable[..., Result]
PUBLISHED = task_pb2.Task(
    name="models/default/tasks/t1",
    state="TASK_STATE_PUBLISHED",
    version="models/default/versions/1",
    classes=[task_pb2.TaskClass(label="[cat]", example_count=2)],
    example_count=2,
    fraction_done=1.0,
    report=task_pb2.TaskReport(
        held_out_accuracy=0.5,
        capacity=0.75,
        parity=task_pb2.ParityReport(max_abs_diff=1e-5),
        warnings=["little is free"],
    ),
)
TRAINING = task_pb2.Task(
    name="models/default/tasks/t1",
    state="TASK_STATE_LEARNING",
    stage="TASK_STAGE_TRAINING",
    epoch=1,
    epochs=5,
    loss=0.5,
    fraction_done=0.5,
)


@pytest.fixture
def run(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("INFLORA_SERVER", peer.address)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    for label, files in {
        "cat": ["1.png", "2.JPG"],
        "dog": ["1.webp", ".DS_Store", "notes.txt"],
        unicodedata.normalize("NFD", "Käfer, rot"): ["1.bmp"],
        ".hidden": ["1.png"],
    }.items():
        (folder / label).mkdir(parents=True)
        for file in files:
            (folder / label / file).write_bytes(f"{label}/{file}".encode())
    return folder


def lines(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def error_line(result: Result, code: int) -> str:
    """The one line that an error prints."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


class TestEdits:
    @pytest.mark.parametrize(
        ("words", "method", "shown"),
        [
            (["forget", "[cat]", "dog"], "ForgetClasses", "forget [cat], dog"),
            (["forget", "cat", "--purge"], "ForgetClasses", "forget cat and purge"),
            (["rename", "cat", "[ox]"], "UpdateClass", "cat: now [ox]"),
            (["alias", "cat", "a", "b"], "UpdateClass", "cat: also a, also b"),
            (["alias", "cat", "a", "--remove"], "UpdateClass", "cat: not a"),
        ],
    )
    def test_follows_to_the_end(
        self, run: Run, peer: Peer, words: list[str], method: str, shown: str
    ) -> None:
        peer.failures[method].append(status("NOT_FOUND", "there is no class 'cat'"))
        assert "there is no class 'cat'" in error_line(run(*words), 1)
        (queued,) = lines(run("--json", *words, "--detach"))
        assert queued["state"] == "QUEUED"
        assert "inflora watch t2" in run(*words, "--detach").stdout
        published = task_pb2.Task()
        published.CopyFrom(peer.tasks["models/default/tasks/t1"])
        published.state = task_pb2.TASK_STATE_PUBLISHED
        published.version = "models/default/versions/7"
        peer.watches.append([published])
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert shown in result.stdout
        assert "version" in result.stdout
        assert shown in run("tasks").stdout

    def test_shows_what_is_purged(self, run: Run, peer: Peer) -> None:
        peer.add_version().purged = True
        peer.add_version()
        rows = [row.split()[:2] for row in run("versions", "--flat").stdout.splitlines()[1:]]
        assert rows == [["2", "current"], ["1", "purged"]]

    def test_shows_one_version_with_its_classes(self, run: Run, peer: Peer) -> None:
        peer.add_version().classes[0].label = "[cat]"
        peer.add_version()
        shown = [row.split() for row in run("versions", "1").stdout.splitlines()]
        assert shown[1][:2] == ["1", "1"], "the number, and how many classes"
        assert shown[-1] == ["[cat]", "puss", "t1"]
        (version,) = lines(run("--json", "versions", "current"))
        assert version["name"] == "models/default/versions/2"
        assert "versions/9" in error_line(run("versions", "9"), 1)

    def test_rows_that_a_program_reads_are_not_broken(
        self, run: Run, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        peer.add_task("t1", display_name="pets " * 40)
        assert "pets " * 40 in run("tasks").stdout.splitlines()[1]


class TestLearn:
    def test_uploads_a_folder_and_follows(self, run: Run, peer: Peer, pets: Path) -> None:
        peer.watches.append([TRAINING, PUBLISHED])
        result = run("learn", pets, "--name", "pets", "--epochs", 5, "--held-out-share", 0.25)
        assert result.exit_code == 0, result.output
        for text in ("[cat]", "50.0%", "75.0%", "1.0e-05", "little is free"):
            assert text in result.stdout
        assert "left out: 1 file without the suffix of an image" in result.stderr
        spec, batch, _ = peer.calls["LearnTask"][0]
        assert (spec.spec.display_name, spec.spec.epochs) == ("pets", 5)
        assert spec.spec.held_out_share == 0.25
        assert not spec.spec.HasField("rank")
        sent = [(e.label, e.image) for e in batch.examples.examples]
        assert [label for label, _ in sent] == ["Käfer, rot", "cat", "cat", "dog"]
        assert sent[1][1] == b"cat/1.png"

    def test_counts_what_lies_beside_the_classes(self, run: Run, pets: Path) -> None:
        (pets / "loose.png").touch()
        assert "left out: 2 files" in run("learn", pets, "--detach").stderr

    def test_prints_json_lines(self, run: Run, peer: Peer, pets: Path) -> None:
        peer.watches.append([TRAINING, PUBLISHED])
        first, last = lines(run("--json", "learn", pets))
        assert (first["state"], first["stage"], first["loss"]) == ("LEARNING", "TRAINING", 0.5)
        assert last["version"] == "models/default/versions/1"
        assert last["report"]["held_out_accuracy"] == 0.5

    @pytest.mark.parametrize(
        ("options", "labels"),
        [
            (["--classes", "dog,cat"], ["dog", "cat", "cat"]),
            (["--classes", "dog", "--classes", "Käfer, rot"], ["dog", "Käfer, rot"]),
        ],
    )
    def test_takes_some_classes(
        self, run: Run, peer: Peer, pets: Path, options: list[str], labels: list[str]
    ) -> None:
        (task,) = lines(run("learn", pets, "--detach", "--json", *options))
        assert task["state"] == "QUEUED"
        _, batch, _ = peer.calls["LearnTask"][0]
        assert [e.label for e in batch.examples.examples] == labels

    def test_detaches(self, run: Run, pets: Path) -> None:
        result = run("learn", pets, "--detach")
        assert "inflora watch t1" in result.stdout
        assert "inflora cancel t1" in result.stdout

    def test_says_which_file_is_at_fault(self, run: Run, peer: Peer, pets: Path) -> None:
        peer.failures["LearnTask"].append(
            status("INVALID_ARGUMENT", "no image", fields={"examples[2].image": "is empty"})
        )
        result = run("learn", pets, "--classes", "cat,dog", "--detach")
        assert result.exit_code == 1
        assert str(pets / "dog" / "1.webp") in result.stderr

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (["a/notes.txt"], "holds no .bmp"),
            (["loose.png"], "has no sub-folders"),
        ],
    )
    def test_refuses_a_folder_that_is_no_task(
        self, run: Run, tmp_path: Path, make: list[str], message: str
    ) -> None:
        for name in make:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert message in error_line(run("learn", tmp_path), 2)

    def test_refuses_an_unknown_class(self, run: Run, pets: Path) -> None:
        line = error_line(run("learn", pets, "--classes", "cow"), 2)
        assert line.startswith(f"inflora: no class cow in {pets}; there are")

    def test_reports_a_failed_task(self, run: Run, peer: Peer, pets: Path) -> None:
        failed = task_pb2.Task(name="models/default/tasks/t1", state="TASK_STATE_FAILED")
        failed.error.CopyFrom(status("INTERNAL", "the learner died"))
        peer.watches.append([failed])
        (pets / "dog" / "notes.txt").unlink()
        line = error_line(run("learn", pets), 1)
        assert line.startswith("inflora: task t1 ended as FAILED: the learner died; mend")

    def test_shows_why_a_task_is_held_back(self, run: Run, peer: Peer, pets: Path) -> None:
        held_back = task_pb2.Task()
        held_back.CopyFrom(PUBLISHED)
        held_back.state = task_pb2.TASK_STATE_HELD_BACK
        held_back.error.CopyFrom(status("FAILED_PRECONDITION", "version 1 is held back: Noise."))
        held_back.report.checks.add(name="accuracy", value=0.02, limit=0.1, message="[Noise].")
        held_back.report.checks.add(name="leak", value=0.0, limit=0.01, passed=True, message="No.")
        peer.watches += [[held_back]] * 2
        (pets / "dog" / "notes.txt").unlink()
        result = run("learn", pets)
        assert result.exit_code == 1
        assert "held back for accuracy" in result.stdout
        assert "0.02, limit 0.1: [Noise]." in result.stdout
        assert "No." not in result.stdout
        assert "ended as HELD_BACK: version 1 is held back: Noise." in result.stderr
        assert "inflora promote --force" in result.stderr
        as_json = run("--json", "learn", pets)
        assert as_json.exit_code == 1
        assert json.loads(as_json.stdout)["report"]["checks"][0]["value"] == 0.02


class TestTasks:
    def test_lists(self, run: Run, peer: Peer) -> None:
        peer.tasks["models/default/tasks/t1"] = TRAINING
        assert "training  epoch 1/5  loss 0.5000" in run("tasks").stdout
        assert [t["name"] for t in lines(run("tasks", "--json"))] == ["models/default/tasks/t1"]

    def test_watches(self, run: Run, peer: Peer) -> None:
        peer.watches += [[TRAINING, PUBLISHED]] * 2
        assert "75.0%" in run("watch", "t1").stdout
        assert len(lines(run("watch", "t1", "--json"))) == 2

    def test_cancels(self, run: Run, peer: Peer) -> None:
        peer.add_task("t1", state="TASK_STATE_QUEUED")
        assert "cancelled" in run("cancel", "t1").stdout
        (task,) = lines(run("cancel", "t1", "--json"))
        assert task["state"] == "CANCELLED"

    def test_retries(self, run: Run, peer: Peer) -> None:
        peer.add_task("t1", state="TASK_STATE_SET_ASIDE")
        assert "set aside" in run("tasks").stdout
        assert "queued" in run("retry", "t1").stdout


class TestPredict:
    def test_shows_a_row_a_file(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(b"[label] " + name.encode())
        header, first, second = run("predict", tmp_path / "a", tmp_path / "b").stdout.splitlines()
        assert header.split() == ["file", "label", "probability", "novelty", "version"]
        assert first.split() == [str(tmp_path / "a"), "[label]", "a", "0.7500", "0.250", "1"]
        assert second.split()[2] == "b"

    def test_prints_json_lines(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"cat")
        options = ["--top-k", 2, "--version", 7, "--task", "t1", "--json"]
        (answer,) = lines(run("predict", tmp_path / "a", *options))
        assert answer == {
            "file": str(tmp_path / "a"),
            "version": "models/default/versions/7",
            "scores": [
                {"label": "cat", "probability": 0.75},
                {"label": "other", "probability": 0.25},
            ],
            "novelty": 0.25,
        }
        assert peer.calls["Predict"][0].task == "models/default/tasks/t1"

    def test_names_the_file_that_is_refused(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        peer.failures["Predict"].append(
            status("INVALID_ARGUMENT", "no image", fields={"images[0]": "is empty"})
        )
        line = error_line(run("predict", tmp_path / "a"), 1)
        assert line.startswith(f"inflora: {tmp_path / 'a'}: no image: is empty; leave it out")

    def test_asks_for_many_images_at_once(self, run: Run, peer: Peer, pets: Path) -> None:
        peer.add_version()
        (pets / "notes.txt").write_text("no image")
        result = run("predict", pets, "--json")
        files = [Path(answer["file"]).relative_to(pets) for answer in lines(result)]
        assert [unicodedata.normalize("NFC", str(file)) for file in files] == [
            "Käfer, rot/1.bmp",
            "cat/1.png",
            "cat/2.JPG",
            "dog/1.webp",
        ]
        (call,) = peer.calls["Predict"]
        assert len(call.images) == 4

    def test_shows_answers_as_they_arrive(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        for number in range(70):
            (tmp_path / f"{number:02}.png").write_bytes(b"cat")
        result = run("predict", tmp_path)
        assert [len(call.images) for call in peer.calls["Predict"]] == [32, 32, 6]
        header, *rows = result.stdout.splitlines()
        assert header.split()[0] == "file"
        assert [Path(row.split()[0]).name for row in rows] == [f"{n:02}.png" for n in range(70)]
        assert len({row.index("cat") for row in rows}) == 1, "one table to look at"

    def test_large_images_go_into_calls_of_their_own(
        self, run: Run, peer: Peer, tmp_path: Path
    ) -> None:
        peer.add_version()
        for number in range(3):
            (tmp_path / f"{number}.png").write_bytes(b"x" * (5 << 20))
        assert len(lines(run("predict", tmp_path, "--json"))) == 3
        assert [len(call.images) for call in peer.calls["Predict"]] == [1, 1, 1]

    def test_takes_an_image_over_stdin(self, peer: Peer) -> None:
        peer.add_version()
        arguments = ["--server", peer.address, "predict", "-", "--json"]
        (answer,) = lines(CliRunner().invoke(app, arguments, input=b"a cat"))
        assert answer["file"] == "-"
        assert peer.calls["Predict"][0].images == [b"a cat"]

    def test_takes_names_over_stdin(self, peer: Peer, pets: Path) -> None:
        peer.add_version()
        names = f"{pets}/cat/2.JPG\r\n\n{pets}/dog\n"
        arguments = ["--server", peer.address, "predict", "--list", "-", "--json"]
        found = lines(CliRunner().invoke(app, arguments, input=names))
        assert [answer["file"] for answer in found] == [
            f"{pets}/cat/2.JPG",
            f"{pets}/dog/1.webp",
        ]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["predict", "--list", "."], "--list is for names that come over stdin"),
            (["predict", "-", "-"], "'-' is given more than once"),
            (["predict", "empty"], "empty: holds no .bmp"),
        ],
    )
    def test_refuses_what_means_no_image(
        self,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        words: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        assert message in error_line(run(*words), 2)

    def refuse(self, peer: Peer, *numbers: int) -> None:
        """The first calls of the peer name these images, one each."""
        peer.failures["Predict"] += [
            status("INVALID_ARGUMENT", "no image", fields={f"images[{n}]": "no image"})
            for n in numbers
        ]

    def test_answers_what_comes_before_an_image_that_is_refused(
        self, run: Run, peer: Peer, pets: Path
    ) -> None:
        peer.add_version()
        files = [pets / "cat" / "1.png", pets / "dog" / "1.webp", pets / "cat" / "2.JPG"]
        self.refuse(peer, 1)
        result = run("predict", *files, "--json")
        assert result.exit_code == 1
        assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == [str(files[0])]
        assert result.stderr.startswith(f"inflora: {files[1]}: no image; leave it out")

    def test_goes_on_without_images_if_it_is_told_to(
        self, run: Run, peer: Peer, pets: Path, tmp_path: Path
    ) -> None:
        peer.add_version()
        files = [pets / "cat" / "1.png", pets / "dog" / "1.webp", pets / "cat" / "2.JPG"]
        names = tmp_path / "names"
        names.write_text("\n".join([str(files[0]), "gone.png", *map(str, files[1:])]))
        self.refuse(peer, 2, 0)
        arguments = ["--server", peer.address, "predict", "--list", "-", "--keep-going"]
        result = CliRunner().invoke(app, [*arguments, "--json"], input=names.read_bytes())
        assert result.exit_code == 1
        assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == [str(files[1])]
        unread, *refused, end = result.stderr.splitlines()
        assert unread.startswith("inflora: gone.png: no such file")
        assert refused == [f"inflora: {files[2]}: no image", f"inflora: {files[0]}: no image"]
        assert end == "inflora: 3 images or folders were not answered: see above"

    def test_an_image_that_cannot_be_read_ends_it_after_those_before(
        self, peer: Peer, pets: Path
    ) -> None:
        peer.add_version()
        arguments = ["--server", peer.address, "predict", "--list", "-", "--json"]
        result = CliRunner().invoke(app, arguments, input=f"{pets}/cat/1.png\ngone.png\n")
        assert result.exit_code == 2
        assert len(result.stdout.splitlines()) == 1
        assert "gone.png: no such file" in result.stderr

    def test_goes_on_without_folders_that_cannot_be_read_or_hold_nothing(
        self, run: Run, peer: Peer, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        peer.add_version()
        (tmp_path / "empty").mkdir()
        photos = tmp_path / "photos"
        photos.mkdir()
        (photos / "1.png").write_bytes(b"cat")
        monkeypatch.chdir(photos)
        for _ in range(20):  # what lies deeper than a path can say is unreadable to anybody
            os.mkdir("x" * 250)
            os.chdir("x" * 250)
        monkeypatch.chdir(tmp_path)
        files = [pets / "cat" / "1.png", photos / "1.png", pets / "dog" / "1.webp"]
        words = [files[0], "empty", photos, files[2]]
        result = run("predict", "--keep-going", "--json", *words)
        assert result.exit_code == 1
        answered = [json.loads(line)["file"] for line in result.stdout.splitlines()]
        assert answered == [str(file) for file in files]
        empty, unread, end = result.stderr.splitlines()
        assert empty.startswith("inflora: empty: holds no .bmp")
        assert unread.startswith(f"inflora: {photos}/xxx")
        assert "name too long" in unread
        assert end == "inflora: 2 images or folders were not answered: see above"
        stopped = run("predict", "--json", *words[2:])
        assert stopped.exit_code == 2
        assert [json.loads(line)["file"] for line in stopped.stdout.splitlines()] == answered[1:2]

    def test_what_is_refused_of_all_images_names_none(
        self, run: Run, peer: Peer, pets: Path
    ) -> None:
        peer.failures["Predict"].append(status("INVALID_ARGUMENT", "top_k is too large"))
        assert error_line(run("predict", pets, "--keep-going"), 1) == "inflora: top_k is too large"


class TestEvaluate:
    @pytest.fixture(autouse=True)
    def _evaluation(self, peer: Peer) -> None:
        task = "models/default/tasks/t1"
        classes = [("[cat]", 0.25, "dog", 3), ("dog", 1.0, "", 0)]
        peer.evaluation = evaluator_pb.Evaluation(
            unknown_images=12 * 13 // 2,
            accuracy=0.625,
            accuracy_task_known=0.875,
            mean_class_accuracy=0.615,
            classes=[
                evaluator_pb.ClassEvaluation(
                    label=label,
                    task=task,
                    images=4,
                    accuracy=accuracy,
                    mean_probability=0.4321,
                    confused_with=other,
                    confused_images=images,
                )
                for label, accuracy, other, images in reversed(classes)
            ],
            tasks=[
                evaluator_pb.TaskEvaluation(
                    task=task, images=8, accuracy=0.625, accuracy_task_known=0.875
                )
            ],
            confusions=[evaluator_pb.Confusion(truth="[cat]", answer="dog", images=3, share=0.75)],
            calibration=evaluator_pb.Calibration(
                expected_error=0.0432, negative_log_likelihood=1.25, brier=0.5
            ),
            novelty=evaluator_pb.NoveltyEvaluation(auroc=0.9876),
            unknown_labels=[
                evaluator_pb.UnknownLabel(label=f"unknown {n}", images=n) for n in range(1, 13)
            ],
        )

    def test_shows_tables(self, run: Run, peer: Peer, pets: Path) -> None:
        result = run("evaluate", pets, "--version", 3, "--confusions", 5)
        assert result.exit_code == 0, result.output
        assert "left out: 1 file without the suffix of an image" in result.stderr
        rows = [line.split() for line in result.stdout.splitlines()]
        for row in (
            ["version", "3"],
            ["accuracy", "62.5%"],
            ["calibration", "error", "0.0432"],
            ["told", "by", "novelty", "(AUROC)", "0.9876"],
            ["t1", "8", "62.5%", "87.5%"],
            ["[cat]", "4", "25.0%", "0.4321", "dog", "(3)"],
            ["dog", "4", "100.0%", "0.4321"],
            ["[cat]", "dog", "3", "75.0%"],
            ["unknown", "12", "12"],
            ["...", "and", "2", "more", "3"],
        ):
            assert row in rows
        assert rows.index(["[cat]", "4", "25.0%", "0.4321", "dog", "(3)"]) < rows.index(
            ["dog", "4", "100.0%", "0.4321"]
        )
        spec, batch, _ = peer.calls["Evaluate"][0]
        assert spec.spec.version == "models/default/versions/3"
        assert spec.spec.confusions == 5
        labels = [e.label for e in batch.examples.examples]
        assert labels == ["Käfer, rot", "cat", "cat", "dog"]

    def test_shows_no_table_without_rows(self, run: Run, peer: Peer, pets: Path) -> None:
        peer.evaluation = evaluator_pb.Evaluation()
        result = run("evaluate", pets, "--classes", "cat")
        assert result.exit_code == 0, result.output
        rows = [line.split() for line in result.stdout.splitlines()]
        assert ["accuracy", "-"] in rows
        assert [] not in rows, "there is one table only"

    def test_prints_one_json_object(self, run: Run, pets: Path) -> None:
        (found,) = lines(run("evaluate", pets, "--classes", "cat,dog", "--json"))
        assert found["images"] == 3
        assert found["calibration"]["expected_error"] == 0.0432
        assert found["confusions"] == [
            {"truth": "[cat]", "answer": "dog", "images": 3, "share": 0.75}
        ]

    def test_says_which_file_is_at_fault(self, run: Run, peer: Peer, pets: Path) -> None:
        peer.failures["Evaluate"].append(
            status("INVALID_ARGUMENT", "no image", fields={"examples[2].image": "is empty"})
        )
        result = run("evaluate", pets, "--classes", "cat,dog")
        assert result.exit_code == 1
        assert str(pets / "dog" / "1.webp") in result.stderr

    def test_refuses_a_folder_without_classes(self, run: Run, tmp_path: Path) -> None:
        assert "has no sub-folders" in error_line(run("evaluate", tmp_path), 2)


class TestVersions:
    def test_lists_and_promotes(self, run: Run, peer: Peer) -> None:
        peer.add_version()
        peer.add_version()
        assert [v["current"] for v in lines(run("versions", "--json"))] == [True, False]
        assert run("promote", 1).stdout.splitlines()[1].split()[:2] == ["1", "current"]
        assert [v["current"] for v in lines(run("--json", "versions"))] == [False, True]

    def test_shows_and_forces_a_candidate(self, run: Run, peer: Peer) -> None:
        peer.add_version().candidate = True
        peer.add_version()
        rows = run("versions", "--flat").stdout.splitlines()
        assert rows[2].split()[:2] == ["1", "candidate"]
        assert run("promote", "--force", 1).stdout.splitlines()[1].split()[:2] == ["1", "current"]
        assert peer.calls["PromoteVersion"][0].force

    def test_shows_the_lineage(self, run: Run, peer: Peer) -> None:
        assert "no versions yet" in run("versions").stderr
        parents = {2: 1, 3: 2, 4: 2, 5: 4, 6: 3, 7: 5, 8: 6, 9: 3, 10: 2}
        for number in range(1, 11):
            version = peer.add_version()
            if number in parents:
                version.parent = f"models/default/versions/{parents[number]}"
        peer.promote("models/default/versions/7")
        shown = run("versions").stdout
        facts = re.compile(r"  (1 class|task t\d+|2027-\S+ \S+)")
        assert [facts.sub("", row) for row in shown.splitlines()] == [
            "1",
            "2",
            "├── 3  from 2",
            "│   ├── 6  from 3",
            "│   └── 8",
            "├── 9  from 3",
            "└── 10  from 2",
            "4  from 2",
            "5",
            "7  current",
        ]

    def test_a_hundred_versions_in_a_row_are_a_list(self, run: Run, peer: Peer) -> None:
        for _ in range(100):
            peer.add_version()
        del peer.versions["models/default/versions/1"]  # the parent of the oldest may be gone
        rows = run("versions").stdout.splitlines()
        assert [row.split()[0] for row in rows] == [str(n) for n in range(2, 101)]

    def test_exports(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        peer.add_version()
        result = run("export", "--version", 1, "--output", tmp_path)
        assert "version 1, 1024 bytes" in result.stdout
        (file,) = lines(run("export", "--output", tmp_path / "m.onnx", "--json"))
        assert file["path"] == str(tmp_path / "m.onnx")
        assert file["version"] == "models/default/versions/2"
        assert (tmp_path / "m.onnx").read_bytes() == peer.content

    def test_does_not_export_to_a_file_called_dash(
        self, run: Run, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        peer.add_version()
        monkeypatch.chdir(tmp_path)
        assert "give --output a name" in error_line(run("export", "--output", "-"), 2)
        assert [*tmp_path.iterdir()] == []

    def test_exports_a_smaller_form(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        (file,) = lines(run("export", "--form", "int8", "--output", tmp_path, "--json"))
        assert peer.calls["DownloadArtifact"][0].artifact == "model.int8.onnx"
        assert Path(file["path"]).parent == tmp_path
        assert "int4" in run("export", "--form", "int4").stderr


class TestErrors:
    def test_what_the_server_refuses(self, run: Run) -> None:
        line = error_line(run("promote", 9), 1)
        assert "versions/9" in line
        assert "'inflora versions'" in line

    def test_a_file_that_cannot_be_written(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        assert "gone" in error_line(run("export", "--output", tmp_path / "gone" / "m"), 2)

    def test_what_is_no_file_is_not_replaced(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        os.mkfifo(tmp_path / "pipe")
        for name in ("pipe", "to-pipe"):
            if name == "to-pipe":
                (tmp_path / name).symlink_to("pipe")
            assert "no file" in error_line(run("export", "--output", tmp_path / name), 2)
        assert (tmp_path / "pipe").is_fifo()
        assert {path.name for path in tmp_path.iterdir()} == {"pipe", "to-pipe"}

    def test_a_link_stays_one(self, run: Run, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        (tmp_path / "file").write_bytes(b"before")
        (tmp_path / "link").symlink_to("file")
        assert run("export", "--output", tmp_path / "link").exit_code == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == peer.content

    def test_wrong_usage(self, run: Run) -> None:
        assert run("learn").exit_code == 2
        assert run("learn", "no-such-folder").exit_code == 2

    def test_nobody_listens(self, run: Run, peer: Peer) -> None:
        peer.stop()
        line = error_line(run("tasks"), 3)
        assert peer.address in line
        assert "'inflora serve'" in line

    def test_a_server_has_a_port(self, run: Run) -> None:
        assert "--server shop has no port" in error_line(run("tasks", "--server", "shop"), 2)

    def test_the_option_wins_over_the_environment(
        self, run: Run, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INFLORA_SERVER", "localhost:1")
        assert run("--server", peer.address, "tasks").exit_code == 0
        assert run("tasks", "--server", peer.address).exit_code == 0


class TestServe:
    def test_becomes_the_server(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr("os.execv", lambda *command: seen.append(command))
        run("serve", "--store", "here", "--help", "-v")
        words = [sys.executable, "-m", "inflora_service", "--store", "here", "--help", "-v"]
        assert seen == [(sys.executable, words)]

    def test_says_that_it_is_not_installed(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "not installed" in error_line(run("serve"), 2)


def test_ctrl_c_leaves_the_task_alone(peer: Peer) -> None:
    peer.tasks["models/default/tasks/t1"] = TRAINING
    # A background job of a shell, as CI may be, ignores Ctrl-C, and so would its children.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    main = "from inflora_client.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", heed + main, "--server", peer.address, "watch", "t1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert peer.attached.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "inflora watch t1" in stderr
    assert "inflora cancel t1" in stderr
    assert "Traceback" not in stderr
    assert not peer.calls["CancelTask"]
