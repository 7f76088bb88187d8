"""What the publish gate holds back, of tasks that it should and of tasks that it should not.

    python -m tests.benchmarks.gate

On the bundled backbone at 32 px, with the server's default settings, SEEDS tasks of each kind, as a
first task and as a later one (on 20 classes of the stream and five digits, 20 images each). Seeds
take turns with the classes of the stream and the digits, and with 5 to 10 classes:

* *shuffled*: real images, their labels shuffled;
* *noise*: uniformly random pixels;
* *repeated*: one class a known class (in a first task, another class of the task) in other images,
  under a new name. To be named in a warning is enough here;
* *honest*: images of the classes that they are said to be of, 5, 20 and 40 a class.

Of the first two, seeds take turns with 5, 20 and 40 images a class, of *repeated* with 20 and 40.

Prints a table, and one JSON object as its last line: ``gate_false_pass`` and ``gate_false_stop``
are counts of tasks, ``gate_bad`` and ``gate_honest`` of how many.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inflora_core import bundled
from inflora_core.backbone import create_backbone
from inflora_core.config import preset
from inflora_core.model import ContinualModel, LabelledImages
from tests.benchmarks import teaching, unusual
from tests.benchmarks.accuracy import STREAM
from tests.benchmarks.runs import Array
from tests.benchmarks.unusual import Class, Stream

SEEDS = 20
KINDS = ("shuffled", "noise", "repeated", "honest")
IMAGES = (5, 20, 40)
"""Images a class."""

TAUGHT = 20
"""Images of each class that is known before a later task."""

NAME = "another name"
"""Of the repeated class."""


@dataclass(frozen=True)
class Trial:
    """One task to be judged.

    Attributes:
        kind: One of ``KINDS``.
        later: Whether classes are known before it.
        images: Images a class.
        seed: Decides everything else.
    """

    kind: str
    later: bool
    images: int
    seed: int

    @property
    def digits(self) -> bool:
        """Whether it is made of digits."""
        return self.seed % 2 == 1


@dataclass(frozen=True)
class Scene:
    """What trials take their images from.

    Attributes:
        stream: Teaches.
        known: What is known before later tasks.
        old: The classes of it, of the stream and digits: all images, those taught first.
        new: The classes that it does not know.
    """

    stream: Stream
    known: ContinualModel
    old: tuple[tuple[Class, ...], tuple[Class, ...]]
    new: tuple[tuple[Class, ...], tuple[Class, ...]]


def trials(seeds: int, kinds: Sequence[str]) -> Iterator[Trial]:
    """Yield all trials."""
    for kind in kinds:
        for later in (False, True):
            for seed in range(seeds):
                turns = {"honest": IMAGES, "repeated": (IMAGES[1 + seed // 2 % 2],)}
                for images in turns.get(kind, (IMAGES[seed % 3],)):
                    yield Trial(kind, later, images, seed)


@cache
def scene(data: str) -> Scene:
    """Return the scene; learns what is known before later tasks."""
    backbone = create_backbone(str(bundled.PATH))
    stream = Stream(backbone, teaching.untaught(backbone), {})
    pictures, digits = (unusual.load(source, backbone) for source in (data, "digits"))
    model = stream.blank
    for part in (pictures[:10], pictures[10:20], digits[:5]):
        model, _ = stream.teach(model, part, [entry.train[:TAUGHT] for entry in part])
    return Scene(
        stream,
        model,
        (tuple(pictures[:20]), tuple(digits[:5])),
        (tuple(pictures[20:]), tuple(digits[5:])),
    )


def task_of(trial: Trial, setting: Scene) -> LabelledImages:
    """Return the images and labels of a trial."""
    generator = np.random.default_rng([trial.seed, KINDS.index(trial.kind), trial.later])
    pool = setting.new[trial.digits]
    if not trial.later:
        pool = setting.old[trial.digits] + pool
    size = min(5 + trial.seed % 6, len(pool))
    classes = [pool[i] for i in generator.permutation(len(pool))[:size]]
    rows = [_some(entry.train, trial.images, generator) for entry in classes]
    names = [entry.name for entry in classes]
    if trial.kind == "noise":
        rows = [generator.integers(0, 256, part.shape, np.uint8) for part in rows]
    elif trial.kind == "repeated":
        names[0] = NAME
        source = classes[1]
        if trial.later:
            old = setting.old[trial.digits]
            source = old[generator.integers(len(old))]
        everything = np.concatenate([source.train[TAUGHT if trial.later else 0 :], source.test])
        both = _some(everything, 2 * trial.images, generator)
        rows[0] = both[: trial.images] if trial.later else both[: len(both) // 2]
        if not trial.later:
            rows[1] = both[len(both) // 2 :]
    labels = np.repeat(np.arange(size), [len(part) for part in rows])
    if trial.kind == "shuffled":
        labels = generator.permutation(labels)
    return LabelledImages(np.concatenate(rows), labels.astype(np.int64), tuple(names))


def judged(trial: Trial, data: str) -> dict[str, Any]:
    """Learn a trial's task; return what the gate says of it."""
    torch.set_num_threads(1)
    setting = scene(data)
    found = teaching.judge(
        setting.known if trial.later else setting.stream.blank,
        setting.stream.backbone,
        task_of(trial, setting),
        "trial",
        preset("default").updated(seed=trial.seed),
    )
    named = any(repr(NAME) in warning for warning in found["warnings"])
    return found | {"named": named, "caught": bool(found["failed"]) or named}


