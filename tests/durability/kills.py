"""Kill -9 of server and worker, again and again, while classes come and go and two clients predict.

    python -m tests.durability.kills --kills 200 --out build/durability

As many kills come at random moments, and one at every failpoint besides. A run that was cut off
goes on where it was. Meanwhile tasks are taught, classes forgotten, with and without their data,
and versions rolled back to, by ``PLAN``. Afterwards the same is done to a server that nobody kills,
and these must hold:

* A request keeps its task, and every task that was acknowledged is in exactly one version.
* Every answer is of a version that was there, and what its ONNX file says: to the bit, or nearly
  where it was classified together with another client's image.
* The versions that a client sees are those that were current by the audit log, in that order.
* The final state is that of the uninterrupted run, to the bit, and the doctor finds nothing.
* Every failpoint was reached.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from inflora_client import Client, RetryPolicy
from inflora_client.errors import InfloraClientError, StatusError, TaskFailedError
from inflora_core import audit, durable, edits
from inflora_core.config import Limits
from inflora_core.failpoints import POINTS, VARIABLE
from inflora_core.graph import materialise
from inflora_core.images import decode
from inflora_core.predictor import Predictor, RuntimeOptions, top_classes
from inflora_core.store import ONNX_FILE, Store
from inflora_service.doctor import Severity, examine
from tests.core import tiny
from tests.running_server import RunningServer, running_server

OPTIONS: tuple[str, ...] = (
    *("--epochs", "2", "--batch-size", "8", "--learn-threads", "1", "--predict-threads", "1"),
    *("--gate-accuracy", "off", "--gate-distinct", "off", "--gate-interference", "off"),
    *("--gate-canary", "off", "--canary-images", "2"),
    *("--keep-versions", "6", "--keep-onnx", "2"),
)
KILLED = (*OPTIONS, "--task-attempts", "1000000")
"""Kills are no fault of a task."""

LONGEST_VISIT = 3
"""A process is killed at one of the first visits of its failpoint."""
TRIES = 4
"""Servers that are started to reach a failpoint before it counts as never reached."""

BEFORE = {"spool.recover": "spool.flushed", "spool.recovered": "spool.flushed"}
"""Failpoints that are reached only after a kill at another one."""

LARGE = 480
"""Pixels of the side of a large image: sixteen of them have more than is flushed at a time."""
CLASSES, EACH = 2, 8
IMAGES = tuple(tiny.png(colour, 5000 + i) for i, colour in enumerate(tiny.COLOURS))
PATIENCE = 60.0
"""Seconds that a server may take to listen."""
TOLERANCE = 1e-5
"""Between probabilities of one image in batches of different sizes."""
PAUSE = 0.05
"""Seconds between two predictions of a client."""
LIVES = 2.0
"""How long a server lives at most before a random kill, in times that the first one took to start:
it had to wait for its worker, which made the backbone."""


@dataclass(frozen=True)
class Step:
    """Something that is done to the server.

    Attributes:
        kind: ``forget`` keeps the data of older versions, ``purge`` does not; ``back`` makes the
            version current that a step before made.
        back: How many steps before.
        large: Whether the images are so large that they are flushed before the upload ends.
    """

    kind: Literal["teach", "forget", "purge", "back"]
    back: int = 0
    large: bool = False


PLAN = (
    Step("teach", large=True),
    Step("teach"),
    Step("back", 2),
    Step("teach"),
    Step("forget", 4),
    Step("teach"),
    Step("purge", 3),
)
"""What is done, over and over. Versions that are rolled back to are neither old nor purged."""


def step_of(number: int) -> Step:
    """Return step ``number``, from 0."""
    return PLAN[number % len(PLAN)]


def labels(number: int) -> list[str]:
    """Return the classes that step ``number`` teaches; no other does."""
    return [
        f"{tiny.COLOURS[(CLASSES * number + i) % len(tiny.COLOURS)]} {number}"
        for i in range(CLASSES)
    ]


def examples(number: int) -> list[tuple[bytes, str]]:
    """Return the images of step ``number``."""
    encoded = bmp if step_of(number).large else tiny.png
    return [
        (encoded(label.partition(" ")[0], 100 * number + i), label)
        for label in labels(number)
        for i in range(EACH)
    ]


def bmp(colour: str, number: int) -> bytes:
    """Return an image of a class as a file that is large for what is in it."""
    file = io.BytesIO()
    image = Image.fromarray(tiny.pattern(colour, number))
    image.resize((LARGE, LARGE), Image.Resampling.NEAREST).save(file, "BMP")
    return file.getvalue()


def take(client: Client, number: int, versions: list[int], request: str = "") -> tuple[str, int]:
    """Take step ``number`` to its end, also if it was begun before.

    Args:
        client: Of the server.
        number: The step.
        versions: What was current after the steps before.
        request: Id of the request, if it is not to be that of the step.

    Returns:
        The id of its task, "" if it has none, and the version that is current after it.

    Raises:
        TaskFailedError: its task was not published.
    """
    step, request = step_of(number), request or f"request-{number}"
    if step.kind == "back":
        return "", client.promote(versions[number - step.back]).number
    if step.kind == "teach":
        task = client.learn(examples(number), request_id=request)
    else:
        label = labels(number - step.back)[0]
        task = client.forget(label, purge=step.kind == "purge", request_id=request)
    ended = client.wait(task)
    assert ended.version is not None
    return task.id, int(ended.version.rpartition("/")[2])


@dataclass
class State:
    """What outlives this process.

    Attributes:
        kills: How many there were at random moments.
        points: Failpoints to come, with how often they were tried.
        reached: Failpoints at which something was killed.
        tasks: Ids of the tasks of steps that have ended, "" where there was none.
        versions: What was current after each step.
        calls: Predictions that were answered.
        violations: What must not have happened.
        start_seconds: How long a server takes to start that has no backbone yet.
    """

    kills: int = 0
    points: list[tuple[str, int]] = field(
        default_factory=lambda: [(name, 0) for name in sorted(POINTS)]
    )
    reached: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    calls: int = 0
    violations: list[str] = field(default_factory=list)
    start_seconds: float = 0.0

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
        self.random = random.Random(f"{seed} {self.state.kills} {len(self.state.reached)}")
        self.store = folder / "server" / "store"
        # Always the same, so that a client that was cut off finds the next server.
        self.port = free_port()
        self.lock = threading.Lock()
        self.up = threading.Event()
        self.over = threading.Event()

    @property
    def enough(self) -> bool:
        """Whether there were enough kills."""
        return self.state.kills >= self.wanted and not self.state.points

    # -- clients ------------------------------------------------------------------------------

    def client(self, attempts: int = 1) -> Client:
        """Return a client of whatever server there is; wait for one."""
        while not (self.up.wait(0.1) or self.over.is_set()):
            pass
        return Client(f"127.0.0.1:{self.port}", retry=RetryPolicy(max_attempts=attempts))

    def teach(self) -> None:
        """Take steps until there were enough kills."""
        try:
            self._teach()
        except Exception as error:
            self.violated(f"step {len(self.state.versions)}: {error!r}")
            raise
        finally:
            self.over.set()

    def _teach(self) -> None:
        while not self.enough or len(self.state.versions) % len(PLAN):
            number = len(self.state.versions)
            try:
                with self.client(attempts=5) as client:
                    task, version = take(client, number, self.state.versions)
            except TaskFailedError:
                raise
            except InfloraClientError:
                continue
            keep_copy(self.store, self.folder / "copies", version)
            with self.lock:
                self.state.tasks.append(task)
                self.state.versions.append(version)

    def predict(self, who: int) -> None:
        """Predict until the end, and note what is answered."""
        asked = who
        recent: list[list[Any]] = []
        versions = self.store / "models" / "default" / "versions"
        with (self.folder / f"answers-{who}.jsonl").open("a") as file:
            while not self.over.is_set():
                with self.tolerated(), self.client() as client:
                    # With a pause: the worker, which has to wait for them, should get on as well.
                    while not self.over.wait(PAUSE):
                        asked = (asked + 1) % len(IMAGES)
                        found = client.predict([IMAGES[asked]], top_k=10_000)
                        number = int(found.version.rpartition("/")[2])
                        if not (versions / f"{number:08d}").is_dir():
                            self.violated(f"version {number} answered, and is not there")
                        scores = {s.label: s.probability for s in found.predictions[0].scores}
                        answer = [number, asked, scores]
                        with self.lock:
                            self.state.calls += 1
                        if answer not in recent:
                            file.write(json.dumps(answer) + "\n")
                            file.flush()
                        recent = [*recent, answer][-len(IMAGES) :]
                self.over.wait(0.05)

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Go on after an error that a client must expect of a server that comes and goes."""
        try:
            yield
        except StatusError as error:
            untaught = error.reason == "WRONG_STATE" and not self.state.versions
            # Of a connection that is cut, gRPC says one of several things, and the server nothing.
            cut = not error.reason and error.code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN")
            if not (untaught or cut or error.reason == "UNAVAILABLE"):
                self.violated(f"a prediction failed: {error!r}")
        except Exception as error:
            self.violated(f"a prediction failed: {error!r}")

    def violated(self, what: str) -> None:
        print("VIOLATION:", what, flush=True)
        with self.lock:
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
                if self.enough:
                    self.serve_to_the_end()
                elif self.state.points and len(self.state.reached) <= self.state.kills:
                    self.kill_at(*self.state.points.pop(0))
                else:
                    self.kill_at_random()
                with self.lock:
                    self.state.save(self.path)
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def kill_at(self, point: str, tries: int) -> None:
        """Have something die at a failpoint; a round of all steps should come there."""
        if point in BEFORE:
            self.serve_until_death(BEFORE[point], 1)
        if point == "audit.torn":
            tear(self.store / audit.FILE)
        visit = self.random.randint(1, LONGEST_VISIT) if tries == 0 else 1
        if self.serve_until_death(point, visit):
            self.state.reached.append(point)
            self.report(point)
        elif tries + 1 < TRIES:
            self.state.points.append((point, tries + 1))
        else:
            self.violated(f"failpoint {point} was never reached")

    def serve_until_death(self, point: str, visit: int) -> bool:
        """Serve until server or worker die at a failpoint; return False if they do not."""
        # Examples leave the spool in one of two ways.
        keep = "never" if point.startswith("spool.delete") else "always"
        prefix = ("env", f"{VARIABLE}={point}=kill@{visit}")
        end = len(self.state.versions) + len(PLAN) + 2
        with ExitStack() as stack:
            try:
                server = stack.enter_context(self.starting("--keep-examples", keep, prefix=prefix))
            except RuntimeError as error:
                if "error:" in str(error).splitlines()[-1]:
                    raise  # it was not killed
                return True
            self.up.set()
            died = self.wait_for_death(server, lambda: len(self.state.versions) >= end)
            self.up.clear()
            if server.process.poll() is None:
                server.process.kill()
        return died

    def kill_at_random(self) -> None:
        """Serve for a while, kill the server, and often its worker before that."""
        longest = LIVES * self.state.start_seconds
        with ExitStack() as stack:
            server = stack.enter_context(self.starting("--keep-examples", "always"))
            self.up.set()
            if self.random.random() < 0.5:
                self.live(self.random.uniform(0, longest))
                with suppress(LookupError, ProcessLookupError):
                    os.kill(server.worker_pid(), signal.SIGKILL)
                    self.state.kills += 1
                    self.report("worker")
            self.live(self.random.uniform(0, longest))
            server.process.kill()
            self.up.clear()
            self.state.kills += 1
            self.report("server")

    def serve_to_the_end(self) -> None:
        """Let the steps that are left be taken."""
        with ExitStack() as stack:
            stack.enter_context(self.starting("--keep-examples", "always"))
            self.up.set()
            self.over.wait()
            self.up.clear()

    def starting(
        self, *options: str, prefix: tuple[str, ...] = ()
    ) -> AbstractContextManager[RunningServer]:
        return running_server(
            self.folder / "server",
            (*KILLED, *options, "--port", str(self.port)),
            stop=False,
            prefix=prefix,
            timeout=PATIENCE,
        )

    def live(self, seconds: float) -> None:
        """Let the server be for a while; that long is what is tested, and nothing waited for."""
        self.over.wait(seconds)

    def wait_for_death(self, server: RunningServer, until: Callable[[], bool]) -> bool:
        """Wait until the server, or its first worker, is dead; return False if ``until`` holds."""
        first = None
        while not until():
            if server.process.poll() is not None:
                return True
            try:
                pid = server.worker_pid()
            except (LookupError, FileNotFoundError):
                pid = None
            if first is not None and pid != first:
                return True
            first = pid
            if self.over.wait(0.02):
                return False
        return False

    def report(self, what: str) -> None:
        kills = self.state.kills + len(self.state.reached)
        print(f"kill {kills}: {what}; {len(self.state.versions)} steps", flush=True)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tear(path: Path) -> None:
    """Leave half a line at the end of the log, as a power cut may."""
    with path.open("ab") as file:
        file.write(b'{"seq": 1')


