"""Thousands of hostile inputs: none may crash the server, hang it, or leave anything behind.

    python -m tests.durability.inputs --inputs 10000 --out build/durability

Four kinds (``KINDS``). Images and sequences of messages go to one server process, which stays the
same throughout; manifests and folders of stores are read by the store, by the doctor and, now and
then, by a server in this process. A run that was cut off goes on where it was, with a new server.

Inputs are made by hypothesis, in chunks that each have a seed. What is counted is executed, and
different from all that were counted before: hypothesis begins every chunk with the same few.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from inflora_core import durable
from inflora_service.doctor import Severity, examine
from tests.durability import scene
from tests.durability.hostile_calls import HISTORY, IMAGE_CALL, Live
from tests.durability.hostile_stores import FOLDER, MANIFEST, Workshop
from tests.durability.scene import HangError
from tests.running_server import running_server

CHUNK = 100
"""Inputs between two looks at what they have left behind."""

SHARES = {"images": 0.35, "uploads": 0.35, "manifests": 0.15, "stores": 0.15}
"""Of all inputs. Those of the last two kinds each take ten times as long: a store is copied, read
twice, examined four times and repaired."""

KINDS = {"images": IMAGE_CALL, "uploads": HISTORY, "manifests": MANIFEST, "stores": FOLDER}


@dataclass
class State:
    """What outlives this process.

    Attributes:
        chunks: How many there were, by kind: the seed of the next one.
        seen: Digests of the inputs that were executed, by kind.
        crashes: Inputs that came to something that nobody foresaw.
        hangs: Inputs that took too long.
        leaks: What was left behind.
        growth: Bytes that a server's process took more at its end than at its beginning, at most.
        servers: How many stores of the last two kinds got one.
    """

    chunks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seen: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    growth: int = 0
    servers: int = 0

    @classmethod
    def load(cls, path: Path) -> State:
        """Return what was saved, or a new one."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        durable.replace(path, json.dumps(vars(self)).encode())

    def summary(self) -> dict[str, Any]:
        """Return what is printed in the end."""
        by_kind = {kind: len(seen) for kind, seen in self.seen.items()}
        return {
            "inputs": sum(by_kind.values()),
            "crashes": len(self.crashes),
            "hangs": len(self.hangs),
            "leaks": len(self.leaks),
            "by_kind": by_kind,
            "servers_on_hostile_stores": self.servers,
            "rss_growth_bytes": self.growth,
        }


class Run:
    """Inputs of all kinds, until there were enough of each.

    Args:
        folder: For all that this makes.
        wanted: How many inputs, by kind.
        template: The store that they begin with.
        chunk: How many are made between two looks at what they have left behind.
    """

    def __init__(
        self, folder: Path, wanted: dict[str, int], template: Path, chunk: int = CHUNK
    ) -> None:
        self.folder, self.wanted, self.template, self.chunk = folder, wanted, template, chunk
        self.path = folder / "state.json"
        self.state = State.load(self.path)

    def go(self) -> State:
        """Make all inputs; return what came of them."""
        if any(self._missing(kind) for kind in ("images", "uploads")):
            with self._live() as live:
                for kind in ("images", "uploads"):
                    self._go_through(kind, live)
                    self._note_leaks(kind, live.leaks())
        with self._workshop() as shop:
            for kind in ("manifests", "stores"):
                self._go_through(kind, shop)
        return self.state

    def _missing(self, kind: str) -> int:
        return max(0, self.wanted[kind] - len(self.state.seen[kind]))

    def _go_through(self, kind: str, subject: Any) -> None:
        while self._missing(kind):
            self._chunk(kind, subject)
            if isinstance(subject, Live):
                self._note_leaks(kind, subject.leaks())
                self.state.growth = max(
                    self.state.growth, subject.resident_bytes() - subject.memory
                )
            else:
                self.state.servers += subject.served
                subject.served = 0
            self.state.chunks[kind] += 1
            self.state.save(self.path)
            print(f"{kind}: {len(self.state.seen[kind])} of {self.wanted[kind]}", flush=True)

    def _chunk(self, kind: str, subject: Any) -> None:
        """Make a chunk of inputs, in which the first that fails is made as small as can be."""
        seen = set(self.state.seen[kind])
        failed = False

        @hypothesis.seed(self.state.chunks[kind])
        @settings(
            max_examples=self.chunk,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(KINDS[kind])
        def execute(case: Any) -> None:
            nonlocal failed
            digest = hashlib.sha256(repr(case.key()).encode()).hexdigest()[:16]
            if not failed:
                if digest in seen or not self._missing(kind):
                    return
                seen.add(digest)
                self.state.seen[kind].append(digest)
            try:
                case.make(subject)
                if isinstance(subject, Live):
                    subject.check_alive()
            except HangError as error:
                # Not to be made smaller: every try would take as long.
                self._note(self.state.hangs, kind, f"{error}: {case!r}")
            except Exception:
                failed = True
                raise

        try:
            execute()
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            self._note(self.state.crashes, kind, f"{type(error).__name__}: {error}\n{notes}")

    def _note_leaks(self, kind: str, leaks: Iterator[str]) -> None:
        for leak in leaks:
            self._note(self.state.leaks, kind, leak)

    def _note(self, where: list[str], kind: str, what: str) -> None:
        where.append(f"{kind}, chunk {self.state.chunks[kind]}: {what[:4000]}")
        print("FOUND:", where[-1], flush=True)

    @contextmanager
    def _live(self) -> Iterator[Live]:
        """A server process on a copy of the store, looked at when it has stopped."""
        home, temp = self.folder / "server", (self.folder / "temp").absolute()
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        if not (home / "store").exists():
            shutil.copytree(self.template, home / "store")
        options = (*scene.OPTIONS, "--log-level", "warning")
        with running_server(home, options, prefix=("env", f"TMPDIR={temp}")) as server:
            live = Live(server, temp)
            try:
                yield live
            finally:
                live.close()
        faults = (
            each for each in examine(home / "store").found if each.severity is not Severity.NOTE
        )
        self._note_leaks("images", (f"{each.path}: {each.problem}" for each in faults))

    @contextmanager
    def _workshop(self) -> Iterator[Workshop]:
        temp = (self.folder / "temp").absolute()
        temp.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
            tempfile.tempdir = str(temp)
            shop = Workshop(self.template, self.folder / "workshop")
            stack.callback(shop.close)
            yield shop
        self._note_leaks("stores", (f"{path} is left" for path in temp.iterdir()))


def main() -> None:
    """Read the command line, and make all inputs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what is damaged is reported again and again
    scene.give_roots_to_workers()
    folder = options.out / "inputs"
    wanted = {kind: round(options.inputs * share) for kind, share in SHARES.items()}
    state = Run(folder, wanted, scene.lead_a_life(folder)).go()
    print(json.dumps(state.summary()))
    raise SystemExit(bool(state.crashes or state.hangs or state.leaks))


if __name__ == "__main__":
    main()