def summary(results: Sequence[tuple[Trial, dict[str, Any]]]) -> dict[str, Any]:
    """Return counts of what went wrong, in all and for each kind of trial."""
    wrong, groups = {"gate_false_pass": 0, "gate_false_stop": 0}, dict[str, dict[str, Any]]()
    for trial, found in results:
        honest, held_back = trial.kind == "honest", bool(found["failed"])
        where = f"{trial.kind}, {'later' if trial.later else 'first'}"
        where += f", {trial.images} images" if honest else ""
        empty = {"tasks": 0, "held_back": 0, "named": 0, "accuracy": [], "interference": 0.0}
        group = groups.setdefault(where, empty)
        group["tasks"] += 1
        group["held_back"] += held_back
        group["named"] += bool(found["warnings"]) if honest else found["named"]
        if (value := found["values"]["accuracy"]) is not None:
            group["accuracy"].append(value)
        group["interference"] = max(group["interference"], found["interference"])
        wrong["gate_false_stop"] += honest and held_back
        right = found["caught"] if trial.kind == "repeated" else held_back
        wrong["gate_false_pass"] += not honest and not right
    for group in groups.values():
        measured = group["accuracy"]
        group["measured"] = len(measured)
        group["accuracy"] = [min(measured), max(measured)] if measured else None
    honest_tasks = sum(trial.kind == "honest" for trial, _ in results)
    counts = {"gate_bad": len(results) - honest_tasks, "gate_honest": honest_tasks}
    return wrong | counts | {"groups": groups}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all trials; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", default=str(STREAM), help="an npz file or a folder, with digits")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--processes", type=int, default=2, help="each with one thread")
    parser.add_argument("--out", type=Path, default=Path("build/gate.jsonl"), help="goes on there")
    options = parser.parse_args(arguments)
    wanted = list(trials(options.seeds, options.kinds))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = [(trial, found) for trial, found in _done(options.out) if trial in wanted]
    todo = [trial for trial in wanted if trial not in dict(results)]
    with (
        ProcessPoolExecutor(options.processes, get_context("spawn")) as pool,
        options.out.open("a") as file,
    ):
        answers = pool.map(judged, todo, [options.data] * len(todo))
        for trial, found in zip(todo, answers, strict=True):
            results.append((trial, found))
            print(json.dumps([vars(trial), found]), file=file, flush=True)
            shown = {key: found[key] for key in ("values", "failed", "named", "alike")}
            print(json.dumps(vars(trial) | shown), flush=True)
    figures = summary(results)
    for name, group in figures["groups"].items():
        print(f"{name:28} {json.dumps(group)}", flush=True)
    print(json.dumps(figures), flush=True)
    return figures


def _done(path: Path) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Yield what an earlier run found; a change of the gate or of learning calls for a new file."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # the last one, of a run that was cut off
            trial, found = json.loads(line)
            yield Trial(**trial), found


def _some(images: Array, count: int, generator: np.random.Generator) -> Array:
    return np.array(images[generator.permutation(len(images))[:count]])


ENOUGH = 19 / 20
"""Share of each kind of task that has to be judged right: of the bad ones that are meant to be held
back, and of honest ones."""


def passes(figures: dict[str, Any]) -> bool:
    """Whether the gate does what it is there for."""
    for name, group in figures["groups"].items():
        kind = name.partition(",")[0]
        right = group["held_back"] if kind in ("shuffled", "noise") else group["named"]
        if kind == "honest":
            right = group["tasks"] - group["held_back"]
        if right < ENOUGH * group["tasks"]:
            return False
    return True


if __name__ == "__main__":
    sys.exit(not passes(main()))
