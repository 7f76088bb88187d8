"""Teach a stream of tasks to a real server, predict all along, and measure.

    python -m tests.benchmarks.stream --data FILE.npz --backbone FILE.safetensors --tasks 5

Prints the accuracy of every task after every task, and one JSON object as its last line. The raw
answers are written to ``build/stream``; the figures are computed from that file.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from inflora_client import Client, RetryPolicy
from inflora_client.resources import Task
from inflora_core.config import Limits
from inflora_core.graph import materialise
from inflora_core.images import decode
from inflora_core.model import ClassEntry
from inflora_core.predictor import Predictor, RuntimeOptions
from inflora_core.store import Store
from tests.benchmarks import data as streams
from tests.benchmarks.checkout import ROOT, commit
from tests.running_server import RunningServer, running_server

CHUNK = 64
"""Images of one Predict call."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stream; see ``--help``."""
    options = parser().parse_args(arguments)
    started = time.monotonic()
    console = Console()
    tasks = streams.load(options.data, options.tasks, options.train_per_class, options.seed)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        console.print(f"Starting a server with backbone {options.backbone} in {folder} ...")
        backbone = with_normalisation(options.backbone, options.mean, options.std, folder)
        flags = [
            "--backbone",
            backbone,
            "--preset",
            options.preset,
            *learn_flags(options, len(tasks)),
        ]
        with running_server(folder / "server", flags) as server:
            raw = teach_all(server, tasks, console)
            raw |= compare_with_file(server, tasks, folder)
            raw |= frozen_class_means(server, tasks)
        raw["seconds"] = time.monotonic() - started
    raw |= {"commit": commit(), "options": vars(options)}
    path = out / "results.json"
    path.write_text(json.dumps(raw, indent=1))
    summary = summarise(json.loads(path.read_text()))
    show_matrix(console, summary, [", ".join(task.labels[:3]) for task in tasks])
    print(json.dumps(summary | {"results": str(path)}), flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    result.add_argument("--data", default="digits", help="digits, an npz file, or a folder")
    result.add_argument("--backbone", default="bundled", help="bundled, a timm name, or a file")
    result.add_argument("--tasks", type=int, help="default: 5, or one for each class if fewer")
    result.add_argument("--train-per-class", type=int)
    result.add_argument("--preset", default="default")
    result.add_argument("--epochs", type=int)
    result.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    result.add_argument("--mean", type=float, help="another mean for all channels, 0 to 1")
    result.add_argument("--std", type=float, help="another deviation for all channels")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--out", default=str(ROOT / "build" / "stream"))
    return result


def learn_flags(options: argparse.Namespace, tasks: int) -> list[str]:
    """Return the server's options for learning."""
    settings = list(options.set)
    if options.epochs:
        settings.append(f"epochs={options.epochs}")
    if options.preset == "published":
        settings.append(f"expected_tasks={tasks}")
    return [part for setting in settings for part in ("--set", setting)]


def with_normalisation(source: str, mean: float | None, std: float | None, folder: Path) -> str:
    """Return a backbone file that is ``source`` but for its normalisation, in ``folder``."""
    if mean is None and std is None:
        return source
    weights = Path(source).resolve()
    architecture = weights.name.split(".", 1)[0]
    copy = folder / weights.name
    copy.symlink_to(weights)
    config = {"mean": [mean] * 3, "std": [std] * 3}
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "model_args": {}, "pretrained_cfg": config})
    )
    return str(copy)


def teach_all(
    server: RunningServer, tasks: list[streams.TaskData], console: Console
) -> dict[str, Any]:
    """Teach every task, and after each ask for all test images of the tasks so far."""
    answers: list[list[list[str]]] = []
    known: list[list[list[str]]] = []
    reports = []
    with Client(server.address) as client, predicting(server, tasks[0]) as calls:
        for number, task in enumerate(tasks):
            done = learn(client, task, f"task {number + 1} of {len(tasks)}", console)
            reports.append(report_of(done))
            calls["start"]()
            seen = tasks[: number + 1]
            names = [report["task"] for report in reports]
            answers.append([ask(client, part.test) for part in seen])
            known.append([ask(client, part.test, names[i]) for i, part in enumerate(seen)])
    return {
        "truth": [[label for _, label in task.test] for task in tasks],
        "answers": answers,
        "answers_task_known": known,
        "tasks": reports,
        "predict_calls": calls["count"],
        "predict_failures": calls["failures"],
        "predict_errors": calls["errors"],
        "predict_versions": calls["versions"],
    }