def keep_copy(root: Path, copies: Path, number: int) -> None:
    """Keep a version as it was published, whatever becomes of it."""
    name = f"models/default/versions/{number:08d}"
    source, target = root / name, copies / name
    if not target.exists():
        draft = copies / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(target)


# -- afterwards ---------------------------------------------------------------------------------


def uninterrupted(folder: Path, steps: int) -> Store:
    """Take as many steps with a server that nobody kills."""
    done = folder / "versions.json"
    versions: list[int] = json.loads(done.read_text()) if done.exists() else []
    options = (*OPTIONS, "--keep-examples", "always")
    with running_server(folder, options) as server, Client(server.address) as client:
        while len(versions) < steps:
            versions.append(take(client, len(versions), versions)[1])
            durable.replace(done, json.dumps(versions).encode())
    return Store.open(server.store)


def faults(state: State, copies: Copies, store: Store, reference: Store) -> Iterator[str]:
    """Yield what does not hold."""
    made: dict[str, list[int]] = {}
    for number in store.numbers():
        made.setdefault(store.manifest(number).task, []).append(number)
    acknowledged = [task for task in state.tasks if task]
    for task in acknowledged:
        if len(made.get(task, [])) != 1:
            yield f"task {task} is in versions {made.get(task, [])}"
    for task in made.keys() - set(acknowledged):
        yield f"nobody was told of task {task}, which is a version"
    log = audit.verify(store.root)
    if sorted(acknowledged) != sorted(log.history.accepted):
        yield "the audit log and the clients do not know the same tasks"
    yield from (fault.problem for fault in log.faults)
    yield from still_moves(log)
    for who in range(2):
        answers = list(read_answers(copies.folder / f"answers-{who}.jsonl"))
        if not answers:
            yield f"client {who} was never answered"
        seen = [number for number, _ in groupby(number for number, _, _ in answers)]
        if not is_part(seen, log.history.current):
            yield f"client {who} saw versions that were not current in that order"
        forgotten: set[str] = set()
        for number, image, scores in answers:
            missing = copies.missing(number, scores)
            if back := forgotten & (copies.classes(number) - missing):
                yield f"client {who} saw version {number} with {back}, forgotten before"
            forgotten |= missing
            if (fault := copies.fault(number, image, scores)) is not None:
                yield f"client {who}: {fault}"
    for finding in examine(store.root).found:
        if finding.severity is not Severity.NOTE:
            yield f"doctor: {finding.path}: {finding.problem}"
    yield from differences(store, reference)


