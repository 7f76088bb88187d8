"""One learner and several predictors on a shared store: processes, and an S3 server on loopback."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from inflora_client import Client, InfloraClientError, RetryPolicy, TaskState
from inflora_core.shared import SharedStore
from tests.core import tiny
from tests.deploy.s3_server import S3, running_s3
from tests.running_server import RunningServer, running_server

SIDE = 24
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 120.0
LEARNING = ("--epochs", "2", "--batch-size", "16", "--learn-threads", "1")
# What a gate has to say of a tiny model that knows dozens of colours is not what is measured here.
UNGATED = tuple(
    word
    for name in ("accuracy", "distinct", "interference", "canary")
    for word in (f"--gate-{name}", "off")
)
STRIPES = ("", " a", " bc", " def", " gh")

Figures = dict[str, Any]


def label(number: int) -> str:
    """Return a class that no other task teaches."""
    return tiny.COLOURS[number % len(tiny.COLOURS)] + STRIPES[number // len(tiny.COLOURS)]


def teach(client: Client, number: int) -> int:
    """Teach a class; return the version that knows it, once it is published."""
    name = label(number)
    task = client.wait(client.learn([(tiny.png(name, i, SIDE), name) for i in range(8)]))
    if task.state is not TaskState.PUBLISHED:
        raise RuntimeError(f"task {number} was not published: {task}")
    return number_of(task.version)


def number_of(version: str) -> int:
    """Return the number in a version's name."""
    return int(version.rpartition("/")[2])


@dataclass
class Caller:
    """Asks a server the same, again and again, and takes no failure for granted.

    Attributes:
        address: Of the server.
        retry: What the client does about failures.
        seen: When a version answered first, by ``time.monotonic``.
        answers: What each version said.
        failures: What failed.
        calls: How often it asked.
    """

    address: str
    retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(max_attempts=1))
    seen: dict[int, float] = field(default_factory=dict)
    answers: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    failures: list[str] = field(default_factory=list)
    calls: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _news: threading.Condition = field(default_factory=threading.Condition)

    def start(self) -> Caller:
        """Begin to ask."""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(60)

    def wait_for(self, version: int) -> float:
        """Return when a version answered first, once it has."""
        with self._news:
            if not self._news.wait_for(lambda: version in self.seen, PATIENCE_SECONDS):
                raise RuntimeError(
                    f"{self.address} does not answer with version {version}, but with "
                    f"{sorted(self.seen)}, and fails with {self.failures[-1:]}"
                )
        return self.seen[version]

    def _run(self) -> None:
        images = [tiny.png(colour, 7000, SIDE) for colour in ("red", "blue")]
        with Client(self.address, retry=self.retry) as client:
            while not self._stop.is_set():
                self.calls += 1
                try:
                    found = client.predict(images, top_k=1000)
                except InfloraClientError as error:
                    self.failures.append(str(error))
                    continue
                version = number_of(found.version)
                self.answers[version].add(repr(found.predictions))
                if version not in self.seen:
                    with self._news:
                        self.seen[version] = time.monotonic()
                        self._news.notify_all()


class Fleet:
    """Servers on a shared store, which end with ``stack``."""

    def __init__(self, stack: ExitStack, folder: Path, url: str) -> None:
        self._stack = stack
        self._folder = folder
        self._url = url

    def start(self, name: str, *options: str, stop: bool = True) -> RunningServer:
        """Start a server."""
        more = ["--shared", self._url, "--predict-threads", "1", *options]
        return self._stack.enter_context(running_server(self._folder / name, more, stop=stop))

    def learner(self, name: str, *options: str, backbone: Path | None = None) -> RunningServer:
        """Start one that learns, by default with a tiny backbone."""
        backbone = backbone or tiny.write_backbone(self._folder)
        more = ["--role", "learner", "--backbone", str(backbone), *LEARNING, *UNGATED]
        return self.start(name, *more, *options)

    def predictor(self, name: str, *options: str, stop: bool = True) -> RunningServer:
        """Start one that follows."""
        more = ["--role", "predictor", "--poll-seconds", str(POLL_SECONDS)]
        return self.start(name, *more, *options, stop=stop)

    def within(self, stack: ExitStack) -> Fleet:
        """Return one whose servers end with another stack."""
        other = copy(self)
        other._stack = stack
        return other

    def client(self, server: RunningServer) -> Client:
        """Return a client of a server."""
        return self._stack.enter_context(Client(server.address))

    def ask(self, address: str, **more: Any) -> Caller:
        """Have somebody ask, until the end."""
        caller = Caller(address, **more).start()
        self._stack.callback(caller.stop)
        return caller


