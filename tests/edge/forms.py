"""Smaller forms of a DeiT-tiny that learned a stream: how alike, how large, how fast."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from inflora_core import forms
from inflora_core.compute import Compute
from inflora_core.config import LearnConfig, Limits
from inflora_core.graph import IMAGES, LOGITS, read_metadata
from inflora_core.images import decode
from inflora_core.predictor import CPU, session_options
from inflora_core.progress import Tracker
from inflora_core.store import Store
from inflora_core.worker import Worker
from tests.benchmarks import data
from tests.benchmarks.accuracy import STREAM, STREAM_BACKBONE
from tests.edge.alone import write

COMPARED = 1000
"""Images, of all classes: one more or less that differs is a tenth of a percent."""

TIMED, ROUNDS = 20, 9

Pixels = NDArray[np.uint8]


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Learn the stream, and compare the forms of its last version with ``model.onnx``."""
    if not STREAM.exists() or not STREAM_BACKBONE.exists():
        return {"forms_skipped": f"no {STREAM.name} beside the checkout"}
    tasks = data.load(str(STREAM), None, None, 0)
    with tempfile.TemporaryDirectory() as name:
        store = learned(Path(name), tasks, options.epochs)
        number = store.numbers()[-1]
        whole, version = store.onnx(number), store.version(number)
        handed_out = [form.file.name for form in version.forms]
    examples = [example for task in tasks for example in task.test]
    examples = examples[:: max(len(examples) // COMPARED, 1)]
    images = [decode(x, Limits()) for x, _ in examples]
    classes = read_metadata(whole).classes
    truth = np.array([classes.index(label) for _, label in examples])
    expected = forms.answers(whole, images, threads=1)
    known = accuracy(expected, truth)
    found: dict[str, Any] = {
        "form_images": len(images),
        "form_accuracy": {"fp32": round(known, 4)},
        "forms_handed_out": handed_out,
    }
    for form in forms.FORMS:
        content, _ = forms.made(form, whole)
        answers = forms.answers(content, images, threads=1)
        agreement = forms.agreement(expected, answers)
        found["form_accuracy"][form] = round(accuracy(answers, truth), 4)
        found |= {
            f"{form}_agreement": round(agreement.top1, 4),
            f"{form}_distance": round(agreement.distance, 5),
            f"{form}_lost": round(known - accuracy(answers, truth), 4),
            f"{form}_share": round(len(content) / len(whole), 4),
            f"{form}_cpu_ratio": round(cpu_ratio(content, whole, images[:TIMED]), 3),
        }
    return found


def accuracy(answers: forms.Answers, truth: NDArray[np.intp]) -> float:
    """Return the share of images that are named right."""
    return float((answers[0] == truth).mean())


def learned(folder: Path, tasks: list[data.TaskData], epochs: int) -> Store:
    """Learn a stream of tasks in a new store, in ``folder``."""
    store = Store.open(folder / "store")
    worker = Worker(store, Compute(), 2)
    worker.prepare(str(STREAM_BACKBONE), None)
    parent = None
    for number, task in enumerate(tasks, 1):
        spool = folder / f"spool-{number}"
        write(spool, task.train)
        parent = worker.learn(
            f"task-{number}", spool, LearnConfig(epochs=epochs), parent, Tracker()
        )
        print(f"task {number} of {len(tasks)} is learned", flush=True)
    return store


def cpu_ratio(form: bytes, whole: bytes, images: list[Pixels]) -> float:
    """Return the processor time of a prediction with one file, over that with another.

    Both are timed again and again in turns, on one thread: machines are shared.
    """
    sessions = [
        ort.InferenceSession(content, session_options(1), providers=[CPU])
        for content in (form, whole)
    ]
    ratios = []
    for _ in range(ROUNDS + 1):
        seconds = []
        for session in sessions:
            began = time.process_time()
            for image in images:
                session.run([LOGITS], {IMAGES: image[None]})
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios[1:])
