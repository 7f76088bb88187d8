"""A device that keeps up with a model: there is one that works at every moment.

Its folder has room for two. The next model is made beside the one that answers, from what is there
and a delta where that is possible, has to pass a test of itself, and only then becomes active, in
one step. What was active before stays until the one after that. Files are named after their
content, so what the disk has lost or changed is known for what it is.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Self

from inflora_edge import files
from inflora_edge.delta import MORE, Delta, apply
from inflora_edge.errors import DeltaError, EdgeError, ModelError, NoModelError, ServerError
from inflora_edge.fetching import Fetcher, Server
from inflora_edge.model import Model

log = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.onnx")
_DRAFT = re.compile(r"\.(\d+-[0-9a-f]{64}\.onnx|state\.json|incoming\.[a-z0-9.]+\.json)\.\d+")
FORMS = ("", "fp16", "int8")
"""Forms of a version's file; the first is ``model.onnx`` itself."""
_REMEMBERED = 16
"""Files whose tests are remembered, the latest."""
_TRIES = 3
"""Tests of a file that may fail: memory may have been short, or the process ended by others."""


@dataclass(frozen=True)
class Held:
    """A model in the folder.

    Attributes:
        version: Its number.
        sha256: Of its content.
    """

    version: int
    sha256: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.version}-{self.sha256}.onnx"


@dataclass(frozen=True)
class State:
    """What a device knows of its folder.

    Attributes:
        active: What answers.
        previous: What answered before.
        tried: How often the test of a file was begun and did not end well, by its SHA-256.
    """

    active: Held | None = None
    previous: Held | None = None
    tried: Mapping[str, int] = field(default_factory=dict)

    def refuses(self, sha256: str) -> bool:
        """Whether a file has failed too often."""
        return self.tried.get(sha256, 0) >= _TRIES

    @property
    def held(self) -> dict[str, Held]:
        """Both, by their hashes."""
        return {one.sha256: one for one in (self.active, self.previous) if one is not None}


