"""A disk that is full at every durable step, one after the other, of a server that goes on.

    python -m tests.durability.faults --out build/durability

At each failpoint a server gets ``ENOSPC`` a few times, as from a disk that is full and then is not,
while the steps of ``kills.PLAN`` are taken and predictions made. These must hold:

* No prediction fails.
* What is refused, or fails, does so with RESOURCE_EXHAUSTED, and the next attempt succeeds, without
  a restart. A server that cannot even start says so, and does once there is room.
* Afterwards the doctor finds nothing, and the final state is that of an undisturbed run.

That a disk is full in earnest, on a small tmpfs, is in ``tests/e2e/test_shortages.py``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from inflora_client import Client
from inflora_client.errors import ResourceExhaustedError, StatusError, TaskFailedError
from inflora_core import audit, durable
from inflora_core.failpoints import POINTS, VARIABLE
from inflora_core.store import Store
from inflora_service.doctor import Severity, examine
from tests.core import tiny
from tests.durability.kills import (
    BEFORE,
    IMAGES,
    OPTIONS,
    PAUSE,
    PLAN,
    differences,
    still_moves,
    take,
    uninterrupted,
)
from tests.running_server import RunningServer, running_server

TIMES = 2
"""How often a step finds the disk full."""
ATTEMPTS = 12
"""Of a step, before it counts as one that does not recover."""

NOT_HERE = {
    **dict.fromkeys(BEFORE, "of an upload that broke off"),
    "audit.torn": "of a log that a power cut tore",
}
"""Failpoints that are not reached without a kill, and when they are."""


@dataclass
class State:
    """What outlives this process.

    Attributes:
        points: Failpoints to come.
        reached: Failpoints at which the disk was full.
        versions: What was current after each step.
        refused: Attempts that were refused, or failed.
        answers: Predictions.
        violations: What must not have happened.
    """

    points: list[str] = field(default_factory=lambda: sorted(POINTS - NOT_HERE.keys()))
    reached: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    refused: int = 0
    answers: int = 0
    violations: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> State:
        """Return what was saved, or a new one."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


class Predictions:
    """Predictions, one after the other; none may fail."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._predict, args=(address,))

    def __enter__(self) -> Predictions:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _predict(self, address: str) -> None:
        with Client(address) as client:
            while not self._over.wait(PAUSE):
                try:
                    client.predict([IMAGES[self.answers % len(IMAGES)]])
                    self.answers += 1
                except StatusError as error:
                    self.failures.append(str(error))


class Run:
    """Servers whose disk is full now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "state.json"
        self.state = State.load(self.path)

    def go(self) -> None:
        """Try all failpoints."""
        if not self.state.versions:
            with running_server(self.folder / "server", OPTIONS) as server:
                self.step(server)  # there is something to predict with
        while self.state.points:
            point = self.state.points[0]
            self.try_point(point)
            self.state.points.pop(0)
            durable.replace(self.path, json.dumps(vars(self.state)).encode())
            print(f"{point}: {len(self.state.versions)} steps", flush=True)

    def try_point(self, point: str) -> None:
        """Take a whole round of steps with a disk that is full at a failpoint."""
        with (
            self.started(point) as server,
            Predictions(server.address) as predictions,
        ):
            for _ in PLAN:
                self.step(server)
        self.state.answers += predictions.answers
        self.state.violations += [f"{point}: {failure}" for failure in predictions.failures]
        if f"(failpoint {point})" in server.log.read_text():
            self.state.reached.append(point)
        else:
            self.state.violations.append(f"failpoint {point} was never reached")
        for fault in still_moves(audit.verify(server.store)):
            self.state.violations.append(f"{point}: {fault}")
        for finding in examine(server.store).found:
            if finding.severity is not Severity.NOTE:
                self.state.violations.append(f"{point}: {finding.path}: {finding.problem}")

    @contextmanager
    def started(self, point: str) -> Iterator[RunningServer]:
        """Start a server; one that finds the disk full as it starts, once there is room."""
        # Examples leave the spool in one of two ways.
        keep = "never" if point.startswith("spool.delete") else "always"
        options = (*OPTIONS, "--keep-examples", keep)
        for first in (1, 2, 4, 8):
            prefix = ("env", f"{VARIABLE}={point}=ENOSPC@{first}*{TIMES}")
            folder = self.folder / "server"
            (folder / "server.log").unlink(missing_ok=True)
            try:
                with running_server(folder, options, prefix=prefix) as server:
                    yield server
                return
            except RuntimeError as error:
                last = str(error).splitlines()[-1]
                if "error:" not in last or f"(failpoint {point})" not in last:
                    raise
        raise RuntimeError(f"no server starts where the disk is full at {point}")

    def step(self, server: RunningServer) -> None:
        """Take the next step, again and again where it is refused or fails for want of room."""
        number = len(self.state.versions)
        with Client(server.address) as client:
            for attempt in range(ATTEMPTS):
                try:
                    found = take(client, number, self.state.versions, f"request-{number}-{attempt}")
                except ResourceExhaustedError:
                    self.state.refused += 1
                except TaskFailedError as error:
                    if error.task.error is None or error.task.error.code != "RESOURCE_EXHAUSTED":
                        raise
                    self.state.refused += 1
                else:
                    self.state.versions.append(found[1])
                    return
        raise RuntimeError(f"step {number} does not recover")


def run(out: Path) -> dict[str, int]:
    """Try all failpoints, and return the figures.

    Args:
        out: Folder; a run that was cut off goes on from what is there.
    """
    folder = out / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference" / "store").exists():
        with running_server(folder / "server", ["--backbone", str(tiny.write_backbone(folder))]):
            pass
        shutil.copytree(folder / "server" / "store", folder / "reference" / "store")
    trying = Run(folder)
    trying.go()
    state = trying.state
    reference = uninterrupted(folder / "reference", len(state.versions))
    store = Store.open(folder / "server" / "store")
    violations = [*state.violations, *differences(store, reference)]
    for violation in violations:
        print("VIOLATION:", violation)
    return {
        "faults": len(state.reached),
        "fault_violations": len(violations),
        "refused": state.refused,
        "steps_taken": len(state.versions),
        "answers": state.answers,
    }


def main() -> None:
    """Read the command line, and try."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    figures = run(parser.parse_args().out)
    print(json.dumps(figures))
    raise SystemExit(bool(figures["fault_violations"]))


if __name__ == "__main__":
    main()
