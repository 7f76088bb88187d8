"""Kill -9 of server and worker, again and again, while tasks are taught and two clients predict.

    python -m tests.durability.kills --kills 200 --out build/durability

Half of the kills come at random moments, half at failpoints, one after the other. A run that was
cut off goes on where it was. Afterwards the same tasks are taught to a server that nobody kills,
and these must hold:

* A request keeps its task, and every task that was acknowledged is in exactly one version.
* Every answer is of a version that was there, and is what that version's ONNX file says.
* The versions that a client sees never go back.
* The final state is that of the uninterrupted run, to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from inflora_client import Client, RetryPolicy, TaskState
from inflora_client.errors import InfloraClientError
from inflora_core import audit, durable
from inflora_core.audit import Event
from inflora_core.config import Limits
from inflora_core.failpoints import POINTS, VARIABLE
from inflora_core.images import decode
from inflora_core.predictor import Predictor, RuntimeOptions, top_classes
from inflora_core.store import ONNX_FILE, Store
from tests.core import tiny
from tests.running_server import RunningServer, running_server

OPTIONS = ("--epochs", "2", "--batch-size", "8", "--learn-threads", "1", "--predict-threads", "1")
OPTIONS += ("--gate-accuracy", "off", "--gate-distinct", "off", "--gate-interference", "off")
KILLED = (*OPTIONS, "--task-attempts", "1000000")
"""Kills are no fault of a task."""

EDITS = ("forgotten.", "purge.", "examples.", "audit.torn")
"""Failpoints of steps that teaching does not take."""

FAILPOINTS = tuple(sorted(name for name in POINTS if not name.startswith(EDITS)))
LONGEST_VISIT = 4
"""A process is killed at one of the first visits of its failpoint."""

SIDE = 24
CLASSES, EACH = 2, 8
IMAGES = tuple(tiny.png(colour, 5000 + i, SIDE) for i, colour in enumerate(tiny.COLOURS))
TOLERANCE = 1e-5
PATIENCE = 60.0
"""Seconds that a server may take to listen."""
LIVES = 8.0
"""How long a server lives at most, in times that it took to start. Its worker takes about three."""


def examples(number: int) -> list[tuple[bytes, str]]:
    """Return the images of task ``number``; no other has one of its classes."""
    colours = [tiny.COLOURS[(CLASSES * number + i) % len(tiny.COLOURS)] for i in range(CLASSES)]
    return [
        (tiny.png(colour, 100 * number + i, SIDE), f"{colour} {number}")
        for colour in colours
        for i in range(EACH)
    ]


@dataclass
class State:
    """What outlives this process.

    Attributes:
        kills: How many there were.
        tasks: Ids of acknowledged tasks, by number.
        ended: How many of them have ended.
        answers: Of every client: (version, image, probabilities by label), in order, without
            repetitions of the one before.
        violations: What must not have happened.
    """

    kills: int = 0
    tasks: list[str] = field(default_factory=list)
    ended: int = 0
    answers: list[list[Any]] = field(default_factory=lambda: [[], []])
    calls: int = 0
    violations: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> State:
        """Return what was saved, or a new one."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        durable.replace(path, json.dumps(vars(self)).encode())