class Device:
    """See the module. One process at a time uses a folder; not for several threads at once.

    Args:
        server: Whose model it follows.
        folder: Its own; made if it is not there.
        threads: That a prediction may use; 0: one for each processor.
        form: Which of a version's files: ``fp16`` or ``int8``, or ``model.onnx`` itself if empty.

    Raises:
        ValueError: there is no such form.
        EdgeError: another process uses the folder.
        OSError: it cannot be used.
    """

    def __init__(self, server: Server, folder: Path, threads: int = 0, form: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._threads = folder, threads
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; there are {', '.join(map(repr, FORMS))}")
        self._delta, self._whole = _artifacts(form)
        self._lock = _locked(folder / "lock")
        self._fetcher = Fetcher(server, folder)
        for other in FORMS:
            if other != form:
                for artifact in _artifacts(other):  # what came of it is of no use any more
                    self._fetcher.discard(artifact)
        self._state = _read(folder)
        # Who only reads the folder must find what really is there.
        self._write(self._sound(self._state))
        self._model: Model | None = None
        self._fruitless: set[str] = set()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """As ``close``."""
        self.close()

    @staticmethod
    def active_file(folder: Path) -> Path:
        """Return the file that answers, for who only reads; whoever follows replaces it.

        Raises:
            NoModelError: there is none yet.
        """
        active = _read(folder).active
        if active is None:
            raise NoModelError(f"no model was fetched to {folder} yet")
        return folder / active.name

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    @property
    def model(self) -> Model:
        """The model that answers.

        Raises:
            NoModelError: there is none yet.
        """
        if self._model is None:
            if self._state.active is None:
                raise NoModelError(f"no model was fetched to {self._folder} yet")
            self._model = Model(self._folder / self._state.active.name, self._threads)
        return self._model

    @property
    def has_model(self) -> bool:
        """Whether there is a model that answers."""
        return self._model is not None or self._state.active is not None

    def update(self) -> bool:
        """Come to the server's current version, if this is not it.

        Returns:
            Whether another model is active now.

        Raises:
            ServerError: the server cannot be reached, or refuses.
            ModelError: the new version failed its test. What was active is, and after some more
                attempts that version is not tried again.
            OSError: the disk does not take it.
        """
        before = self._state.active
        for _ in range(2):  # what was damaged on its way is asked for once more
            if not self._state.held:
                break
            try:
                return self._by_delta() or self._state.active != before
            except DeltaError as error:
                # Damaged on its way, or what it leads from was damaged on the disk.
                log.warning("a delta is of no use: %s", error)
                self._fetcher.discard(self._delta)
                self._look_again()
            except ServerError as error:
                if error.code not in ("NOT_FOUND", "INVALID_ARGUMENT", "DATA_LOSS"):
                    raise
                log.info("there is no delta: %s", error)
                if error.code != "DATA_LOSS":
                    break
        return self._by_whole_file() or self._state.active != before

    def follow(
        self,
        poll_seconds: float = 60.0,
        on_update: Callable[[Model], None] = lambda model: None,
        stop: threading.Event | None = None,
    ) -> None:
        """Update again and again until told to stop, whatever happens to line and server.

        Args:
            poll_seconds: Between two looks, half as much to one and a half times.
            on_update: Called with each new model.
            stop: Ends it when set; never, if None.
        """
        stop = stop or threading.Event()
        while not stop.is_set():
            try:
                if self.update():
                    on_update(self.model)
            except (EdgeError, OSError) as error:
                log.warning("no update: %s", error)
            except Exception:  # a device that nobody sees must not stop to follow
                log.exception("no update")
            # Devices that were started together must not ask together.
            stop.wait(poll_seconds * random.uniform(0.5, 1.5))

    def _by_delta(self) -> bool:
        held = self._state.held
        fetched = self._fetcher.fetch(
            self._delta, sorted(held), lambda delta, _: delta.sha256 not in self._fruitless
        )
        if fetched is None:
            return False
        path, artifact, version = fetched
        content = path.read_bytes()
        delta = Delta.read(content, max(_size(self._folder / x.name) for x in held.values()) + MORE)
        new, base = Held(version, delta.target.sha256), held.get(delta.base.sha256)
        if not self._is_wanted(new):
            if self._state.refuses(new.sha256):
                self._fruitless.add(artifact.sha256)  # need not be fetched again
            self._fetcher.discard(self._delta)
            return False
        if base is None:
            raise DeltaError("the delta leads from a file that was not held")
        if new.sha256 not in held:
            apply(self._folder / base.name, content, self._folder / new.name)
        self._activate(new)
        return True

    def _by_whole_file(self) -> bool:
        fetched = self._fetcher.fetch(
            self._whole, wanted=lambda whole, version: self._is_wanted(Held(version, whole.sha256))
        )
        if fetched is None:
            self._fetcher.discard(self._whole)
            return False
        path, artifact, version = fetched
        new = Held(version, artifact.sha256)
        os.replace(path, self._folder / new.name)
        files.sync_folder(self._folder)
        self._activate(new)
        return True

    def _is_wanted(self, new: Held) -> bool:
        """Whether a version is neither active nor one that failed too often."""
        if self._state.refuses(new.sha256):
            log.warning("version %d failed its test before, and is not tried again", new.version)
            return False
        return self._state.active is None or new.sha256 != self._state.active.sha256

    def _activate(self, new: Held) -> None:
        """Have a file answer that is in its place, once it has passed its test."""
        path = self._folder / new.name
        if files.sha256_of(path) != new.sha256:
            raise DeltaError(f"{path} was damaged on the disk")
        tries = {**self._state.tried, new.sha256: self._state.tried.get(new.sha256, 0) + 1}
        # Before: a test that ends the process has failed, too.
        self._write(replace(self._state, tried=dict(list(tries.items())[-_REMEMBERED:])))
        try:
            model = _tested(path, self._threads)
            if model.version != new.version:
                raise ModelError(f"{path} says that it is version {model.version}")
        except ModelError:
            if new not in (self._state.active, self._state.previous):
                path.unlink(missing_ok=True)
            raise
        finally:
            for artifact in (self._delta, self._whole):
                self._fetcher.discard(artifact)
        tries.pop(new.sha256)
        self._write(State(new, self._state.active, tries))
        self._model = model
        kept = {one.name for one in self._state.held.values()}
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name) and path.name not in kept:
                path.unlink()

    def _look_again(self) -> None:
        """See what the disk has of the models by now."""
        before = self._state.active
        self._write(self._sound(self._state))
        if self._state.active not in (before, None):
            self._model = None  # what answers is what is active

    # -- what is written down -----------------------------------------------------------------

    def _write(self, state: State) -> None:
        if state != self._state or state != _read(self._folder):
            files.replace(self._folder / "state.json", json.dumps(asdict(state)).encode())
            self._state = state

    def _sound(self, state: State) -> State:
        """Return what is there and sound of a state; remove what is not.

        Where the state is lost, or the disk has damaged what was active, any other model will do
        that is what its name says, and passes its test: the newest.
        """
        found = []
        for path in self._folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is None and not _DRAFT.fullmatch(path.name):
                continue  # not ours
            if name and files.sha256_of(path) == name[2]:
                held = Held(int(name[1]), name[2])
                if held in (state.active, state.previous) or self._passes(path, held, state):
                    found.append(held)
                    continue
            log.warning("%s is damaged, or was never finished: removed", path)
            path.unlink(missing_ok=True)
        found.sort(key=lambda one: (one != state.active, one != state.previous, -one.version))
        active, previous, *_ = [*found, None, None]
        return State(active, previous, state.tried)

    def _passes(self, path: Path, held: Held, state: State) -> bool:
        if state.tried.get(held.sha256):
            return False  # perhaps it was its test that ended the process
        try:
            return _tested(path, self._threads).version == held.version
        except ModelError as error:
            log.warning("%s", error)
            return False


def _artifacts(form: str) -> tuple[str, str]:
    """Return what a form's delta and whole file are called."""
    stem = f"model.{form}" if form else "model"
    return f"{stem}.delta", f"{stem}.onnx"


def _tested(path: Path, threads: int) -> Model:
    """Return a model that answers.

    Raises:
        ModelError: it does not.
    """
    model = Model(path, threads)
    model.check()
    return model


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(folder: Path) -> State:
    """Return what was written down, as far as it is there and sound."""
    try:
        said = json.loads((folder / "state.json").read_bytes())
        active, previous = (
            None if one is None else Held(**one) for one in (said["active"], said["previous"])
        )
        tried = {str(sha256): int(count) for sha256, count in said["tried"].items()}
        return State(active, previous, tried)
    except FileNotFoundError:
        return State()
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged, and made again: %s", folder / "state.json", error)
        return State()


def _locked(path: Path) -> TextIOWrapper:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise EdgeError(f"another process uses {path.parent}") from error
    return file
