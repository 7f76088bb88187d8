"""The main job: teach two tasks while others predict, and take the model away as a file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from PIL import Image

from inflora_client import Client, FailedPreconditionError, PredictResult, Task, TaskState
from tests.e2e.conftest import SIDE, Start, connect, examples, images
from tests.e2e.predicting import Predicting
from tests.running_server import RunningServer

FIRST, SECOND = ("red", "green"), ("blue", "yellow", "white")
SERVICES = [f"inflora.v1.{name}Service" for name in ("Learner", "Predictor", "Evaluator", "Model")]


@dataclass(frozen=True)
class Job:
    """What came of it.

    Attributes:
        client: A client of the server, which still runs.
        watched: Of both tasks, all that the watcher was sent.
        predicting: All that two other clients were answered meanwhile.
        answers_while_learning: How many answers came while the second task was learned.
        health: What was said of each service before the first version, and after it.
        refusal: What Predict said before the first version.
    """

    server: RunningServer
    client: Client
    watched: list[list[Task]]
    predicting: Predicting
    answers_while_learning: int
    health: list[dict[str, str]]
    refusal: FailedPreconditionError

    @property
    def tasks(self) -> list[Task]:
        return [seen[-1] for seen in self.watched]


def health(server: RunningServer) -> dict[str, str]:
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        return {
            name: health_pb2.HealthCheckResponse.ServingStatus.Name(
                check(health_pb2.HealthCheckRequest(service=name)).status
            )
            for name in ("", *SERVICES)
        }


@pytest.fixture(scope="module")
def job(start: Start) -> Iterator[Job]:
    server = start()
    with connect(server) as client:
        states = [health(server)]
        with pytest.raises(FailedPreconditionError) as refused:
            client.predict(images("red"))
        first = list(client.watch(client.learn(examples(*FIRST), display_name="first")))
        states.append(health(server))
        with Predicting(server, images(*FIRST), clients=2) as predicting:
            predicting.wait_for_more()
            accepted = client.learn(
                examples(*SECOND), display_name="second", epochs=20, batch_size=4
            )
            second, counts = [], []
            for task in client.watch(accepted):
                second.append(task)
                if task.state is TaskState.LEARNING:
                    counts.append(predicting.count)
            predicting.wait_until(lambda: 2 in predicting.versions)
            predicting.wait_for_more()
        answered = counts[-1] - counts[0]
        yield Job(server, client, [first, second], predicting, answered, states, refused.value)


def labels_of(result: PredictResult) -> list[str]:
    return [prediction.label for prediction in result.predictions]


# -- learning -----------------------------------------------------------------------------------


def test_both_tasks_are_published(job: Job) -> None:
    for number, (task, labels) in enumerate(zip(job.tasks, (FIRST, SECOND), strict=True), 1):
        assert task.state is TaskState.PUBLISHED
        assert task.version == f"models/default/versions/{number}"
        assert [entry.label for entry in task.classes] == list(labels)
        assert [entry.example_count for entry in task.classes] == [10] * len(labels)
        assert [entry.held_out_count for entry in task.classes] == [1] * len(labels)
        assert task.error is None
        assert task.report is not None
        assert task.report.leak < 1e-5
        assert task.report.training_accuracy >= 0.9
        assert task.report.parity is not None
        assert task.report.parity.max_abs_diff <= 1e-4
        assert task.report.parity.top1_agreement >= 0.995
        assert task.report.parity.preprocessing_grey_levels <= 1
    assert [version.number for version in job.client.versions()][-2:] == [2, 1]
    assert job.client.version(2).parent == "models/default/versions/1"
    assert job.client.version(2).task == job.tasks[1].name


def test_a_watcher_sees_the_task_move_on_to_its_end(job: Job) -> None:
    order = list(TaskState)
    for seen in job.watched:
        states = [task.state for task in seen]
        assert states == sorted(states, key=order.index)
        assert TaskState.LEARNING in states
        assert [task.ended for task in seen] == [False] * (len(seen) - 1) + [True]
        fractions = [task.fraction_done for task in seen]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1
    assert {task.epochs for task in job.watched[1] if task.epoch} == {20}


def test_whoever_comes_late_to_watch_gets_the_end(job: Job) -> None:
    assert list(job.client.watch(job.tasks[0])) == [job.tasks[0]]
    assert job.client.wait(job.tasks[0]) == job.tasks[0] == job.client.task(job.tasks[0].id)


def test_no_prediction_failed_and_versions_never_went_back(job: Job) -> None:
    assert job.predicting.failures == []
    assert job.answers_while_learning > 0
    known = {version.number: version for version in job.client.versions()}
    for answers in job.predicting.by_client:
        versions = [answer.version for answer in answers]
        assert versions == sorted(versions)
        assert set(versions) == {1, 2}
        for answer in answers:
            classes = {entry.label for entry in known[answer.version].classes}
            assert set(answer.labels) == classes, "an answer is of one version only"


# -- predicting ---------------------------------------------------------------------------------


def test_the_classes_of_both_tasks_are_known(job: Job) -> None:
    labels = [label for label in (*FIRST, *SECOND) for _ in range(4)]
    result = job.client.predict(images(*FIRST, *SECOND, each=4), top_k=10, version=2)
    assert result.version == "models/default/versions/2"
    for prediction in result.predictions:
        assert {score.label for score in prediction.scores} == {*FIRST, *SECOND}
        probabilities = [score.probability for score in prediction.scores]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert 0 <= prediction.novelty <= 1
    right = [a == b for a, b in zip(labels_of(result), labels, strict=True)]
    assert np.mean(right) >= 0.9


def test_a_named_task_restricts_the_classes(job: Job) -> None:
    for task, labels in zip(job.tasks, (FIRST, SECOND), strict=True):
        result = job.client.predict(images(*FIRST, *SECOND), top_k=10, task=task, version=2)
        for prediction in result.predictions:
            assert {score.label for score in prediction.scores} == set(labels)
            assert sum(score.probability for score in prediction.scores) == pytest.approx(1)
    with pytest.raises(FailedPreconditionError) as caught:
        job.client.predict(images("red"), task=job.tasks[1], version=1)
    assert [violation.field for violation in caught.value.field_violations] == ["task"]


def test_an_older_version_can_be_asked(job: Job) -> None:
    result = job.client.predict(images(*SECOND), top_k=10, version=1)
    assert result.version == "models/default/versions/1"
    for prediction in result.predictions:
        assert {score.label for score in prediction.scores} == set(FIRST)


def test_a_stream_answers_in_order(job: Job) -> None:
    asked = [images(label, each=1 + i % 3) for i, label in enumerate((*FIRST, *SECOND) * 8)]
    answers = list(job.client.predict_stream(asked, top_k=1, version=2))
    assert len(answers) == len(asked) == 40
    each = [labels_of(job.client.predict(part, top_k=1, version=2)) for part in asked[:5]]
    assert [labels_of(answer) for answer in answers[:5]] == each
    sizes = [len(answer.predictions) for answer in answers]
    assert sizes == [len(part) for part in asked]
    firsts = [labels_of(answer)[0] for answer in answers]
    assert firsts == firsts[:5] * 8
    assert len(set(firsts)) >= 4, "so that a wrong order would be seen"


# -- measuring ----------------------------------------------------------------------------------


def test_an_evaluation_gives_what_counting_predictions_gives(job: Job) -> None:
    shown = examples(*FIRST, *SECOND, "black", each=5, first=2000)
    store = contents(job.server.store)
    for version, known in ((2, (*FIRST, *SECOND)), (1, FIRST)):
        found = job.client.evaluate(shown, version)
        assert found.version == f"models/default/versions/{version}"
        answers = job.client.predict([image for image, _ in shown], 1, version).predictions
        right = {label: [] for label in known}
        for (_, label), answer in zip(shown, answers, strict=True):
            if label in known:
                right[label].append(answer.label == label)
        assert [(c.label, c.accuracy) for c in found.classes] == [
            (label, np.mean(hits)) for label, hits in right.items()
        ]
        assert found.accuracy == np.mean([*right.values()])
        for task, part in zip(job.tasks, found.tasks, strict=False):
            own = [(image, label) for image, label in shown if label in labels_taught(task)]
            within = job.client.predict([image for image, _ in own], 1, version, task)
            assert part.task == task.name
            assert part.accuracy_task_known == np.mean(
                [a == label for a, (_, label) in zip(labels_of(within), own, strict=True)]
            )
        assert len(found.tasks) == version
        assert found.images == 5 * len(known)
        strangers = {label for _, label in shown} - set(known)
        assert {u.label: u.images for u in found.unknown_labels} == dict.fromkeys(strangers, 5)
        assert found.unknown_images == 5 * len(strangers)
        novelty = [
            (a.novelty, label in known) for a, (_, label) in zip(answers, shown, strict=True)
        ]
        pairs = [(b > a) + (a == b) / 2 for a, old in novelty if old for b, x in novelty if not x]
        assert found.novelty.auroc == pytest.approx(np.mean(pairs))
    assert job.client.evaluate(shown[:1]).version == job.client.version("current").name
    assert contents(job.server.store) == store, "nothing is kept but figures"


def labels_taught(task: Task) -> list[str]:
    return [entry.label for entry in task.classes]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return every file but the records with when it was written, and what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    files = (path for path in files if not path.name.startswith("tasks.sqlite"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# -- the file -----------------------------------------------------------------------------------


def test_the_downloaded_file_gives_the_server_s_answers(job: Job, tmp_path: Path) -> None:
    download = job.client.download(2, to=tmp_path)
    assert download.path == tmp_path / "model.onnx"
    session = ort.InferenceSession(download.path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    classes = json.loads(metadata["classes"])
    assert classes == [*FIRST, *SECOND]
    assert metadata["version"] == "2"
    encoded = images(*FIRST, *SECOND, each=6)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in encoded])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (30, SIDE, SIDE, 3)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": pixels})
    answers = job.client.predict(encoded, top_k=5, version=2)
    assert [classes[i] for i in logits.argmax(1)] == labels_of(answers)
    for row, prediction in zip(probabilities, answers.predictions, strict=True):
        for score in prediction.scores:
            assert score.probability == pytest.approx(row[classes.index(score.label)], abs=1e-4)


def test_rolling_back_and_forth(job: Job) -> None:
    newest = job.client.version("current").number
    assert newest >= 2
    try:
        assert job.client.promote(1).current
        assert job.client.version("current").number == 1
        result = job.client.predict(images("red"), top_k=10)
        assert result.version == "models/default/versions/1"
        assert {score.label for score in result.predictions[0].scores} == set(FIRST)
    finally:
        assert job.client.promote(newest).current
    assert job.client.predict(images("red")).version == f"models/default/versions/{newest}"
    assert [version.number for version in job.client.versions() if version.current] == [newest]


# -- health and reflection ----------------------------------------------------------------------


def test_health_follows_the_first_version(job: Job) -> None:
    before, after = job.health
    answering = {"inflora.v1.PredictorService", "inflora.v1.EvaluatorService"}
    assert {name for name, state in before.items() if state == "NOT_SERVING"} == answering
    assert {before[name] for name in before if name not in answering} == {"SERVING"}
    assert set(after.values()) == {"SERVING"}
    assert answering <= set(after)
    assert job.refusal.reason == "WRONG_STATE"


def test_the_server_describes_itself(job: Job) -> None:
    with grpc.insecure_channel(job.server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {*SERVICES, "grpc.health.v1.Health"} <= set(database.get_services())
        file = database.FindFileContainingSymbol(SERVICES[0])
        (service,) = file.service
        assert "LearnTask" in [method.name for method in service.method]


# -- the command --------------------------------------------------------------------------------


class Command:
    """The ``inflora`` command against one server."""

    def __init__(self, server: RunningServer, folder: Path) -> None:
        self.environment = {**os.environ, "INFLORA_SERVER": server.address, "COLUMNS": "200"}
        self.folder = folder

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "inflora_client", *map(str, words)]
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def text(self, *words: object) -> str:
        result = self.run(*words)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout

    def json(self, *words: object) -> list[Any]:
        return [json.loads(line) for line in self.text("--json", *words).splitlines()]


@pytest.fixture
def inflora(job: Job, tmp_path: Path) -> Command:
    return Command(job.server, tmp_path)


def test_the_command_teaches_a_folder_and_asks(job: Job, inflora: Command) -> None:
    labels = ("cyan", "magenta")
    for image, label in examples(*labels):
        folder = inflora.folder / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(list(folder.iterdir()))}.png").write_bytes(image)
    seen = inflora.json("learn", "photos", "--name", "by command", "--epochs", 2)
    assert seen[-1]["state"] == "PUBLISHED"
    assert [entry["label"] for entry in seen[-1]["classes"]] == list(labels)
    assert seen[-1]["report"]["settings"]["epochs"] == 2
    task = seen[-1]["name"].rpartition("/")[2]

    for number, image in enumerate(images(*labels, each=1)):
        (inflora.folder / f"{number}.png").write_bytes(image)
    answers = inflora.json("predict", "0.png", "1.png", "--task", task)
    assert [answer["scores"][0]["label"] for answer in answers] == list(labels)
    assert {answer["version"] for answer in answers} == {seen[-1]["version"]}
    table = inflora.text("predict", "0.png", "--task", task)
    assert "0.png" in table
    assert "cyan" in table

    known = job.client.version("current").classes
    again = inflora.json("learn", "photos", "--epochs", 2)
    assert again[-1]["state"] == "PUBLISHED", "known classes may come again"
    assert job.client.version("current").classes == known

    (inflora.folder / "photos" / "cyan" / "broken.png").write_bytes(b"not an image")
    refused = inflora.run("learn", "photos")
    assert refused.returncode != 0
    assert "broken.png" in refused.stderr


def test_the_command_measures_a_folder(job: Job, inflora: Command) -> None:
    shown = examples(*FIRST, "blue", each=4, first=3000)
    for number, (image, label) in enumerate(shown):
        folder = inflora.folder / "photos" / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(image)
    (found,) = inflora.json("evaluate", "photos", "--version", 1)
    # Sorted by label, as a folder is: in another order, sums are rounded in another way.
    direct = job.client.evaluate(sorted(shown, key=lambda example: example[1]), 1)
    assert found == json.loads(json.dumps(dataclasses.asdict(direct)))
    assert (found["images"], found["unknown_images"]) == (8, 4)
    table = inflora.text("evaluate", "photos", "--version", 1)
    assert f"{found['accuracy']:.1%}" in table
    assert job.tasks[0].id in table
    assert "blue" in table

    (inflora.folder / "photos" / "red" / "zero.png").write_bytes(b"")
    refused = inflora.run("evaluate", "photos")
    assert refused.returncode == 1
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert str(Path("photos") / "red" / "zero.png") in line


def test_the_command_lists_and_exports(job: Job, inflora: Command) -> None:
    tasks = inflora.json("tasks")
    assert {task.name for task in job.tasks} <= {task["name"] for task in tasks}
    assert tasks[-1]["display_name"] == "first"
    assert "second" in inflora.text("tasks")
    versions = inflora.json("versions")
    assert [version["name"].rpartition("/")[2] for version in versions][-2:] == ["2", "1"]
    assert job.tasks[1].id in inflora.text("versions")
    (file,) = inflora.json("export", "--version", 1, "--output", "first.onnx")
    content = (inflora.folder / "first.onnx").read_bytes()
    assert len(content) == file["artifact"]["size"]
    assert job.client.download(1, to=inflora.folder / "again.onnx").path.read_bytes() == content
