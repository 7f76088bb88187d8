"""Stores that older releases wrote open in this one, answer as they did, and learn on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from inflora_client import Client, TaskState
from inflora_core.store import FORMAT, OLDEST_FORMAT, Store
from inflora_service.doctor import Diagnosis, examine
from tests.e2e.make_store import OPTIONS, STORES, answers, taught
from tests.running_server import running_server


@pytest.mark.parametrize("number", range(OLDEST_FORMAT, FORMAT + 1))
def test_a_store_of_an_older_release(number: int, tmp_path: Path) -> None:
    with tarfile.open(STORES / f"format-{number}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert examine(tmp_path / "store") == Diagnosis(())
    recorded = json.loads((tmp_path / "answers.json").read_bytes())
    with running_server(tmp_path, OPTIONS) as server, Client(server.address) as client:
        found = answers(client)
        assert found.keys() == recorded.keys()
        for colour, scores in recorded.items():
            assert found[colour] == pytest.approx(scores, abs=1e-5)
        versions = {version.number: version for version in client.versions()}
        assert [versions[n].parent.rpartition("/")[2] for n in (2, 3, 4, 5)] == ["1", "2", "3", "3"]
        assert versions[1].pinned
        assert [task.state for task in client.tasks()] == [TaskState.PUBLISHED] * 5
        assert [task.display_name for task in client.tasks()][-1] == "first"

        ended = client.wait(client.learn(taught("cyan")))
        assert ended.version == "models/default/versions/6"
        (prediction,) = client.predict([taught("cyan")[0][0]], 9).predictions
        labels = {score.label for score in prediction.scores}
        assert labels == {"red", "green", "blue", "yellow", "cyan"}
    for version in range(1, 7):
        Store(tmp_path / "store").make_onnx(version)
