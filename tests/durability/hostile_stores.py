"""Stores that no server wrote: manifests that say something else, folders with things moved.

Everything is done to a copy, by way of the store, of the doctor and of a server on it. What must
not happen: an error that nobody foresaw, a look at files outside the store, no end.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from hypothesis import strategies as st

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_core.errors import InfloraError
from inflora_core.store import Store
from inflora_service.doctor import examine
from tests.durability.scene import DEADLINE, IMAGE, VERSIONS, HangError, in_time, serving
from tests.service.conftest import ROOT, Running

SERVED_EVERY = 25
"""Every so many stores get a server."""

ANSWERS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "DATA_LOSS",
    "OUT_OF_RANGE",
}
ANSWERS |= {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
"""What a server may say on a store that is not as it should be."""


class Workshop:
    """Copies of one store, to be spoilt and looked at.

    Args:
        template: The store.
        folder: For the copies.
    """

    def __init__(self, template: Path, folder: Path) -> None:
        self.template = template
        self.folder = folder.absolute()
        self.store = self.folder / "copy" / "store"
        self.watch = Watch(self.store)
        self.served = 0
        self._runner = asyncio.Runner()
        self._looked = 0

    def close(self) -> None:
        self._runner.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def copy(self) -> Path:
        """Return the folder of a new copy, beside a file that nobody may read."""
        shutil.rmtree(self.store.parent, ignore_errors=True)
        self.store.parent.mkdir(parents=True)
        (self.store.parent / "secret").write_bytes(b"not of the store")
        shutil.copytree(self.template, self.store, symlinks=True)
        return self.store

    def look(self) -> None:
        """Look at the copy in every way, and then have it repaired."""
        root = self.store
        with in_time(), self.watch.watching():
            read_all(root)
            for how in ({"read_only": True}, {}, {"repair": True}, {}):
                diagnose(root, **how)
            read_all(root)
        assert (root.parent / "secret").exists(), "a file outside the store is gone"

    def maybe_serve(self) -> None:
        """Start a server on the copy, every so often."""
        self._looked += 1
        if self._looked % SERVED_EVERY == 0:
            with in_time(2 * DEADLINE):
                self._runner.run(self._serve())
            self.served += 1

    async def _serve(self) -> None:
        try:
            async with serving(self.store, self.folder) as running:
                await look_at(running)
        except (InfloraError, OSError):
            pass  # one line that says why, and exit status 1


def read_all(root: Path) -> None:
    """Read all that a store has, in all ways."""
    with as_foreseen():
        store = Store.existing(root)
        attempt(store.backbone)
        attempt(store.forgotten)
        attempt(store.current)
        attempt(lambda: list(store.manifests()))
        attempt(lambda: store.version_of_task("nobody"))
        attempt(lambda: store.names_of({"x.0"}))
        for number in [*store.numbers(), 10**9]:
            attempt(lambda number=number: store.verify(number))
            attempt(lambda number=number: store.make_onnx(number))  # which loads the model
            attempt(lambda number=number: store.ancestors(number))
            attempt(lambda number=number: files_of(store, number))


def files_of(store: Store, number: int) -> None:
    version = store.version(number)
    for entry in store.artifacts(version):
        attempt(lambda entry=entry: store.path(number, entry.name).read_bytes())


def attempt(work: Callable[[], object]) -> None:
    with as_foreseen():
        work()


def diagnose(root: Path, **how: bool) -> None:
    with as_foreseen():
        examine(root, **how)


@contextmanager
def as_foreseen() -> Iterator[None]:
    """Let those errors pass that reading a store may come to."""
    with contextlib.suppress(InfloraError, OSError):
        yield


async def look_at(running: Running) -> None:
    """Ask a server for all that there is; it may refuse, but not fail."""
    assert await running.serving("") == "SERVING"
    version, task = "models/default/versions", "models/default/tasks/unknown"
    tasks = await said(running.learner.ListTasks(learner_pb.ListTasksRequest()))
    for name in [task, *(each.name for each in tasks.tasks)] if tasks else [task]:
        await said(running.learner.GetTask(learner_pb.GetTaskRequest(name=name)))
    await said(running.model.ListVersions(model_pb.ListVersionsRequest()))
    for number in ("current", *range(1, 8)):
        name = f"{version}/{number}"
        await said(running.model.GetVersion(model_pb.GetVersionRequest(name=name)))
        request = predictor_pb.PredictRequest(images=[IMAGE], version=name)
        await said(running.predictor.Predict(request))
        for artifact in ("", "head.safetensors", "manifest.json"):
            wanted = model_pb.DownloadArtifactRequest(name=name, artifact=artifact)
            await said(_all_of(running.model.DownloadArtifact(wanted)))
    await said(running.health.Check(health_pb2.HealthCheckRequest(service="")))


async def _all_of(stream: Any) -> list[Any]:
    return [message async for message in stream]


async def said(call: Any) -> Any:
    """Return an answer, None if the call was refused as it may be."""
    try:
        async with asyncio.timeout(DEADLINE):
            return await call
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        if code not in ANSWERS:
            raise
        return None
    except TimeoutError as error:  # which is an OSError, too
        raise HangError("a call has not ended") from error


# -- who looks where ----------------------------------------------------------------------------

_EVENTS = {
    "open": 0,
    "os.listdir": 0,
    "os.scandir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.mkdir": 0,
}
_EVENTS |= {"os.rename": 1, "shutil.rmtree": 0, "os.truncate": 0, "sqlite3.connect": 0}
"""Audit events of Python, and which of their arguments is a path."""


class Watch:
    """Notes which files are touched that are not the store's, while it watches.

    Python's audit hooks cannot be taken back, so there is one for all.
    """

    _watching: Watch | None = None
    _hooked = False

    def __init__(self, root: Path) -> None:
        paths = {sysconfig.get_path("stdlib"), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
        self._root = str(root)
        # Where modules, and copies that the doctor makes, are.
        self._allowed = tuple({self._root, "/dev", "/proc", *paths, *_sources()})
        self.outside: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and see that nothing outside was touched."""
        if not Watch._hooked:
            Watch._hooked = True
            sys.addaudithook(Watch._on_event)
        Watch._watching, self.outside = self, []
        try:
            yield
        finally:
            Watch._watching = None
        assert not self.outside, f"touched outside the store: {self.outside}"

    @staticmethod
    def _on_event(event: str, arguments: tuple[object, ...]) -> None:
        watch = Watch._watching
        if watch is not None and event in _EVENTS and len(arguments) > _EVENTS[event]:
            path = arguments[_EVENTS[event]]
            if isinstance(path, str | bytes | os.PathLike):
                watch._note(event, os.fsdecode(path))

    def _note(self, event: str, path: str) -> None:
        if not os.path.isabs(path):
            return  # of what is in a folder that was opened before
        # By name, not by where links lead: a link in a store is its operator's doing.
        full = os.path.normpath(path)
        inside = full.startswith(self._root)
        if not inside and (self._is_beside(full) or not full.startswith(self._allowed)):
            self.outside.append(f"{event} {full}")

    def _is_beside(self, path: str) -> bool:
        return path.startswith(os.path.dirname(self._root))