def learn(client: Client, task: streams.TaskData, title: str, console: Console) -> Task:
    """Teach one task with a progress bar, and return it as published."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[stage]:<10} loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    accepted = client.learn(task.train, display_name=title)
    with Progress(*columns, console=console) as bar:
        row = bar.add_task(f"{title}: {', '.join(task.labels[:3])}", total=1.0, stage="", loss=0.0)
        for now in client.watch(accepted):
            doing = now.state.value if now.ended else now.stage.value
            bar.update(row, completed=now.fraction_done, stage=doing, loss=now.loss)
    return client.wait(accepted)


def ask(client: Client, examples: Sequence[streams.Example], task: str | None = None) -> list[str]:
    """Return the server's best class for each image."""
    labels = []
    for start in range(0, len(examples), CHUNK):
        images = [image for image, _ in examples[start : start + CHUNK]]
        result = client.predict(images, top_k=1, task=task)
        labels += [prediction.scores[0].label for prediction in result.predictions]
    return labels


@contextmanager
def predicting(server: RunningServer, task: streams.TaskData) -> Iterator[dict[str, Any]]:
    """Predict from a second client without a pause, from the first version until the end."""
    calls: dict[str, Any] = {"count": 0, "failures": 0, "errors": [], "versions": []}
    first, stop = threading.Event(), threading.Event()
    calls["start"] = first.set

    def loop() -> None:
        first.wait()
        # Without retries: each would hide a failure.
        with Client(server.address, retry=RetryPolicy(max_attempts=1)) as client:
            while not stop.is_set():
                image = task.test[calls["count"] % len(task.test)][0]
                try:
                    version = client.predict([image], top_k=1).version
                    if version not in calls["versions"]:
                        calls["versions"].append(version)
                except Exception as error:
                    calls["failures"] += 1
                    calls["errors"].append(repr(error))
                calls["count"] += 1
                stop.wait(0.02)  # a camera's pace; an endless loop would only slow learning down

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield calls
    finally:
        stop.set()
        first.set()
        thread.join()


def report_of(task: Task) -> dict[str, Any]:
    """Return what the figures need of a task's report."""
    report = task.report
    assert report is not None
    assert report.parity is not None
    assert task.start_time is not None
    assert task.end_time is not None
    return {
        "task": task.name,
        "version": task.version,
        "seconds": (task.end_time - task.start_time).total_seconds(),
        "stage_seconds": {part.stage: part.seconds for part in report.stage_seconds},
        "leak": report.leak,
        "interference": report.interference,
        "capacity": report.capacity,
        "protected": [layer.dimension - layer.free_after for layer in report.layers],
        "held_out_accuracy": report.held_out_accuracy,
        "training_accuracy": report.training_accuracy,
        "epoch_losses": list(report.epoch_losses),
        "onnx_max_abs_diff": report.parity.max_abs_diff,
        "preprocessing_grey_levels": report.parity.preprocessing_grey_levels,
        "torch_top1_agreement": report.parity.top1_agreement,
        "warnings": list(report.warnings),
    }


def compare_with_file(
    server: RunningServer, tasks: list[streams.TaskData], folder: Path
) -> dict[str, Any]:
    """Download the model and run it with plain onnxruntime on the same encoded images."""
    with Client(server.address) as client:
        path = client.download("current", to=folder / "model.onnx").path
        served = [label for task in tasks for label in ask(client, task.test)]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    answers = []
    for task in tasks:
        for image, _ in task.test:
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
            pixels = np.asarray(upright.convert("RGB"))[None]
            answers.append(classes[int(session.run(["logits"], {"images": pixels})[0].argmax())])
    return {"served": served, "file": answers, "onnx_bytes": path.stat().st_size}


