"""What a server has, fetched over a line that may be cut at any moment."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from inflora_edge import _messages, files
from inflora_edge._messages import Artifact, Piece
from inflora_edge.errors import ServerError

_METHOD = "/inflora.v1.ModelService/DownloadArtifact"


@dataclass(frozen=True)
class Server:
    """Where the model is learned, or served.

    Attributes:
        address: ``host:port``, or any other target of gRPC.
        model: The model's name.
        token: To say who asks; sent over TLS, or to this machine.
        ca: A file of certificates that the server's is to be signed by; it asks for TLS.
        timeout: Seconds in which the next piece, of up to 256 KiB, has to come.
    """

    address: str
    model: str = "default"
    token: str = ""
    ca: Path | None = None
    timeout: float = 60.0

    def channel(self) -> grpc.Channel:
        """Open a channel.

        Raises:
            ValueError: the token would be sent in the clear to another machine.
            OSError: ``ca`` cannot be read.
        """
        if self.ca is not None:
            return grpc.secure_channel(
                self.address, grpc.ssl_channel_credentials(self.ca.read_bytes())
            )
        if self.token and not self.address.startswith(("localhost:", "127.0.0.1:", "[::1]:")):
            raise ValueError(f"a token would be sent to {self.address} in the clear: give a ca")
        return grpc.insecure_channel(self.address)


class Fetcher:
    """Fetches files; what a cut left is gone on with, also by the next process.

    Args:
        server: To ask.
        folder: For what has arrived so far.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self._server = server
        self._folder = folder

    def fetch(
        self,
        artifact: str,
        held: Sequence[str] = (),
        wanted: Callable[[Artifact, int], bool] = lambda artifact, version: True,
    ) -> tuple[Path, Artifact, int] | None:
        """Fetch a file of the version that is current, or of the one that was begun with.

        Args:
            artifact: Its name.
            held: For a delta: SHA-256 of the files that it may lead from.
            wanted: Called with what is announced and its version's number; nothing more is fetched
                if it says no.

        Returns:
            Where it is, to be moved away or discarded, what it is, and its version's number. None
            if it is not wanted.

        Raises:
            ServerError: it did not come. What came of it is kept, unless that is of no use.
            OSError: the disk does not take it.
        """
        asked = [artifact, *held]
        begun = self._begun(asked)
        try:
            return self._stream(asked, begun, wanted)
        except ServerError as error:
            if error.code in _OTHER_FILE:
                self.discard(artifact)
            if begun is None or error.code not in _OTHER_FILE:
                raise
            # The version that was begun with is gone, or its file is another now.
            return self._stream(asked, None, wanted)

    def discard(self, artifact: str) -> None:
        """Forget what has arrived of a file."""
        self._note(artifact).unlink(missing_ok=True)
        self._part(artifact).unlink(missing_ok=True)

    def _part(self, artifact: str) -> Path:
        return self._folder / f"incoming.{artifact}.part"

    def _note(self, artifact: str) -> Path:
        return self._folder / f"incoming.{artifact}.json"

    def _stream(
        self,
        asked: Sequence[str],
        begun: tuple[Artifact, int] | None,
        wanted: Callable[[Artifact, int], bool],
    ) -> tuple[Path, Artifact, int] | None:
        part = self._part(asked[0])
        offset = 0 if begun is None else part.stat().st_size
        version = "current" if begun is None else str(begun[1])
        name = f"models/{self._server.model}/versions/{version}"
        request = _messages.request(name, asked[0], offset, asked[1:])
        token = self._server.token
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        with self._server.channel() as channel:
            call = channel.unary_stream(_METHOD, _as_it_is, _messages.piece)
            pieces = call(request, metadata=metadata)
            # A server that was asked for a delta may have to make it first.
            watchdog = _Watchdog(pieces.cancel, _FIRST * self._server.timeout)
            try:
                for piece in pieces:
                    watchdog.feed(self._server.timeout)
                    if piece.artifact is not None:
                        announced = _announced(piece)
                        if not wanted(*announced):
                            return None
                        if begun is None:
                            begun = announced
                            self._begin(asked, *begun)
                        elif begun != announced:
                            raise ServerError("ABORTED", "the file is another by now")
                    if begun is None or piece.offset != offset:
                        raise ServerError("DATA_LOSS", "the server sent what was not asked for")
                    offset += len(piece.data)
                    if offset > begun[0].size:
                        raise ServerError("DATA_LOSS", "the server sent more than it announced")
                    _append(part, piece)
            except grpc.RpcError as error:
                raise ServerError(error.code().name, error.details() or "") from error
            finally:
                watchdog.stop()
                pieces.cancel()
        if begun is None or offset < begun[0].size:
            raise ServerError("UNAVAILABLE", "the stream ended early")
        if files.sha256_of(part) != begun[0].sha256:
            raise ServerError("DATA_LOSS", f"{begun[0].name} is not what was announced")
        return part, *begun

    def _begun(self, asked: Sequence[str]) -> tuple[Artifact, int] | None:
        """Return what was begun, if it is what is asked for now."""
        try:
            note = json.loads(self._note(asked[0]).read_bytes())
            begun = Artifact(**note["artifact"]), int(note["version"])
            if note["asked"] == asked and self._part(asked[0]).stat().st_size <= begun[0].size:
                return begun
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.discard(asked[0])
        return None

    def _begin(self, asked: Sequence[str], artifact: Artifact, version: int) -> None:
        if artifact.size > shutil.disk_usage(self._folder).free:
            raise OSError(errno.ENOSPC, f"there is no room for {artifact.size} bytes")
        self._part(asked[0]).write_bytes(b"")
        note = {"asked": list(asked), "artifact": vars(artifact), "version": version}
        files.replace(self._note(asked[0]), json.dumps(note).encode())


_OTHER_FILE = (
    *("ABORTED", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND"),
    "OUT_OF_RANGE",
)
"""What is said where there is no such file (any more): what arrived of it is of no use."""

_FIRST = 5
"""Times as long as for others may the first piece take."""

_SHA256 = re.compile("[0-9a-f]{64}")
_NUMBER = re.compile("[1-9][0-9]{0,8}")


def _announced(piece: Piece) -> tuple[Artifact, int]:
    """Return what the first message says; a server may say anything.

    Raises:
        ServerError: it makes no sense.
    """
    assert piece.artifact is not None
    number = piece.version.rpartition("/")[2]
    if not _NUMBER.fullmatch(number) or not _SHA256.fullmatch(piece.artifact.sha256):
        raise ServerError("DATA_LOSS", f"the server announced {piece.artifact} of {piece.version}")
    return piece.artifact, int(number)


def _append(part: Path, piece: Piece) -> None:
    """Write a piece; what has a length after a power cut has its content, too."""
    with part.open("r+b") as file:
        file.seek(piece.offset)
        file.write(piece.data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


class _Watchdog:
    """Calls a function unless it is fed in time: a line that is dead says nothing."""

    def __init__(self, bite: Callable[[], object], seconds: float) -> None:
        self._bite = bite
        self._timer: threading.Timer | None = None
        self.feed(seconds)

    def feed(self, seconds: float) -> None:
        """Wait anew."""
        self.stop()
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()


def _as_it_is(message: bytes) -> bytes:
    return message
