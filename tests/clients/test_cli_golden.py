"""What each command prints, plain and as JSON, word for word.

What they print is compared with the files in ``golden_cli``, one for each command and form. After a
change that is meant, ``INFLORA_RENEW_GOLDEN=1 pytest tests/clients/test_cli_golden.py`` writes them
anew; the difference that git shows then is what users will see.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inflora.v1 import evaluator_service_pb2 as evaluator_pb
from inflora.v1 import task_pb2
from inflora_client.cli import app
from tests.clients.peer import Peer, status
from tests.clients.walking import COMMANDS, PROCESSES

GOLDEN = Path(__file__).parent / "golden_cli"
RENEW = "INFLORA_RENEW_GOLDEN" in os.environ
TASK, VERSION = "models/default/tasks", "models/default/versions"
BEGAN = 1_800_000_000

CASES = {
    "alias": "alias cat puss --detach",
    "bench": "bench pets/cat/1.png --calls 3 --warm-up 0",
    "cancel": "cancel t2",
    "config show": "config show",
    "evaluate": "evaluate pets --version 2",
    "export": "export --version 1",
    "forget": "forget dog --purge --detach",
    "learn": "learn pets --name pets --request-id r1",
    "pin": "pin 2",
    "predict": "predict pets --top-k 2",
    "promote": "promote 1",
    "rename": "rename cat tiger --detach",
    "retry": "retry t2",
    "tasks": "tasks",
    "token": "token shop-camera --role predict",
    "unpin": "unpin 1",
    "versions": "versions",
    "watch": "watch t3",
}
"""A line for each command, by its name."""

MEASURED: dict[str, Callable[[str], str]] = {
    "bench": lambda text: re.sub(r" +", " ", re.sub(r"\d+(\.\d+)?(e-\d+)?", "N", text)),
    "token": lambda text: re.sub(r"[0-9a-f]{64}", "HASH", text),
}
"""What is never the same twice, by command; it is told from the rest by its form."""


@pytest.fixture(autouse=True)
def _same_place_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in os.environ:
        if name.startswith("INFLORA_"):
            monkeypatch.delenv(name)
    with monkeypatch.context() as here:
        here.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(autouse=True)
def _pets(tmp_path: Path) -> None:
    for file in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "pets" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"a {path.parent.name}".encode())


@pytest.fixture(autouse=True)
def _history(peer: Peer) -> None:
    """Three tasks that have ended, one that is set aside, four versions with a branch."""
    for number in (1, 2, 3, 4):
        version = peer.add_version()
        version.create_time.FromSeconds(BEGAN + 3600 * number)
    peer.versions[f"{VERSION}/4"].parent = f"{VERSION}/2"
    peer.versions[f"{VERSION}/3"].candidate = True
    peer.versions[f"{VERSION}/1"].pinned = True
    for number, fields in enumerate(
        (
            {"state": "TASK_STATE_PUBLISHED", "version": f"{VERSION}/1", "display_name": "pets"},
            {"state": "TASK_STATE_SET_ASIDE", "error": status("INTERNAL", "the worker died")},
            {
                "state": "TASK_STATE_LEARNING",
                "stage": "TASK_STAGE_TRAINING",
                "epoch": 2,
                "epochs": 5,
                "loss": 0.25,
                "fraction_done": 0.5,
            },
        ),
        start=1,
    ):
        task = peer.add_task(f"t{number}", example_count=3, example_bytes=15, **fields)
        task.classes.add(label="cat", example_count=2)
        task.classes.add(label="dog", example_count=1)
        task.create_time.FromSeconds(BEGAN + 3600 * number)
    published = task_pb2.Task()
    published.CopyFrom(peer.tasks[f"{TASK}/t3"])
    published.MergeFrom(
        task_pb2.Task(state="TASK_STATE_PUBLISHED", fraction_done=1.0, version=f"{VERSION}/4")
    )
    published.report.CopyFrom(
        task_pb2.TaskReport(
            leak=2e-6,
            interference=0.125,
            capacity=0.75,
            training_accuracy=0.9375,
            held_out_accuracy=0.875,
            held_out_accuracy_task_known=0.96875,
            held_out_method=task_pb2.HELD_OUT_METHOD_HELD_OUT,
            parity=task_pb2.ParityReport(images=3, max_abs_diff=1e-6, top1_agreement=1.0),
            stage_seconds=[task_pb2.StageSeconds(stage="TASK_STAGE_TRAINING", seconds=12.5)],
            epoch_losses=[0.5, 0.25],
            warnings=["class dog has one image"],
            tasks_left=11.5,
        )
    )
    learning = peer.tasks[f"{TASK}/t3"]
    first = task_pb2.Task()
    first.CopyFrom(learning)
    peer.watches.append([first, published])
    peer.evaluation = evaluator_pb.Evaluation(
        accuracy=0.75,
        accuracy_task_known=0.875,
        mean_class_accuracy=0.8125,
        classes=[
            evaluator_pb.ClassEvaluation(
                label="cat",
                task=f"{TASK}/t1",
                images=2,
                accuracy=0.5,
                mean_probability=0.5,
                confused_with="dog",
                confused_images=1,
            )
        ],
        confusions=[evaluator_pb.Confusion(truth="cat", answer="dog", images=1, share=0.5)],
        calibration=evaluator_pb.Calibration(
            expected_error=0.0625, negative_log_likelihood=0.5, brier=0.25
        ),
    )


def printed(peer: Peer, words: list[str]) -> str:
    result = CliRunner().invoke(app, ["--server", peer.address, *words])
    assert result.exit_code == 0, result.output
    return result.stdout.replace(peer.address, "localhost:50051")


@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize("command", CASES)
def test_prints_what_it_did(peer: Peer, command: str, form: str) -> None:
    words = [*CASES[command].split(), *(["--json"] if form == "json" else [])]
    found = MEASURED.get(command, str)(printed(peer, words))
    file = GOLDEN / f"{command.replace(' ', '-')}.{'jsonl' if form == 'json' else 'txt'}"
    if RENEW:
        file.write_text(found, "utf-8")
    assert found == file.read_text("utf-8"), f"if this is meant, see {__name__}"


def test_every_command_is_looked_at() -> None:
    assert {*CASES, *PROCESSES} == set(COMMANDS)
    names = {f"{command.replace(' ', '-')}{end}" for command in CASES for end in (".txt", ".jsonl")}
    assert {path.name for path in GOLDEN.iterdir()} == names
