"""A store that several servers share: one learner publishes there, any number of predictors follow.

It lies in S3, Google Cloud Storage, Azure, or a folder, by way of obstore. No torch.

    CURRENT              the one object that ever changes: a ``Root``, moved by compare-and-swap
    objects/{sha256}     all others, named by what is in them: indexes, manifests, files of versions

A root names an index, an index names manifests and files: whoever has read the root sees the store
as it was when the root was moved, and what is fetched is checked against its name. What no index
names any more is deleted, so what is forgotten is gone here, too.

Each learner has an id, kept in its own store, and each of its starts an epoch. A root can only be
moved by who has read it last, so a learner whose place was taken learns of it when it publishes
next, and its version is never seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import LocalStore, from_url
from pydantic import TypeAdapter, ValidationError

from inflora_core import durable
from inflora_core.errors import (
    DamagedError,
    FencedError,
    InvalidInputError,
    NotFoundError,
    StoreFormatError,
    UnavailableError,
)

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

FORMAT = 1

_ROOT = "CURRENT"
_OBJECTS = "objects/"
_PIECE_BYTES = 8 * 2**20
"""Of a file, in one request: a cut line costs no more than that."""
_CLIENT: ClientConfig = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=60)}
# What is away is tried again by whoever needs it: obstore's own retries take three minutes.
_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}

_ABSENT = (exceptions.NotFoundError, FileNotFoundError)
"""What obstore raises for what is not there: one or the other, as the kind of store has it."""

Token: TypeAlias = "UpdateVersion | bytes"
"""What a root has to be still, for it to be replaced: as the kind of store tells it."""


@dataclass(frozen=True)
class Root:
    """What is published, and by whom.

    Attributes:
        writer: Id of the learner that may move it.
        host: Name of the machine that this learner runs on, for people.
        epoch: How many learners, and starts of them, there have been.
        serial: How often it was moved.
        current: Number of the current version, None before the first.
        index: sha256 of the index.
        time: When it was moved, UTC.
    """

    writer: str
    host: str
    epoch: int
    serial: int
    current: int | None
    index: str
    time: datetime


@dataclass(frozen=True)
class IndexedVersion:
    """A version in an index.

    Attributes:
        manifest: sha256 of its manifest.
        files: sha256 of the files that are there, by name.
        pinned: Whether it is kept however old it is.
        retired: Whether its data were let go.
    """

    manifest: str
    files: dict[str, str]
    pinned: bool = False
    retired: bool = False


@dataclass(frozen=True)
class Index:
    """All that is published at some time.

    Attributes:
        backbone: Name of the backbone, "" before there is one.
        backbone_files: sha256 of its files, by name; its manifest is one of them.
        forgotten: sha256 of the list of forgotten classes.
        source: sha256 of what the backbone was made from, "" if that is not known.
        versions: By number.
    """

    backbone: str = ""
    backbone_files: dict[str, str] = field(default_factory=dict)
    forgotten: str = ""
    source: str = ""
    versions: dict[int, IndexedVersion] = field(default_factory=dict)

    def objects(self) -> set[str]:
        """Return the names of all objects that it names."""
        named = {self.forgotten, self.source, *self.backbone_files.values()}
        for version in self.versions.values():
            named.update((version.manifest, *version.files.values()))
        return named - {""}


@dataclass(frozen=True)
class Seen:
    """A root as it was read."""

    root: Root
    token: Token


class SharedStore:
    """Reads and writes at a URL. Blocks; safe for several threads."""

    def __init__(
        self,
        url: str,
        opened: Callable[[], ObjectStore],
        cell: _Cell,
        folder: Path | None = None,
    ) -> None:
        """Use ``SharedStore.open``."""
        self.url = url
        self._opened = opened
        self._cell = cell
        self._folder = folder

    @cached_property
    def _objects(self) -> ObjectStore:
        # Not at once: a folder may be away like any other store, and comes back.
        return self._opened()

    @classmethod
    def open(cls, url: str) -> SharedStore:
        """Return the store at ``url``; nothing is read or written yet.

        Args:
            url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://account/container/prefix``
                or ``file:///folder``. Endpoints and credentials come from the environment, by the
                names that obstore documents (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...).

        Raises:
            InvalidInputError: it is no such URL, or what the environment says makes no sense.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            # It would be in logs, and in what clients are told.
            raise InvalidInputError(
                "the URL of a shared store holds no credentials and no options: they come from the "
                "environment",
                field="shared",
            )
        if parts.scheme == "file":
            folder = Path(unquote(parts.path))
            if parts.netloc or not folder.is_absolute() or folder == Path("/"):
                raise InvalidInputError(
                    f"{url!r} names no folder: it has three slashes, as in file:///data/shared",
                    field="shared",
                )
            return cls(
                url, lambda: LocalStore(folder, mkdir=True), _FileCell(folder / _ROOT), folder
            )
        if parts.scheme not in ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss"):
            raise InvalidInputError(
                f"{url!r} is no URL of a shared store: use s3://, gs://, az:// or file:///",
                field="shared",
            )
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        try:
            client: ClientConfig = {**_CLIENT, "allow_http": plain}
            objects = from_url(url, client_options=client, retry_config=_RETRIES)
        except (exceptions.BaseError, ValueError) as error:
            raise InvalidInputError(
                f"the shared store {url!r}: {_first_line(error)}", field="shared"
            ) from error
        return cls(url, lambda: objects, _ObjectCell(objects))

    # -- the root ---------------------------------------------------------------------------

    def root(self) -> Seen | None:
        """Return what is published now, None if nothing ever was.

        Raises:
            UnavailableError: the store cannot be reached.
            DamagedError: the root is none.
            StoreFormatError: a newer release wrote it.
        """
        with self._telling():
            found = self._cell.read()
        return found and Seen(_parse_root(found[0], self.url), found[1])

    def move(self, root: Root, before: Seen | None) -> Seen:
        """Publish: replace the root that was read, or make the first one.

        Raises:
            FencedError: another learner has moved it meanwhile.
            UnavailableError: the store cannot be reached, or knows no compare-and-swap. Whether the
                root was moved then, only reading it tells.
        """
        content = _dump_root(root)
        with self._telling():
            token = self._cell.write(content, before.token if before else None)
        if token is not None:
            return Seen(root, token)
        now = self.root()
        if now is not None and now.root == root:
            return now  # moved by an earlier attempt, of which the answer was lost
        if now is not None and (now.root.writer, now.root.epoch) == (root.writer, root.epoch):
            raise UnavailableError(f"{self.url}: an earlier attempt came late; once more")
        raise self.fenced(now)

    def fenced(self, now: Seen | None) -> FencedError:
        """Return the error that says who else publishes here."""
        who = f"the learner {now.root.writer} on {now.root.host}" if now else "somebody"
        when = f", who published last at {now.root.time:%Y-%m-%d %H:%M:%S} UTC" if now else ""
        return FencedError(
            f"the shared store {self.url} belongs to {who}{when}: one learner publishes"
        )

    # -- objects ----------------------------------------------------------------------------

    def put(self, content: bytes | Path, sha256: str = "") -> str:
        """Keep a file; return its name.

        Args:
            content: It, or where it is.
            sha256: Of it, if that is known; then nothing is sent that is there already.

        Raises:
            UnavailableError: the store cannot be reached.
            OSError: the file cannot be read.
        """
        name = sha256 or sha256_of(content)
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        with self._telling():
            with contextlib.suppress(*_ABSENT):  # a bucket that is not there: the next step tells
                if obstore.head(self._objects, _OBJECTS + name)["size"] == size:
                    return name
            if self._folder is None:
                obstore.put(self._objects, _OBJECTS + name, content)
            else:
                # obstore does not flush: a power cut would leave a root that names torn files.
                path = self._folder / _OBJECTS / name
                durable.make_folder(path.parent)
                durable.replace(path, _read(content))
        return name

    def get(self, sha256: str) -> bytes:
        """Return a file by its name.

        Raises:
            NotFoundError: it is not there, any more.
            DamagedError: it is not what its name says.
            UnavailableError: the store cannot be reached.
        """
        content = b"".join(self._pieces(sha256))
        if sha256_of(content) != sha256:
            raise self._damaged(sha256)
        return content

    def fetch(self, sha256: str, to: Path) -> None:
        """Write a file to ``to``, whole or not at all.

        Raises:
            NotFoundError, DamagedError, UnavailableError: as ``get``.
            OSError: the disk does not take it.
        """
        draft = durable.draft_of(to)
        found = hashlib.sha256()
        try:
            with draft.open("wb") as file:
                for piece in self._pieces(sha256):
                    found.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if found.hexdigest() != sha256:
                raise self._damaged(sha256)
            os.replace(draft, to)
        finally:
            draft.unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, those that are not there among them.

        Raises:
            UnavailableError: the store cannot be reached.
        """
        for name in names:
            with (
                self._telling(),
                contextlib.suppress(*_ABSENT),
            ):
                obstore.delete(self._objects, _OBJECTS + name)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of all files, in bytes, by name.

        Raises:
            UnavailableError: the store cannot be reached.
        """
        with self._telling():
            listed = obstore.list(self._objects, prefix=_OBJECTS)
            return {
                each["path"].rpartition("/")[2]: each["size"] for some in listed for each in some
            }

    def index(self, root: Root) -> Index:
        """Return what a root names.

        Raises:
            NotFoundError: another root was published meanwhile.
            DamagedError, UnavailableError: as ``get``.
        """
        try:
            return _INDEX.validate_json(self.get(root.index))
        except ValidationError as error:
            raise DamagedError(f"the index of {self.url} cannot be read: {error}") from error

    def _pieces(self, sha256: str) -> Iterator[bytes]:
        path, position, size = _OBJECTS + sha256, 0, 1
        with self._telling(absent=True):
            try:
                while position < size:
                    end = position + _PIECE_BYTES
                    found = obstore.get(self._objects, path, options={"range": (position, end)})
                    size = found.meta["size"]
                    yield bytes(found.bytes())
                    position = end
            except _ABSENT as error:
                raise NotFoundError(f"the shared store {self.url} has no {sha256}") from error

    def _damaged(self, sha256: str) -> DamagedError:
        return DamagedError(f"{sha256} in the shared store {self.url} is not what its name says")

    @contextlib.contextmanager
    def _telling(self, *, absent: bool = False) -> Iterator[None]:
        """Turn what obstore raises into errors of ours; ``absent``: but for what is not there."""
        try:
            yield
        except (exceptions.BaseError, OSError) as error:
            if absent and isinstance(error, _ABSENT):
                raise
            raise UnavailableError(
                f"the shared store {self.url} cannot be used: {_first_line(error)}"
            ) from error


