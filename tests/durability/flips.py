"""One byte of a store flipped: a server must notice before it answers with it or hands it out.

    python -m tests.durability.flips --flips 500 --out build/durability

Each flip is one random byte of one file of a version, every kind of file in its turn. The doctor
must name it; no answer of a server, no download and no state to learn on may differ from what the
sound store gives: it is refused, or rebuilt to the same bytes, or another version says loudly that
it answers instead. Half of the flips come before the server starts, half while it serves. For every
five of them there is one in a file that all versions share. A run that was cut off goes on.

A flip that changes nothing that anybody reads (one blank for another) is harmless, and shown to be:
what is read is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_core import durable
from inflora_core.errors import InfloraError
from inflora_core.model import ContinualModel, VersionState
from inflora_core.store import ONNX_FILE, Store
from inflora_service.doctor import Severity, examine
from inflora_service.server import CURRENT as CURRENT_HEALTH
from tests.durability import scene
from tests.durability.scene import DEADLINE, IMAGE, OPTIONS, VERSIONS, HangError, in_time, serving
from tests.running_server import running_server
from tests.service.conftest import Running

MANIFEST, SUM = "manifest.json", "manifest.sha256"
FILES = ("factors.safetensors", "head.safetensors", "memory.safetensors", ONNX_FILE, MANIFEST, SUM)
"""Of a version; each is hit in its turn."""

SHARED = (
    "weights.safetensors",
    "template.onnx",
    "backbone manifest.json",
    "backbone manifest.sha256",
)
SHARED += ("backbone", "CURRENT", "forgotten.json")

PROCESS_EVERY = 50
"""Every so many flips are looked at by a server process."""

REFUSALS = {"DATA_LOSS", "FAILED_PRECONDITION", "NOT_FOUND"}


@dataclass(frozen=True)
class Flip:
    """A changed byte.

    Attributes:
        kind: Of the file, one of ``FILES`` or ``SHARED``.
        path: Of the file, relative to the store.
        at: Position of the byte.
        mask: Which bits are changed.
        warm: Whether a server has everything loaded when it happens.
    """

    kind: str
    path: str
    at: int
    mask: int
    warm: bool

    def do(self, root: Path) -> None:
        data = bytearray((root / self.path).read_bytes())
        data[self.at] ^= self.mask
        (root / self.path).write_bytes(data)


@dataclass
class Count:
    """What came of the flips in a kind of file.

    Attributes:
        flips: How many there were.
        missed: How many were not noticed in time.
        harmless: How many changed nothing that is read.
    """

    flips: int = 0
    missed: int = 0
    harmless: int = 0


@dataclass
class State:
    """What outlives this process.

    Attributes:
        done: Flips of versions' files, then of shared ones.
        counts: By kind of file.
        missed: Flips that were not noticed, and what happened.
    """

    done: list[int] = field(default_factory=lambda: [0, 0])
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> State:
        """Return what was saved, or a new one."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        durable.replace(path, json.dumps(vars(self)).encode())

    def summary(self) -> dict[str, Any]:
        """Return what is printed in the end."""
        by_file = {kind: self.counts[kind] for kind in FILES if kind in self.counts}
        return {
            "flips": self.done[0],
            "flips_missed": sum(count["missed"] for count in by_file.values()),
            "by_file": by_file,
            "shared": {kind: self.counts[kind] for kind in SHARED if kind in self.counts},
        }