def scale(folder: Path, tasks: int = 30, away_seconds: float = 60.0) -> Figures:
    """Teach, and ask three predictors; take the store away, and kill one of them meanwhile."""
    with running_s3() as s3, ExitStack() as stack:
        fleet = Fleet(stack, folder, s3.url)
        teacher = fleet.client(fleet.learner("learner"))
        teach(teacher, 0)
        servers = [fleet.predictor(f"predictor-{n}", stop=n < 2) for n in range(3)]
        callers = [fleet.ask(server.address) for server in servers]
        lags: list[float] = []

        def teach_all(numbers: Iterable[int]) -> None:
            for number in numbers:
                version = teach(teacher, number)
                published = time.monotonic()
                lags.extend(caller.wait_for(version) - published for caller in callers)

        teach_all(range(1, tasks // 2))
        s3.take_away()
        gone = time.monotonic()
        doomed = callers.pop()
        servers[2].process.kill()
        failures = list(doomed.failures)  # later ones are those of a server that is dead
        doomed.stop()
        version = teach(teacher, tasks // 2)
        threading.Event().wait(max(0.0, away_seconds - (time.monotonic() - gone)))
        s3.bring_back()
        back = time.monotonic()
        callers.append(fleet.ask(fleet.predictor("replacement").address))
        caught_up = [caller.wait_for(version) - back for caller in callers]
        teach_all(range(tasks // 2 + 1, tasks))
        for caller in callers:
            caller.stop()
            failures += caller.failures

        said: dict[int, set[str]] = defaultdict(set)
        for caller in (*callers, doomed):
            for number, answers in caller.answers.items():
                said[number] |= answers
        figures = {
            "tasks": tasks,
            "calls": sum(caller.calls for caller in callers),
            "failed_calls": len(failures),
            "failures": sorted(set(failures))[:3],
            "poll_seconds": POLL_SECONDS,
            "replicas": len(lags),
            "late_replicas": sum(lag > 2 * POLL_SECONDS for lag in lags),
            "lag_median_seconds": round(statistics.median(lags), 2),
            "lag_most_seconds": round(max(lags), 2),
            "store_away_seconds": round(back - gone, 1),
            "caught_up_seconds": [round(each, 2) for each in caught_up],
            "versions_compared": len(said),
            "versions_that_differ": sum(len(answers) > 1 for answers in said.values()),
            **second_learner(folder, fleet, s3),
        }
        wanted = {"failed_calls": 0, "late_replicas": 0, "versions_that_differ": 0}
        wanted |= {"double_publishes": 0, "learners_of_two_that_started": 1}
        return judged(figures, wanted | {"refusals_that_say_why": 2})


def second_learner(folder: Path, fleet: Fleet, s3: S3) -> Figures:
    """Start another learner on the same shared store, and two at once on a new one."""
    before = SharedStore.open(s3.url).root()
    started, refusals = threading.Barrier(2), []
    try:
        fleet.learner("usurper")
    except RuntimeError as error:
        refusals.append(str(error))
    with ExitStack() as stack:
        fresh = Fleet(stack, folder, f"{s3.url}-of-two")

        def start(name: str) -> bool:
            started.wait(60)
            try:
                fresh.learner(name)
            except RuntimeError as error:
                refusals.append(str(error))
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            ready = sum(pool.map(start, ("one", "other")))
    return {
        "double_publishes": int(SharedStore.open(s3.url).root() != before) + max(0, ready - 1),
        "learners_of_two_that_started": ready,
        "refusals_that_say_why": sum("one learner publishes" in text for text in refusals),
    }


def rolling(folder: Path, callers: int = 4) -> Figures:
    """Restart every predictor in turn, under load, with the retries that clients come with."""
    with running_s3() as s3, ExitStack() as stack:
        fleet = Fleet(stack, folder, s3.url)
        teach(fleet.client(fleet.learner("learner")), 0)
        names = [f"predictor-{number}" for number in range(3)]
        running = [ExitStack() for _ in names]
        for each in running:
            stack.push(each)
        servers = [
            fleet.within(each).predictor(name) for each, name in zip(running, names, strict=True)
        ]
        addresses = [server.address for server in servers]
        target = "ipv4:" + ",".join(addresses)
        asking = [fleet.ask(target, retry=RetryPolicy()) for _ in range(callers)]
        for caller in asking:
            caller.wait_for(1)
        before = sum(caller.calls for caller in asking)
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            running[number].close()  # SIGTERM, and it has to end well
            port = address.rpartition(":")[2]
            fleet.within(running[number]).predictor(name, "--port", port)
        for caller in asking:
            caller.stop()
        figures = {
            "restarts": len(names),
            "rolling_calls": sum(caller.calls for caller in asking) - before,
            "rolling_failed_calls": sum(len(caller.failures) for caller in asking),
            "rolling_failures": sorted({f for caller in asking for f in caller.failures})[:3],
        }
        return judged(figures, {"rolling_failed_calls": 0})


def cold(folder: Path, versions: int = 20) -> Figures:
    """Start a predictor with an empty cache, on a store of DeiT-tiny with many versions."""
    with running_s3() as s3, ExitStack() as stack:
        fleet = Fleet(stack, folder, s3.url)
        learner = fleet.learner("learner", backbone=deit_tiny(folder))
        teacher = fleet.client(learner)
        teach(teacher, 0)
        for number in range(1, versions):
            teacher.wait(teacher.update_class(label(0), add_aliases=f"name {number}"))
        shared = SharedStore.open(s3.url)
        wait_for(lambda: (seen := shared.root()) is not None and seen.root.current == versions)
        took = []
        for number in range(3):
            began = time.monotonic()
            predictor = fleet.predictor(f"predictor-{number}")
            found = fleet.client(predictor).predict([tiny.png("red", 7000, SIDE)])
            took.append(time.monotonic() - began)
            assert number_of(found.version) == versions, found.version
        maps = Path(f"/proc/{predictor.process.pid}/maps").read_text()
        figures = {
            "cold_versions": versions,
            "cold_start_seconds": round(statistics.median(took), 2),
            "predictor_has_torch": "torch" in maps,
            "predictor_resident_mb": round(resident_bytes(predictor.process.pid) / 1e6),
        }
        return judged(figures, {"predictor_has_torch": False})


def judged(figures: Figures, wanted: Figures) -> Figures:
    """Return figures, with those that are not as they should be under ``failed``."""
    failed = [
        f"{name} is {figures[name]}, not {figure}"
        for name, figure in wanted.items()
        if figures[name] != figure
    ]
    return {**figures, "failed": failed}


def deit_tiny(folder: Path) -> Path:
    """Write DeiT-tiny with random weights: for speed and size they serve as well as any."""
    name = "deit_tiny_patch16_224"
    module = timm.create_model(name, num_classes=0)
    config = {
        "architecture": name,
        "model_args": {},
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    path = folder / "deit_tiny.safetensors"
    save_file(module.state_dict(), path, metadata={"timm_config": json.dumps(config)})
    return path


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds that nobody tells of: it is in other processes."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError("it takes too long")
        time.sleep(0.1)


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has, without what it shares with its files."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