class _Cell(Protocol):
    """One value, and compare-and-swap of it."""

    def read(self) -> tuple[bytes, Token] | None:
        """Return the value, and what it has to be still for it to be replaced."""

    def write(self, content: bytes, before: Token | None) -> Token | None:
        """Replace the value that was read, or make it; return None if it is another by now."""


class _ObjectCell:
    """An object, by conditional puts."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def read(self) -> tuple[bytes, Token] | None:
        try:
            found = obstore.get(self._objects, _ROOT)
        except _ABSENT:
            return None
        return bytes(found.bytes()), _update(found.meta["e_tag"], found.meta["version"])

    def write(self, content: bytes, before: Token | None) -> Token | None:
        assert not isinstance(before, bytes), "a token of this kind of store"
        try:
            put = obstore.put(self._objects, _ROOT, content, mode=before or "create")
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return None
        return _update(put["e_tag"], put["version"])


def _update(e_tag: str | None, version: str | None) -> UpdateVersion:
    """Return what an object has to be still; obstore takes no None."""
    update: UpdateVersion = {}
    if e_tag is not None:
        update["e_tag"] = e_tag
    if version is not None:
        update["version"] = version
    return update


class _FileCell:
    """A file, by a lock: folders have no conditional puts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[bytes, Token] | None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return content, content

    def write(self, content: bytes, before: Token | None) -> Token | None:
        durable.make_folder(self._path.parent)
        with self._locked():
            found = self.read()
            if (found and found[1]) != before:
                return None
            durable.replace(self._path, content)
            return content

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._path.with_name("LOCK").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_INDEX = TypeAdapter(Index)
_ROOTS = TypeAdapter(Root)


def sha256_of(content: bytes | Path) -> str:
    """Return the name of an object: the sha256 of what is in it.

    Args:
        content: It, or where it is.
    """
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_index(index: Index) -> bytes:
    """Return an index as it is kept."""
    return _INDEX.dump_json(index)


def _dump_root(root: Root) -> bytes:
    said = json.loads(_ROOTS.dump_json(root))
    return json.dumps({"format": FORMAT, **said, "sha256": _sum(said)}, indent=1).encode() + b"\n"


def _parse_root(content: bytes, url: str) -> Root:
    try:
        said = json.loads(content)
        number, expected = said.pop("format"), said.pop("sha256")
        if number > FORMAT:
            raise StoreFormatError(
                f"the shared store {url} has format {number}; this release reads up to {FORMAT}"
            )
        if expected != _sum(said):
            raise DamagedError(f"{_ROOT} of the shared store {url} does not have its checksum")
        return _ROOTS.validate_python(said)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"{_ROOT} of the shared store {url} cannot be read: {_first_line(error)}"
        ) from error


def _sum(said: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _first_line(error: Exception) -> str:
    """Return what an error says, without the trail that obstore appends."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