def frozen_class_means(server: RunningServer, tasks: list[streams.TaskData]) -> dict[str, Any]:
    """Answer with nearest class means on the frozen backbone: what learning must not spoil."""
    store = Store.open(server.store)
    stored = store.backbone()
    blank = store.initial_model(stored)
    one_class = replace(
        blank,
        head_weight=np.zeros((1, stored.config.embedding_size), np.float32),
        head_bias=np.zeros(1, np.float32),
        novelty=replace(
            blank.novelty,
            weight=np.zeros((1, stored.config.embedding_size), np.float32),
            bias=np.zeros(1, np.float32),
        ),
        classes=(ClassEntry("any", "none", "none.0"),),
    )
    frozen = materialise(stored.template_path.read_bytes(), one_class, 0)
    predictor = Predictor.load(frozen, RuntimeOptions(provider="cpu"))

    def features(examples: Sequence[streams.Example]) -> np.ndarray:
        rows = []
        for start in range(0, len(examples), CHUNK):
            images = [decode(image, Limits()) for image, _ in examples[start : start + CHUNK]]
            rows.append(predictor.predict(images).embedding)
        return np.concatenate(rows)

    names, means = [], []
    for task in tasks:
        rows, labels = features(task.train), np.array([label for _, label in task.train])
        for name in task.labels:
            names.append(name)
            means.append(rows[labels == name].mean(0))
    answers = []
    for task in tasks:
        distances = np.linalg.norm(features(task.test)[:, None] - np.array(means), axis=2)
        answers.append([names[i] for i in distances.argmin(1)])
    return {"frozen_answers": answers}


def summarise(raw: dict[str, Any]) -> dict[str, Any]:
    """Compute every figure from the raw answers. Accuracies are means over images."""
    truth, tasks = raw["truth"], raw["tasks"]
    matrix = [[share(answer, truth[i]) for i, answer in enumerate(row)] for row in raw["answers"]]
    seen = [
        share([x for part in row for x in part], [x for part in truth[: len(row)] for x in part])
        for row in raw["answers"]
    ]
    everything = [label for part in truth for label in part]
    known = [label for part in raw["answers_task_known"][-1] for label in part]
    frozen = [label for part in raw["frozen_answers"] for label in part]
    return {
        "final_accuracy": seen[-1],
        "average_accuracy": float(np.mean(seen)),
        "average_forgetting": forgetting(matrix),
        "final_accuracy_task_known": share(known, everything),
        "predict_calls": raw["predict_calls"],
        "predict_failures": raw["predict_failures"],
        "predict_versions": len(raw["predict_versions"]),
        "frozen_ncm": share(frozen, everything),
        "onnx_top1_agreement": min(
            share(raw["served"], raw["file"]), *(task["torch_top1_agreement"] for task in tasks)
        ),
        "onnx_max_abs_diff": max(task["onnx_max_abs_diff"] for task in tasks),
        "preprocessing_grey_levels": max(task["preprocessing_grey_levels"] for task in tasks),
        "onnx_bytes": raw["onnx_bytes"],
        "leak": max(task["leak"] for task in tasks),
        "interference": max(task["interference"] for task in tasks),
        "task_seconds": [round(task["seconds"], 1) for task in tasks],
        "protected": tasks[-1]["protected"],
        "seconds": round(raw["seconds"], 1),
        "commit": raw["commit"],
        "accuracy_matrix": [[round(cell, 4) for cell in row] for row in matrix],
    }


def share(answers: Sequence[str], truth: Sequence[str]) -> float:
    """Return the share of equal entries."""
    return sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)


def forgetting(matrix: list[list[float]]) -> float:
    """Return the mean over older tasks of the best accuracy ever less the final one."""
    losses = [max(row[j] for row in matrix[j:]) - matrix[-1][j] for j in range(len(matrix) - 1)]
    return float(np.mean(losses)) if losses else 0.0


def show_matrix(console: Console, summary: dict[str, Any], titles: list[str]) -> None:
    """Print the accuracy of every task after every task."""
    table = Table("after task", *titles, title="accuracy, % of test images, all classes competing")
    for number, row in enumerate(summary["accuracy_matrix"]):
        table.add_row(str(number + 1), *(f"{100 * cell:.1f}" for cell in row))
    console.print(table)


if __name__ == "__main__":
    main()