def _sources() -> Iterator[str]:
    for part in ("inflora_core", "proto", "service", "clients", "tests", ".venv"):
        yield str(ROOT / part)


# -- manifests ----------------------------------------------------------------------------------

ODD_NAMES = (
    "../../../../secret",
    "../../../secret",
    "/etc/passwd",
    "a\0b",
    "",
    ".",
    "..",
    "x" * 300,
)
ODD_NAMES += (
    "manifest.json",
    "model.onnx",
    "head.safetensors",
    "memory.safetensors",
    "../00000001/model.onnx",
)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    6,
    -1,
    2**31,
    2**53,
    2**63,
    2**64,
    10**40,
    0.5,
    1e308,
)
ODD += (math.inf, math.nan, "", "x" * 5000, "\u202e", [], {}, [[]], [None], {"x": {}}, *ODD_NAMES)
RAW = (
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"number": ' * 5000,
)
RAW += (b"9" * 5000, b'"\\ud800"', b"{}" * 10, b"\0" * 1000)


@dataclass(frozen=True)
class Mutation:
    """A change of a JSON document.

    Attributes:
        what: ``set``, ``delete``, ``repeat``, or the field of a manifest that is set.
        at: Which of the document's values, counted in some order, modulo their number.
        value: What is put there.
    """

    what: str
    at: int
    value: Any = None

    def apply(self, document: Any) -> None:
        value = copy.deepcopy(self.value)  # or it would hold itself, put in twice
        if self.what in ("set", "delete", "repeat"):
            places = list(_places(document))
            if not places:
                return
            holder, key = places[self.at % len(places)]
            if self.what == "set":
                holder[key] = value
            elif self.what == "delete":
                del holder[key]
            elif isinstance(holder, list):
                holder.insert(key, holder[key])
            return
        target, _, field = self.what.rpartition(".")
        if target == "":
            document[field] = value
        elif document.get(target):
            rows = document[target]
            if isinstance(rows, list) and isinstance(rows[self.at % len(rows)], dict):
                rows[self.at % len(rows)][field] = value


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key or index) of every value in a document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