class Run:
    """Servers that are killed, one after the other, and clients that go on regardless."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.wanted = folder, kills
        self.path = folder / "state.json"
        self.state = State.load(self.path)
        self.random = random.Random(f"{seed} {self.state.kills}")
        self.lock = threading.Lock()
        self.server: RunningServer | None = None
        self.serving = threading.Condition()
        self.over = threading.Event()

    # -- clients ------------------------------------------------------------------------------

    def client(self) -> Client:
        """Return a client of whatever server there is; wait for one."""
        with self.serving:
            self.serving.wait_for(lambda: self.server is not None or self.over.is_set())
            address = self.server.address if self.server else "127.0.0.1:9"
        return Client(address, retry=RetryPolicy(max_attempts=1))

    def teach(self) -> None:
        """Teach one task after the other until there were enough kills."""
        while self.state.kills < self.wanted or self.state.ended < len(self.state.tasks):
            number = self.state.ended
            with suppress(InfloraClientError), self.client() as client:
                task = client.learn(examples(number), request_id=f"request-{number}")
                self.acknowledged(number, task.id)
                *_, ended = client.watch(task)
                if ended.state is not TaskState.PUBLISHED:
                    self.violated(f"task {number} is {ended.state}: {ended.error}")
                with self.lock:
                    self.state.ended = number + 1
        self.over.set()
        with self.serving:
            self.serving.notify_all()

    def acknowledged(self, number: int, task: str) -> None:
        with self.lock:
            known = self.state.tasks
            if number == len(known):
                known.append(task)
            elif known[number] != task:
                self.violated(f"request {number} was task {known[number]}, and is {task}")

    def predict(self, who: int) -> None:
        """Predict until the end, and note what is answered."""
        asked = who
        versions = self.folder / "server" / "store" / "models" / "default" / "versions"
        while not self.over.is_set():
            with suppress(InfloraClientError), self.client() as client:
                while not self.over.is_set():
                    asked = (asked + 1) % len(IMAGES)
                    found = client.predict([IMAGES[asked]], top_k=10_000)
                    number = int(found.version.rpartition("/")[2])
                    if not (versions / f"{number:08d}").is_dir():
                        self.violated(f"version {number} answered, and is not there")
                    scores = {s.label: s.probability for s in found.predictions[0].scores}
                    self.answered(who, [number, asked, scores])
            self.over.wait(0.05)

    def answered(self, who: int, answer: list[Any]) -> None:
        with self.lock:
            self.state.calls += 1
            answers = self.state.answers[who]
            if answers and answer[0] < answers[-1][0]:
                self.violated(f"client {who} saw version {answers[-1][0]}, then {answer[0]}")
            if not any(answer == known for known in answers[-len(IMAGES) :]):
                answers.append(answer)

    def violated(self, what: str) -> None:
        print("VIOLATION:", what, flush=True)
        self.state.violations.append(what)

    # -- kills --------------------------------------------------------------------------------

    def go(self) -> None:
        """Kill as often as is wanted."""
        threads = [threading.Thread(target=self.teach)]
        threads += [threading.Thread(target=self.predict, args=(who,)) for who in range(2)]
        for thread in threads:
            thread.start()
        try:
            while not self.over.is_set():
                at = self.state.kills
                point = FAILPOINTS[at // 2 % len(FAILPOINTS)] if at % 2 else None
                if at >= self.wanted:
                    self.serve_to_the_end()
                else:
                    self.serve_and_kill(point)
                with self.lock:
                    self.state.save(self.path)
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def serve_and_kill(self, point: str | None) -> None:
        """Serve for a while, kill the server, and often its worker before that."""
        visit = self.random.randint(1, LONGEST_VISIT)
        prefix = ("env", f"{VARIABLE}={point}=kill@{visit}") if point else ()
        began = time.monotonic()
        with ExitStack() as stack:
            try:
                server = stack.enter_context(self.starting(*prefix))
            except RuntimeError as error:
                # The worker of the last server may not have let go of the store yet.
                if point is not None and "is in use by" not in str(error).splitlines()[-1]:
                    self.killed(f"{point}, as the server started")
                return
            longest = LIVES * (time.monotonic() - began)
            self.serve(server)
            if point is not None:
                self.wait_for_death(server, longest)
            elif self.random.random() < 0.5:
                self.wait_for_death(server, self.random.uniform(0, longest))
                with suppress(LookupError, ProcessLookupError):
                    os.kill(server.worker_pid(), signal.SIGKILL)
                    self.killed("worker")
            if point is None:
                self.wait_for_death(server, self.random.uniform(0, longest))
            at = server.process.poll()
            self.killed(point or "server")
            if at is None:
                server.process.kill()
            self.serve(None)

    def serve_to_the_end(self) -> None:
        """Let the task that is under way be finished."""
        with ExitStack() as stack, suppress(RuntimeError):
            self.serve(stack.enter_context(self.starting()))
            self.over.wait()

    def starting(self, *prefix: str) -> AbstractContextManager[RunningServer]:
        return running_server(
            self.folder / "server", KILLED, stop=False, prefix=prefix, timeout=PATIENCE
        )

    def serve(self, server: RunningServer | None) -> None:
        with self.serving:
            self.server = server
            self.serving.notify_all()

    def wait_for_death(self, server: RunningServer, seconds: float) -> None:
        """Wait until the server, or its first worker, is dead; at most so long."""
        first = None
        for _ in range(int(seconds / 0.02)):
            if server.process.poll() is not None or self.over.wait(0.02):
                return
            try:
                pid = server.worker_pid()
            except (LookupError, FileNotFoundError):
                pid = None
            if first is not None and pid != first:
                return
            first = pid

    def killed(self, what: str) -> None:
        with self.lock:
            self.state.kills += 1
            print(f"kill {self.state.kills}: {what}; {self.state.ended} tasks", flush=True)


# -- afterwards ---------------------------------------------------------------------------------


def uninterrupted(folder: Path, tasks: int) -> Store:
    """Teach as many tasks to a server that nobody kills."""
    with running_server(folder, OPTIONS) as server, Client(server.address) as client:
        known = {version.number for version in client.versions()}
        for number in range(len(known), tasks):
            client.wait(client.learn(examples(number), request_id=f"request-{number}"))
    return Store.open(server.store)


def faults(state: State, store: Store, reference: Store) -> Iterator[str]:
    """Yield what does not hold."""
    made: dict[str, list[int]] = {}
    for number in store.numbers():
        made.setdefault(store.verify(number).task, []).append(number)
    for number, task in enumerate(state.tasks):
        if len(made.get(task, [])) != 1:
            yield f"task {number} is in versions {made.get(task, [])}"
    for task in made.keys() - set(state.tasks):
        yield f"nobody was told of task {task}, which is a version"
    for who, answers in enumerate(state.answers):
        for number, image, scores in answers:
            expected = answer_of(store, number, image)
            if expected.keys() != scores.keys():
                yield f"client {who}: version {number} named other classes"
            elif max(abs(expected[name] - scores[name]) for name in scores) > TOLERANCE:
                yield f"client {who}: version {number} answers otherwise than its file"
    yield from differences(store, reference)
    yield from (fault.problem for fault in audit.verify(store.root).faults)
    accepted = [
        line.task for line in audit.verify(store.root).lines if line.event == Event.ACCEPTED
    ]
    if sorted(accepted) != sorted(state.tasks):
        yield "the audit log and the clients do not know the same tasks"


@lru_cache(maxsize=4)
def predictor_of(store: Store, number: int) -> Predictor:
    return Predictor.load(store.path(number, ONNX_FILE), RuntimeOptions(1))


@cache
def answer_of(store: Store, number: int, image: int) -> dict[str, float]:
    """Return what a version's ONNX file says of an image."""
    predictor = predictor_of(store, number)
    pixels = predictor.preprocess(decode(IMAGES[image], Limits()))
    (scores,) = top_classes(predictor.classify(pixels), predictor.card, 10_000)
    return dict(scores)


