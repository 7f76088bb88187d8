"""What the two clients have in common: their configuration and what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from inflora_client._access import Access
from inflora_client._calls import Question
from inflora_client._channel import RetryPolicy, channel_options
from inflora_client._names import Names, TaskRef, VersionRef
from inflora_client._resume import Transfer, Watch

DEFAULT_TARGET = "localhost:50051"
DEFAULT_ARTIFACT = "model.onnx"


class ClientBase:
    """Configuration of a client.

    Args:
        target: Address of the server, ``host:port`` or any other gRPC target. With
            ``dns:///host:port``, or a list such as ``ipv4:10.0.0.1:50051,10.0.0.2:50051``, unary
            calls and streams take turns between all addresses.
        model: The model's id.
        timeout: Seconds for each unary call, its retries included; None for no limit.
            Uploads, downloads and watches have none: they take as long as they take.
        wait_for_ready: Wait for a server that cannot be reached yet (unary calls: within
            ``timeout``), instead of failing after the retries.
        retry: What to do while the server is UNAVAILABLE.
        token: Says who calls; sent over TLS and to this machine, never in the clear.
        token_file: The file that holds it, in place of ``token``; read anew when it changes.
        tls: Encrypt, and take any server whose certificate gRPC's own list of authorities vouches
            for.
        ca: File with the certificates (PEM) of who signed the server's; implies ``tls``.
        cert: File with the client's own certificate (PEM), for servers that ask for one; implies
            ``tls``. Read once: make a new client when it is renewed.
        key: File with its private key (PEM).
        credentials: In place of the last four, for what they cannot say.

    Raises:
        ValueError: some of these make no sense together.
        InsecureTokenError: the token would be sent in the clear.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        model: str = "default",
        timeout: float | None = 60.0,
        wait_for_ready: bool = False,
        retry: RetryPolicy | None = None,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: bool = False,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._target = target
        self._model = model
        self._names = Names(f"models/{model}")
        self._timeout = timeout
        self._wait_for_ready = wait_for_ready
        self._retry = retry or RetryPolicy()
        self._access = Access(token, token_file, tls, ca, cert, key, credentials)
        self._connect()

    def _connect(self) -> None:
        """Prepare the connection; gRPC makes it when it is first needed."""
        raise NotImplementedError

    def _open_channel(self, grpc_or_aio: Any) -> Any:
        """Open a channel with either of the two modules, whose functions are called alike."""
        options = channel_options(self._retry, self._target)
        return self._access.open(grpc_or_aio, self._target, options)

    def _question(
        self, top_k: int, version: VersionRef | None, task: TaskRef | None, return_embedding: bool
    ) -> Question:
        return Question(self._names, top_k, version, task, return_embedding)

    def _watch(self, task: TaskRef) -> Watch:
        return Watch(self._names.task(task), self._retry)

    def _transfer(
        self, version: VersionRef, artifact: str, held: Sequence[str], to: str | Path
    ) -> Transfer:
        return Transfer(self._names.version(version), artifact, held, Path(to), self._retry)
