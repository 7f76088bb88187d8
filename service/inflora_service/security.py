"""What a server is told about security, and whether it may be started so."""

from __future__ import annotations

import ipaddress
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inflora_core.errors import InvalidInputError, UnavailableError
from inflora_service.access import Access
from inflora_service.certificates import Certificates, TlsFiles
from inflora_service.principals import Principals
from inflora_service.reloading import RELOAD_SECONDS, Watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SecuritySettings:
    """Files, and what is allowed in spite of them. See docs/security.md.

    Attributes:
        tls_cert: The server's certificate and those of authorities between, PEM.
        tls_key: Its private key, PEM.
        tls_client_ca: Who signs clients' certificates, which every client needs then.
        tokens: Who may do what; see ``principals``. None: anybody may do everything.
        insecure: Listen to other machines without asking who they are, or take tokens in the clear.
        reload_seconds: Between looks at these files.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    insecure: bool = False
    reload_seconds: float = RELOAD_SECONDS

    def tls_files(self) -> TlsFiles | None:
        """Return the certificates' files, None without TLS.

        Raises:
            InvalidInputError: some are given that are nothing without others.
        """
        if self.tls_cert is None or self.tls_key is None:
            if self.tls_cert or self.tls_key or self.tls_client_ca:
                raise InvalidInputError(
                    "--tls-cert and --tls-key belong together, and --tls-client-ca needs both",
                    field="tls_cert" if self.tls_cert is None else "tls_key",
                )
            return None
        if self.tls_client_ca is not None and self.tokens is None:
            raise InvalidInputError(
                "--tls-client-ca needs --tokens, the file that says what each certificate may do",
                field="tokens",
            )
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)


class Security:
    """What the settings come to.

    Args:
        settings: What was asked for.
        host: Where the server will listen.
        max_calls: Most calls at a time.

    Attributes:
        certificates: The server's; None without TLS.
        access: Decides on calls.
        watched: What may change on the disk.

    Raises:
        InvalidInputError: a file cannot be used, or the server would be open to other machines.
        UnavailableError: the host has no address.
    """

    def __init__(self, settings: SecuritySettings, host: str, max_calls: int) -> None:
        files = settings.tls_files()
        self._exposure = _check_exposure(settings, host, encrypted=files is not None)
        self.certificates = Certificates(files) if files else None
        asked = files is not None and files.client_ca is not None
        principals = (
            Watched("the tokens", (tokens,), lambda: Principals.read(tokens, certificates=asked))
            if (tokens := settings.tokens) is not None
            else None
        )
        self.access = Access(principals, certificates=asked, max_calls=max_calls)
        self.watched: list[Watched[Any]] = [
            *([self.certificates.watched] if self.certificates else []),
            *([principals] if principals else []),
        ]

    def announce(self) -> None:
        """Log who can call."""
        if self._exposure:
            log.log(*self._exposure)
        for each in self.watched:
            log.info("%s: %s", each.what, each.value)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Asks for addresses of names; may block.

    Raises:
        OSError: the name has none.
    """
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = {str(address[0]).partition("%")[0] for *_, address in found}
    return all(ipaddress.ip_address(each).is_loopback for each in addresses)


def _check_exposure(
    settings: SecuritySettings, host: str, *, encrypted: bool
) -> tuple[int, str] | None:
    """See that no other machine can call without saying who it is, nor read who does.

    Returns:
        What is to be logged, and how severe it is.

    Raises:
        InvalidInputError: it could.
        UnavailableError: the host has no address.
    """
    closed = settings.tokens is not None
    try:
        inside = is_loopback(host)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on {host}: {error.strerror}", field="host"
        ) from error
    if inside and closed:
        return None
    if inside:
        return logging.INFO, (
            "no credentials are set up (--tokens): listening on loopback only, where every program "
            "of this machine may do everything"
        )
    if not closed:
        fault = (
            "anybody who reaches it could do everything: give --tokens, --tls-cert and --tls-key"
        )
    elif not encrypted:
        fault = "tokens would be sent in the clear: give --tls-cert and --tls-key"
    else:
        return None
    if not settings.insecure:
        raise InvalidInputError(
            f"--host {host} is more than loopback, and {fault}; or ask for it with --insecure",
            field="host",
        )
    return logging.WARNING, f"--insecure: listening on {host}, though {fault.partition(':')[0]}"