def still_moves(log: audit.Reading) -> Iterator[str]:
    """Yield moves of the audit log from a version to the same one."""
    for line in log.lines:
        if line.event in audit.MOVES and line.version_from == line.version_to:
            yield f"audit log: {line.event}, from version {line.version_from} to itself"


def read_answers(path: Path) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Yield (version, image, probabilities by label) as they came."""
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # the last one, of a run that was cut off
            number, image, scores = json.loads(line)
            yield number, image, scores


def is_part(seen: list[int], whole: tuple[int, ...]) -> bool:
    """Whether ``seen`` is what is left of ``whole`` when some of it is left out."""
    rest = iter(whole)
    return all(number in rest for number in seen)


class Copies:
    """Versions as they were published, to hold answers against.

    Attributes:
        compared: Answers that are what the files say.
        equal: Those that are it to the bit.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.folder = folder
        root = folder / "copies"
        for name in ("FORMAT", "backbones"):
            with suppress(FileExistsError):
                (root / name).symlink_to((store.root / name).absolute())
        model = root / "models" / "default"
        with suppress(FileExistsError):
            shutil.copyfile(store.root / "models" / "default" / "backbone", model / "backbone")
        self._store = Store(root)
        if not (model / "forgotten.json").exists():
            shutil.copyfile(folder / "forgotten.json", model / "forgotten.json")
        self._forgotten = store.forgotten().keys
        self.compared = self.equal = 0
        self.predictor = cache(self._predictor)
        self.answer = cache(self._answer)
        self._version = cache(self._store.version)

    def fault(self, number: int, image: int, scores: dict[str, float]) -> str | None:
        """Return what is wrong with an answer, None if nothing is."""
        missing = self.missing(number, scores)
        if not missing <= self._forgotten:
            return f"version {number} leaves out classes that nobody forgot"
        expected = self.answer(number, missing, image)
        if expected.keys() != scores.keys():
            return f"version {number} names other classes"
        if max(abs(expected[label] - scores[label]) for label in scores) > TOLERANCE:
            return f"version {number} answers otherwise than its file"
        self.compared += 1
        self.equal += expected == scores
        return None

    def classes(self, number: int) -> frozenset[str]:
        """Return the keys of the classes that a version was made with."""
        return frozenset(entry.key for entry in self._version(number).classes)

    def missing(self, number: int, scores: dict[str, float]) -> frozenset[str]:
        """Return the keys of those that an answer leaves out."""
        classes = self._version(number).classes
        return frozenset(entry.key for entry in classes if entry.label not in scores)

    def _predictor(self, number: int, missing: frozenset[str]) -> Predictor:
        path = self._store.path(number, ONNX_FILE)
        if not missing:
            return Predictor.load(path, RuntimeOptions(1))
        # Between a class's being forgotten and the swap to the version without it, a restarted
        # server answers with the older version, without that class.
        model = edits.without(self._store.load_model(number), missing)
        template = self._store.backbone().template_path.read_bytes()
        return Predictor.load(materialise(template, model, number), RuntimeOptions(1))

    def _answer(self, number: int, missing: frozenset[str], image: int) -> dict[str, float]:
        predictor = self.predictor(number, missing)
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