@dataclass(frozen=True)
class Manifest:
    """A manifest that says something else, with a checksum that is right.

    Attributes:
        of: Number of the version; 0 is the backbone.
        mutations: What is changed.
        raw: What it is in place of JSON, None to let it be JSON.
    """

    of: int
    mutations: tuple[Mutation, ...]
    raw: bytes | None = None

    def key(self) -> list[object]:
        return [repr(self)]

    def make(self, shop: Workshop) -> None:
        root = shop.copy()
        folder = root / VERSIONS / f"{self.of:08d}"
        if self.of == 0:
            (folder,) = (root / "backbones").iterdir()
        content = self.raw if self.raw is not None else self._content(folder)
        (folder / "manifest.json").write_bytes(content)
        checksum = hashlib.sha256(content).hexdigest()
        (folder / "manifest.sha256").write_text(f"{checksum}  manifest.json\n")
        shop.maybe_serve()
        shop.look()

    def _content(self, folder: Path) -> bytes:
        document = json.loads((folder / "manifest.json").read_bytes())
        for mutation in self.mutations:
            with contextlib.suppress(TypeError, AttributeError):  # an earlier one changed the form
                mutation.apply(document)
        return json.dumps(document).encode()


AT = st.integers(0, 999)
NUMBERS = st.one_of(st.integers(-1, 8), st.sampled_from([None, 10**9, 2**70, "1", 1.5]))
MUTATION = st.one_of(
    st.builds(Mutation, st.just("set"), AT, st.sampled_from(ODD)),
    st.builds(Mutation, st.just("set"), AT, st.sampled_from(ODD)),
    st.builds(Mutation, st.sampled_from(["delete", "repeat"]), AT),
    st.builds(Mutation, st.sampled_from([".parent", ".number"]), AT, NUMBERS),
    st.builds(Mutation, st.sampled_from([".backbone", ".task"]), AT, st.sampled_from(ODD_NAMES)),
    st.builds(
        Mutation,
        st.just(".forgets"),
        AT,
        st.lists(st.sampled_from([*ODD_NAMES, "x.0", "../spool"]), max_size=2),
    ),
    st.builds(Mutation, st.just("files.name"), AT, st.sampled_from(ODD_NAMES)),
    st.builds(Mutation, st.sampled_from(["files.size", "files.sha256"]), AT, st.sampled_from(ODD)),
    st.builds(
        Mutation,
        st.sampled_from(["classes.key", "classes.label", "classes.task", "classes.aliases"]),
        AT,
        st.sampled_from(ODD),
    ),
)
MANIFEST = st.builds(
    Manifest,
    st.integers(0, 6),
    st.lists(MUTATION, min_size=1, max_size=3).map(tuple),
    st.one_of(*[st.none()] * 19, st.sampled_from(RAW)),
)

# -- folders ------------------------------------------------------------------------------------

