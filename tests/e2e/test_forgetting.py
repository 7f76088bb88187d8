"""A class is forgotten: whatever is asked, promoted, restarted or learned, it is never named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from inflora_client import Client, FailedPreconditionError, LearnOptions, Prediction, TaskKind
from inflora_core.predictor import CPU
from tests.core import tiny
from tests.e2e.conftest import SIDE, connect, examples, serving

QUICKLY: LearnOptions = {"epochs": 1}
TOP = 100


def photos(count: int) -> list[bytes]:
    """Return images that no task has seen, most of them of the class that is forgotten."""
    labels = ("green", "red", "green", "blue", "white")
    return [tiny.png(labels[i % 5], 1000 + i, SIDE) for i in range(count)]


def named(client: Client, images: list[bytes], version: int | None = None) -> set[str]:
    """Return all classes that predictions name, of any rank."""
    answer = client.predict(images, top_k=TOP, version=version)
    assert len(answer.predictions) == len(images)
    return {score.label for prediction in answer.predictions for score in prediction.scores}


def learn(client: Client, *labels: str) -> int:
    task = client.wait(client.learn(examples(*labels, each=4), **QUICKLY))
    return int(task.version.rpartition("/")[2])


def exported(client: Client, folder: Path) -> tuple[set[str], set[str]]:
    """Return the classes that the current file lists, and those it answers 1,000 images with."""
    path = client.download(to=folder / "model.onnx").path
    session = onnxruntime.InferenceSession(path, providers=[CPU])
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    pixels = np.stack(
        [tiny.pattern(("green", "red", "blue")[i % 3], 5000 + i, SIDE) for i in range(1000)]
    )
    (logits,) = session.run(["logits"], {"images": pixels})
    assert logits.shape == (1000, len(classes))
    return set(classes), {classes[i] for i in logits.argmax(1)}


def odds(prediction: Prediction) -> float:
    scores = {score.label: score.probability for score in prediction.scores}
    return scores["red"] / (scores["red"] + scores["blue"])


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A server's folder whose store has a backbone and no version."""
    shutil.copytree(prepared, tmp_path / "server" / "store")
    return tmp_path / "server"


def test_a_forgotten_class_never_appears_again(folder: Path, tmp_path: Path) -> None:
    many, some = photos(250), photos(20)
    with serving(folder) as server, connect(server) as client:
        assert learn(client, "red", "green") == 1
        assert learn(client, "blue") == 2
        assert "green" in named(client, many)
        before = client.predict(some, top_k=TOP)
        task = client.wait(client.forget("green"))
        assert (task.kind, task.version) == (TaskKind.FORGET, "models/default/versions/3")
        for version in (None, 1, 2, 3):  # 1,000 predictions
            assert named(client, many, version) == ({"red"} if version == 1 else {"red", "blue"})
        # What was clear about the others stays so.
        after = client.predict(some, top_k=TOP)
        for old, new in zip(before.predictions, after.predictions, strict=True):
            if not 1 / 8 < odds(old) < 8:
                assert (odds(new) > 1) == (odds(old) > 1)
        classes, answered = exported(client, tmp_path)
        assert classes == answered == {"red", "blue"}
        client.promote(2)
        assert named(client, some) == {"red", "blue"}

    with serving(folder) as server, connect(server) as client:
        assert client.version().number == 2
        for version in (None, 1, 2, 3):
            assert "green" not in named(client, some, version)
        assert learn(client, "white") == 4
        assert client.version(4).parent == "models/default/versions/2"
        assert named(client, some) == {"red", "blue", "white"}
        assert exported(client, tmp_path)[0] == {"red", "blue", "white"}
        assert not any("green" in [c.label for c in v.classes] for v in client.versions())
        with pytest.raises(FailedPreconditionError, match="use version 4"):
            client.download(2, to=tmp_path / "old.onnx")

        best = [p.label for p in client.predict(some).predictions]
        client.wait(client.update_class("red", new_label="rouge", add_aliases=["red"]))
        renamed = [p.label for p in client.predict(some).predictions]
        assert renamed == ["rouge" if label == "red" else label for label in best]
        known = client.version().classes[0]
        assert (known.label, known.aliases) == ("rouge", ("red",))

        client.wait(client.forget("blue", purge=True))
        purged = [version.number for version in client.versions() if version.purged]
        assert purged == [5, 4, 3, 2]
        for call in (client.promote, client.download, lambda n: client.predict(some, version=n)):
            with pytest.raises(FailedPreconditionError, match="use version 6"):
                call(2)
        files = [path for path in server.store.rglob("*") if path.is_file()]
        assert not [path for path in files if b"blue" in path.read_bytes()]
        # Its weights are made of what the purge has left, and the name is free for another class.
        assert learn(client, "green") == 7
        assert named(client, some) == {"rouge", "white", "green"}
        assert named(client, some, 6) == {"rouge", "white"}
        assert named(client, some, 1) == {"red"}
