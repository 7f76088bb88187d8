"""How a client says who it is, and how it knows that it talks to the right server."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from inflora_client.errors import InsecureTokenError

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_RESOLVERS = ("dns", "ipv4", "ipv6")


@dataclass(frozen=True, slots=True)
class Access:
    """What a client was given; see ``ClientBase``.

    Raises:
        ValueError: some of it makes no sense together.
    """

    token: str | None = field(default=None, repr=False)
    token_file: str | Path | None = None
    tls: bool = False
    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and self.token_file is not None:
            raise ValueError("give token or token_file, not both")
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together")
        if self.credentials is not None and self.encrypted:
            raise ValueError("credentials replace tls, ca, cert and key: give them or those")
        if self.token is not None:
            _check_token(self.token, "token")

    @property
    def encrypted(self) -> bool:
        """Whether the files ask for TLS; ``credentials`` may, too."""
        return self.tls or self.ca is not None or self.cert is not None

    @property
    def _has_token(self) -> bool:
        return self.token is not None or self.token_file is not None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a client that is given the same."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def check(self, target: str) -> None:
        """Say what ``open`` would, without a channel.

        Raises:
            InsecureTokenError: a token would be sent in the clear.
            OSError: a file cannot be read.
        """
        self._channel_credentials(target)

    def open(self, grpc_or_aio: Any, target: str, options: list[tuple[str, Any]]) -> Any:
        """Open a channel with either of the two modules, whose functions are called alike.

        Raises:
            InsecureTokenError: a token would be sent in the clear.
            OSError: a file cannot be read.
        """
        credentials = self._channel_credentials(target)
        if self.credentials is None and not self.encrypted and is_loopback(target):
            # What is for this machine stays on it: gRPC would use a proxy of the environment.
            options = [*options, ("grpc.enable_http_proxy", 0)]
        if credentials is None:
            return grpc_or_aio.insecure_channel(target, options=options)
        return grpc_or_aio.secure_channel(target, credentials, options=options)

    def metadata(self) -> Callable[[], Metadata] | None:
        """Return what makes the metadata of each call, None if there are none.

        Not as gRPC's call credentials: those start a thread for every call.
        """
        if self.token is not None:
            fixed = _bearer(self.token)
            return lambda: fixed
        return _TokenFile(Path(self.token_file)) if self.token_file is not None else None

    def _channel_credentials(self, target: str) -> grpc.ChannelCredentials | None:
        if self.credentials is not None:
            return self.credentials
        if self.encrypted:
            return grpc.ssl_channel_credentials(
                *(
                    Path(each).read_bytes() if each else None
                    for each in (self.ca, self.key, self.cert)
                )
            )
        if not self._has_token:
            return None
        if not is_loopback(target):
            raise InsecureTokenError(
                f"the token would be sent in the clear to {target}: use TLS (ca, or tls)"
            )
        kind = grpc.LocalConnectionType
        # gRPC looks at the connection, too: a name can lead anywhere.
        return grpc.local_channel_credentials(
            kind.UDS if target.partition(":")[0] in _OF_THIS_MACHINE else kind.LOCAL_TCP
        )


_OF_THIS_MACHINE = ("unix", "unix-abstract")


class _TokenFile:
    """Makes metadata of the token in a file, read anew when that changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._metadata: Metadata = ()
        self()  # what is wrong with it is said now

    def __call__(self) -> Metadata:
        try:
            stat = os.stat(self._path)
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._seen:
                token = self._path.read_text("utf-8", "replace").strip()
                _check_token(token, f"the token in {self._path}")
                self._metadata, self._seen = _bearer(token), seen
        except (OSError, ValueError):
            if not self._metadata:
                raise
            # It is just being replaced: the old one, until there is another.
        return self._metadata


def is_loopback(target: str) -> bool:
    """Whether all addresses of a gRPC target are of this machine, as far as their names say."""
    scheme, separator, rest = target.partition(":")
    if separator and scheme in _OF_THIS_MACHINE:
        return True
    if separator and scheme in _RESOLVERS:
        target = rest.rpartition("/")[2] if rest.startswith("//") else rest
    return all(_is_loopback_host(each) for each in target.split(","))


def _is_loopback_host(address: str) -> bool:
    host = address.rpartition(":")[0]
    if not host or address.endswith("]"):
        host = address
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_token(token: str, what: str) -> None:
    # Anything else is refused by gRPC with an error that shows the token.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{what} is no token: it must be printable ASCII without blanks")


def _bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)