def run(out: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill, look, and return the figures.

    Args:
        out: Folder; a run that was cut off goes on from what is there.
        kills: At random moments.
        seed: Of the moments.
    """
    folder = out / "kills"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference" / "store").exists():
        backbone = ["--backbone", str(tiny.write_backbone(folder))]
        times = []
        # The shorter of two: the first import of torch may take many times as long as any other.
        for name in ("scratch", "server"):
            began = time.monotonic()
            with running_server(folder / name, backbone):
                times.append(time.monotonic() - began)
        shutil.rmtree(folder / "scratch")
        State(start_seconds=min(times)).save(folder / "state.json")
        begun = folder / "server" / "store"
        shutil.copyfile(begun / "models/default/forgotten.json", folder / "forgotten.json")
        shutil.copytree(begun, folder / "reference" / "store")
    killing = Run(folder, kills, seed)
    if not killing.enough:
        killing.go()
    state = killing.state
    store = Store.open(folder / "server" / "store")
    reference = uninterrupted(folder / "reference", len(state.versions))
    copies = Copies(store, folder)
    violations = [*state.violations, *faults(state, copies, store, reference)]
    for violation in violations:
        print("VIOLATION:", violation)
    return {
        "kills": state.kills + len(state.reached),
        "violations": len(violations),
        "kills_at_random": state.kills,
        "failpoints": len(state.reached),
        "steps_taken": len(state.versions),
        "answers": state.calls,
        "answers_compared": copies.compared,
        "answers_equal": copies.equal,
        "versions": len(store.numbers()),
    }


def main() -> None:
    """Read the command line, kill, and look."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    options = parser.parse_args()
    figures = run(options.out, options.kills, options.seed)
    print(json.dumps(figures))
    raise SystemExit(bool(figures["violations"]))


if __name__ == "__main__":
    main()