ODD_ENTRIES = (
    b"\xb2",
    "²".encode(),
    "٣".encode(),
    b"7",
    b"00000000",
    b"00000007",
    b"0000003",
    b"999999999",
)
ODD_ENTRIES += (
    b"1" * 200,
    b"\xff\xfe",
    b"a\nb",
    b" ",
    b"-rf",
    b"x" * 255,
    b"...",
    b"~",
    b"00000003 (copy)",
)
ODD_ENTRIES += (
    b".CURRENT." + b"0" * 32,
    b".draft.x",
    b"audit.torn-1",
    b"lost+found",
    b"tasks.sqlite-wal",
)
ODD_ENTRIES += (
    b"tasks.sqlite-shm",
    b"manifest.json",
    b"upload.json",
    b"drafts",
    b"CURRENT",
    b"LOCK",
)
GARBAGE = (
    b"",
    b"\0",
    b"\xff" * 100,
    b"{}",
    b"[]",
    b"null",
    b"[" * 100_000,
    b"1e999",
    b"-1\n",
    b"7\n",
    b"03",
)
GARBAGE += (
    b'{"format": 1e999}',
    b'{"format": 3}',
    b'{"format": "2"}',
    b"../../../secret\n",
    b"/etc\n",
    b"a\0b",
)
GARBAGE += (
    b"9" * 5000,
    "٣\n".encode(),
    b"1_0\n",
    b"SQLite format 3\0" + b"\1" * 100,
    b'{"upload": []}\n',
)


@dataclass(frozen=True)
class Harm:
    """Something that is done to a store.

    Attributes:
        what: To a file or folder: ``delete``, ``cut``, ``flip``, ``fill`` with other bytes,
            ``swap`` with another, ``folder`` (be one), ``empty folder``, ``link`` (be one to
            another, or to nowhere), ``loop`` (be one to itself). In a folder: ``add file``,
            ``add folder``, ``add link``.
        at: Which one, counted in order, modulo their number.
        other: Likewise, of the other one; or a position in the file.
        data: What a file is filled with; or the name of what is added.
    """

    what: str
    at: int
    other: int
    data: bytes

    def do(self, root: Path) -> None:
        if self.what.startswith("add"):
            self._add(root)
            return
        paths = sorted(root.rglob("*"), key=os.fsencode)
        if not paths:
            return
        path, other = paths[self.at % len(paths)], paths[self.other % len(paths)]
        if self.what == "swap":
            _swap(path, other)
        elif self.what in ("cut", "flip"):
            self._change(path)
        else:
            _remove(path)
            match self.what:
                case "fill":
                    path.write_bytes(self.data)
                case "folder":
                    path.mkdir()
                    (path / "inside").write_bytes(self.data)
                case "empty folder":
                    path.mkdir()
                case "link":
                    path.symlink_to(other if other != path else "nowhere")
                case "loop":
                    path.symlink_to(path.name)

    def _change(self, path: Path) -> None:
        if path.is_symlink() or not path.is_file() or not path.stat().st_size:
            return
        data = bytearray(path.read_bytes())
        at = self.other % len(data)
        if self.what == "cut":
            del data[at:]
        else:
            data[at] ^= 1 + self.other % 255
        path.write_bytes(data)

    def _add(self, root: Path) -> None:
        folders = [root, *sorted(path for path in root.rglob("*/") if not path.is_symlink())]
        path = Path(os.fsdecode(os.fsencode(folders[self.at % len(folders)]) + b"/" + self.data))
        if os.path.lexists(path):
            return
        match self.what:
            case "add file":
                path.write_bytes(b"x")
            case "add folder":
                path.mkdir()
            case _:
                path.symlink_to(root.parent / "secret" if self.other % 2 else "nowhere")


def _swap(path: Path, other: Path) -> None:
    if path == other or path in other.parents or other in path.parents:
        return
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@dataclass(frozen=True)
class Folder:
    """A store to which some things were done."""

    harms: tuple[Harm, ...]

    def key(self) -> list[object]:
        return [repr(self)]

    def make(self, shop: Workshop) -> None:
        root = shop.copy()
        for harm in self.harms:
            harm.do(root)
        shop.maybe_serve()
        shop.look()
        with in_time(), as_foreseen(), shop.watch.watching():
            Store.open(root)


HARM = st.one_of(
    st.builds(
        Harm,
        st.sampled_from(
            [
                "delete",
                "cut",
                "flip",
                "fill",
                "fill",
                "swap",
                "folder",
                "empty folder",
                "link",
                "loop",
            ]
        ),
        AT,
        st.integers(0, 10**5),
        st.sampled_from(GARBAGE),
    ),
    st.builds(
        Harm,
        st.sampled_from(["add file", "add folder", "add link"]),
        AT,
        AT,
        st.sampled_from(ODD_ENTRIES),
    ),
)
FOLDER = st.builds(Folder, st.lists(HARM, min_size=1, max_size=4).map(tuple))