class Sound:
    """What a store gives before anything happened to it.

    Args:
        root: Its folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store.existing(root)
        self.current = self.store.current()
        self.names: dict[str, list[str]] = {kind: [] for kind in (*FILES, *SHARED)}
        for number in self.store.numbers():
            version, folder = self.store.version(number), f"{VERSIONS}/{number:08d}"
            for name in (MANIFEST, SUM, *(entry.name for entry in version.files)):
                # A version that lost a class answers from what is made in memory.
                needed = name != ONNX_FILE or version.state is VersionState.WHOLE
                if needed and (root / folder / name).exists():
                    self.names[name].append(f"{folder}/{name}")
        backbone = f"backbones/{self.store.backbone().sha256}"
        for kind in SHARED[:4]:
            self.names[kind].append(f"{backbone}/{kind.removeprefix('backbone ')}")
        for kind in SHARED[4:]:
            self.names[kind].append(f"models/default/{kind}")

    def flip(self, kinds: tuple[str, ...], number: int) -> Flip:
        """Return flip ``number`` of files of these kinds; always the same one."""
        dice = random.Random(f"{kinds[0]} {number}")
        kind = kinds[number % len(kinds)]
        path = dice.choice(self.names[kind])
        size = (self.root / path).stat().st_size
        warm = bool(number // len(kinds) % 2)
        return Flip(kind, path, dice.randrange(size), dice.randint(1, 255), warm)

    @cached_property
    def models(self) -> dict[int, str]:
        return dict(models(self.store))


def models(store: Store) -> Iterator[tuple[int, str]]:
    """Yield a hash of the state that could be learned on, of each version that has one."""
    for number in store.numbers():
        try:
            yield number, fingerprint(store.load_model(number))
        except InfloraError:
            continue


def fingerprint(model: ContinualModel) -> str:
    """Return a hash of all arrays and names of a model."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        elif isinstance(value, dict):
            for part in value.values():
                add(part)
        elif hasattr(value, "__dataclass_fields__"):
            for part in vars(value).values():
                add(part)
        elif isinstance(value, tuple):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(model)
    return digest.hexdigest()


# -- what a server gives ------------------------------------------------------------------------


@dataclass
class Given:
    """What a server gave: answers and files by what was asked for.

    Attributes:
        answers: Of versions, by number; None the one that answers who names none.
        files: By version and name.
        loud: Whether health says that the current version does not answer.
    """

    answers: dict[int | None, predictor_pb.PredictResponse] = field(default_factory=dict)
    files: dict[tuple[int, str], bytes] = field(default_factory=dict)
    loud: bool = False


async def ask(running: Running, numbers: list[int]) -> Given:
    """Ask for all answers and all files."""
    given = Given(loud=await running.serving(CURRENT_HEALTH) != "SERVING")
    for number in (None, *numbers):
        name = f"models/default/versions/{number}" if number else ""
        request = predictor_pb.PredictRequest(images=[IMAGE], top_k=100, version=name)
        answer = await unless_refused(running.predictor.Predict(request))
        if answer is not None:
            given.answers[number] = answer
    for number in numbers:
        for file in FILES:
            name = f"models/default/versions/{number}"
            wanted = model_pb.DownloadArtifactRequest(name=name, artifact=file)
            data = await unless_refused(_joined(running.model.DownloadArtifact(wanted)))
            if data is not None:
                given.files[number, file] = data
    return given


async def _joined(stream: Any) -> bytes:
    return b"".join([message.data async for message in stream])


async def unless_refused(call: Any) -> Any:
    try:
        async with asyncio.timeout(DEADLINE):
            return await call
    except grpc.aio.AioRpcError as error:
        if error.code().name not in REFUSALS:
            raise
        return None
    except TimeoutError as error:  # which is an OSError, too
        raise HangError("a call has not ended") from error


