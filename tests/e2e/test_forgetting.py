"""A class is forgotten: whatever is asked, promoted, restarted or learned, it is never named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from inflora_client import Client, FailedPreconditionError, LearnOptions, TaskKind
from inflora_core.predictor import CPU
from tests.core import tiny
from tests.e2e.conftest import SIDE, connect, examples, serving

QUICKLY: LearnOptions = {"epochs": 1}
CALL = 250
TOP = 100


def photos(count: int = CALL) -> list[bytes]:
    """Return images of all classes, the forgotten one first of all; none was learned."""
    labels = ("green", "red", "green", "blue", "white")
    return [tiny.png(labels[i % 5], 1000 + i, SIDE) for i in range(count)]


def named(
    client: Client, version: int | None = None, images: list[bytes] | None = None
) -> set[str]:
    """Return all classes that 250 predictions name, of any rank."""
    answer = client.predict(images or photos(), top_k=TOP, version=version)
    assert len(answer.predictions) == len(images or photos())
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


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A server's folder whose store has a backbone and no version."""
    shutil.copytree(prepared, tmp_path / "server" / "store")
    return tmp_path / "server"


def test_a_forgotten_class_never_appears_again(folder: Path, tmp_path: Path) -> None:
    images = photos()
    with serving(folder) as server, connect(server) as client:
        assert learn(client, "red", "green") == 1
        assert learn(client, "blue") == 2
        assert "green" in named(client, images=images)
        parent = client.predict(images[:20], top_k=TOP)
        task = client.wait(client.forget("green"))
        assert (task.kind, task.version) == (TaskKind.FORGET, "models/default/versions/3")
        for version in (None, 1, 2, 3):  # 1,000 predictions
            assert named(client, version, images) == ({"red"} if version == 1 else {"red", "blue"})
        # What is left is told apart as before: the odds of red and blue have not changed.
        after = client.predict(images[:20], top_k=TOP)
        for old, new in zip(parent.predictions, after.predictions, strict=True):
            assert odds(new) == pytest.approx(odds(old), rel=1e-3)
        classes, answered = exported(client, tmp_path)
        assert classes == {"red", "blue"}
        assert answered <= classes
        client.promote(2)
        assert named(client, images=images) == {"red", "blue"}

    with serving(folder) as server, connect(server) as client:
        assert client.version().number == 2
        for version in (None, 1, 2, 3):
            assert "green" not in named(client, version, images)
        assert learn(client, "white") == 4
        assert client.version(4).parent == "models/default/versions/2"
        assert named(client, images=images) == {"red", "blue", "white"}
        assert exported(client, tmp_path)[0] == {"red", "blue", "white"}
        assert not any("green" in [c.label for c in v.classes] for v in client.versions())
        with pytest.raises(FailedPreconditionError, match="use version 4"):
            client.download(2, to=tmp_path / "old.onnx")
        # Its name is free, for a class that is another.
        assert learn(client, "green") == 5
        assert "green" in named(client, images=images)
        for version in (1, 2, 3, 4):
            assert "green" not in named(client, version, images)


def odds(prediction: object) -> float:
    scores = {score.label: score.probability for score in prediction.scores}  # type: ignore[attr-defined]
    return scores["red"] / (scores["red"] + scores["blue"])


def test_names_and_a_purge(folder: Path) -> None:
    with serving(folder) as server, connect(server) as client:
        assert learn(client, "red", "green", "blue") == 1
        images = photos(20)
        before = [p.label for p in client.predict(images).predictions]
        client.wait(client.update_class("red", new_label="rouge", add_aliases=["red"]))
        after = [p.label for p in client.predict(images).predictions]
        assert after == ["rouge" if label == "red" else label for label in before]
        assert "rouge" in after
        assert [(c.label, c.aliases) for c in client.version().classes] == [
            ("rouge", ("red",)),
            ("green", ()),
            ("blue", ()),
        ]
        client.wait(client.forget("green", purge=True))
        assert [version.purged for version in client.versions()] == [False, True, True]
        assert named(client) == {"rouge", "blue"}
        for call in (client.promote, client.download, lambda n: client.predict(images, version=n)):
            with pytest.raises(FailedPreconditionError, match="use version 3"):
                call(1)
        files = [path for path in server.store.rglob("*") if path.is_file()]
        assert not [path for path in files if b"green" in path.read_bytes()]
        assert learn(client, "white") == 4  # its weights are made of what the purge has left
        assert named(client) == {"rouge", "blue", "white"}