def differences(store: Store, reference: Store) -> Iterator[str]:
    """Yield what of two current states is not the same to the bit."""
    one, two = (each.load_model(each.current()) for each in (store, reference))
    if [entry.label for entry in one.classes] != [entry.label for entry in two.classes]:
        yield "the final states know other classes"
        return
    arrays = {f"layers.{name}.{part}": [getattr(model.layers[name], part) for model in (one, two)]
              for name in one.layers for part in ("key_value", "basis", "moment")}  # fmt: skip
    for name in ("head_weight", "head_bias", "class_means", "class_counts", "class_scatter"):
        arrays[name] = [getattr(model, name) for model in (one, two)]
    for name, (left, right) in arrays.items():
        if left.tobytes() != right.tobytes():
            yield f"{name} of the final states differs by up to {np.abs(left - right).max():g}"


def main() -> None:
    """Read the command line, kill, and look."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    options = parser.parse_args()
    folder = options.out / "kills"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference" / "store").exists():
        backbone = ["--backbone", str(tiny.write_backbone(folder))]
        with running_server(folder / "server", backbone):
            pass
        shutil.copytree(folder / "server" / "store", folder / "reference" / "store")
    run = Run(folder, options.kills, options.seed)
    run.go()
    state = run.state
    store = Store.open(folder / "server" / "store")
    reference = uninterrupted(folder / "reference", state.ended)
    violations = [*state.violations, *faults(state, store, reference)]
    for violation in violations:
        print("VIOLATION:", violation)
    print(
        json.dumps(
            {
                "kills": state.kills,
                "violations": len(violations),
                "tasks": state.ended,
                "failpoints": min(len(FAILPOINTS), state.kills // 2),
                "answers": state.calls,
                "compared": sum(map(len, state.answers)),
            }
        )
    )
    raise SystemExit(bool(violations))


if __name__ == "__main__":
    main()