class Run:
    """Flips, one after the other, each in a copy of the store.

    Args:
        folder: For all that this makes.
        template: The sound store.
        processes: Whether some are looked at by a server process.
    """

    def __init__(self, folder: Path, template: Path, *, processes: bool = True) -> None:
        self.folder, self.processes = folder, processes
        self.path = folder / "state.json"
        self.state = State.load(self.path)
        self.sound = Sound(template)
        self.home = folder / "flipped"

    def go(self, flips: int) -> State:
        """Flip so many bytes of versions' files, and some of the shared ones."""
        with asyncio.Runner() as runner:
            expected = runner.run(self._expected())
            for part, (kinds, wanted) in enumerate(((FILES, flips), (SHARED, flips // 5))):
                for number in range(self.state.done[part], wanted):
                    flip = self.sound.flip(kinds, number)
                    self._note(flip, list(self._try(runner, flip, number, expected)))
                    self.state.done[part] = number + 1
                    self.state.save(self.path)
        shutil.rmtree(self.home, ignore_errors=True)
        return self.state

    async def _expected(self) -> Given:
        async with serving(self._copy(), self.folder) as running:
            return await ask(running, self.sound.store.numbers())

    def _copy(self) -> Path:
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        return shutil.copytree(self.sound.root, self.home / "store")

    def _note(self, flip: Flip, faults: list[str]) -> None:
        count = Count(**self.state.counts.get(flip.kind, {}))
        count.flips += 1
        harmless = faults == [HARMLESS]
        count.harmless += harmless
        if faults and not harmless:
            count.missed += 1
            self.state.missed.append(f"{flip}: {'; '.join(faults)}")
            print("MISSED:", self.state.missed[-1], flush=True)
        self.state.counts[flip.kind] = asdict(count)

    def _try(
        self, runner: asyncio.Runner, flip: Flip, number: int, expected: Given
    ) -> Iterator[str]:
        """Yield what went wrong; ``HARMLESS`` alone if nothing can."""
        root = self._copy()
        flip.do(root)
        noticed = self._is_noticed(root, flip)
        if not noticed and self._is_harmless(root, flip):
            yield HARMLESS
        elif not noticed:
            yield "the doctor does not notice"
        store = Store.existing(root)
        for version, model in models(store):
            if model != self.sound.models.get(version):
                yield f"another state of version {version} would be learned on"
        by_process = self.processes and number % PROCESS_EVERY == PROCESS_EVERY - 1
        with in_time():
            yield from runner.run(self._serve(root, flip, expected, by_process))

    def _is_noticed(self, root: Path, flip: Flip) -> bool:
        return any(
            finding.severity is not Severity.NOTE
            and (flip.path in finding.path or flip.path in finding.problem)
            for finding in examine(root, read_only=True).found
        ) or any(
            # What names the backbone is named where it leads.
            flip.kind == "backbone" and finding.severity is Severity.DAMAGE
            for finding in examine(root, read_only=True).found
        )

    def _is_harmless(self, root: Path, flip: Flip) -> bool:
        """Whether what is read from the file is what was read before."""
        store = Store.existing(root)
        readings = {
            "CURRENT": lambda each: each.current(),
            "forgotten.json": lambda each: each.forgotten(),
            "backbone": lambda each: each.backbone().sha256,
        }
        read = readings.get(flip.kind)
        return read is not None and read(store) == read(self.sound.store)

    async def _serve(self, root: Path, flip: Flip, expected: Given, by_process: bool) -> list[str]:
        numbers = self.sound.store.numbers()
        if flip.warm:
            flip.do(root)  # once more: as it was
        try:
            async with self._server(root, by_process) as running:
                if flip.warm:
                    await ask(running, numbers)
                    flip.do(root)
                given = await ask(running, numbers)
        except (InfloraError, OSError, RuntimeError) as error:
            # It does not start, and says why. Of a process, ``running_server`` says so.
            if isinstance(error, RuntimeError) and "did not start" not in str(error):
                raise
            return ["a server did not come up"] if flip.warm else []
        return list(self._differences(given, expected))

    @asynccontextmanager
    async def _server(self, root: Path, by_process: bool) -> AsyncIterator[Running]:
        async with AsyncExitStack() as stack:
            if not by_process:
                yield await stack.enter_async_context(serving(root, self.folder))
                return
            server = stack.enter_context(running_server(self.home, OPTIONS))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            yield Running(server, channel, None)

    def _differences(self, given: Given, expected: Given) -> Iterator[str]:
        for number, answer in given.answers.items():
            by = int(answer.version.rpartition("/")[2])
            if answer != expected.answers.get(by):
                yield f"version {by} answers otherwise"
            if number is None and by != self.sound.current and not given.loud:
                yield f"version {by} answers as if it were current"
        for (number, name), data in given.files.items():
            if data != expected.files.get((number, name)):
                yield f"{name} of version {number} is handed out damaged"


HARMLESS = "harmless"


def main() -> None:
    """Read the command line, flip, and look."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    scene.give_roots_to_workers()
    folder = options.out / "flips"
    state = Run(folder, scene.lead_a_life(folder)).go(options.flips)
    print(json.dumps(state.summary()))
    raise SystemExit(bool(state.missed))


if __name__ == "__main__":
    main()
