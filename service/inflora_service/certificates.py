"""The server's certificate, and whose certificates it takes; replaced while it runs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from inflora_core.errors import InvalidInputError
from inflora_service.reloading import Watched


@dataclass(frozen=True)
class TlsFiles:
    """Where certificates are, all in PEM.

    Attributes:
        certificate: The server's, followed by those of authorities between it and a root.
        key: Its private key, without a passphrase.
        client_ca: Who signs clients' certificates; None asks clients for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


@dataclass(frozen=True, repr=False)
class _Content:
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: str

    def __str__(self) -> str:
        return f"valid until {self.expires}"


class Certificates:
    """Credentials of a server, of the files as they are.

    New connections get the newest certificate that is usable; those that are open keep theirs.
    Where there is a client CA, who has no certificate of it cannot connect: gRPC for Python cannot
    ask for one without insisting on it.

    Args:
        files: Where they are.

    Attributes:
        watched: What they hold.

    Raises:
        InvalidInputError: they cannot be used; the message says why.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.watched = Watched("the TLS certificates", files.paths, lambda: _load(files))
        self._given = self.watched.value

    def credentials(self) -> grpc.ServerCredentials:
        """Return what gRPC takes; it asks for news at each new connection."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._given),
            self._fetch,  # type: ignore[arg-type]  # the stubs forget the None
            require_client_authentication=self._given.client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what is new since the last time, None if nothing is. Called in gRPC's threads."""
        newest = self.watched.value
        if newest is self._given:
            return None
        self._given = newest
        return _configuration(newest)


def _configuration(content: _Content) -> grpc.ServerCertificateConfiguration:
    # A new one each time: gRPC takes what it holds away.
    return grpc.ssl_server_certificate_configuration(
        [(content.key, content.certificate)], content.client_ca
    )


def _load(files: TlsFiles) -> _Content:
    """Read the files, and see that they can be used.

    Raises:
        InvalidInputError: they cannot.
    """
    certificate = _read(files.certificate, "--tls-cert")
    key = _read(files.key, "--tls-key")
    client_ca = _read(files.client_ca, "--tls-client-ca") if files.client_ca else None
    try:
        expires = _shake_hands(files, certificate.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInputError(
            f"--tls-cert {files.certificate} with --tls-key {files.key}: {_reason(error)}"
        ) from error
    if client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(
                cadata=client_ca.decode("ascii", "replace")
            )
        except (ssl.SSLError, ValueError) as error:
            raise InvalidInputError(
                f"--tls-client-ca {files.client_ca}: {_reason(error)}"
            ) from error
    return _Content(certificate, key, client_ca, expires)


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{flag} {path} cannot be read: {error.strerror}") from error


def _shake_hands(files: TlsFiles, certificate: str) -> str:
    """Connect a server with the pair to a client that trusts it, in memory; return its last day.

    That is more than to parse it: the key has to fit, and a client to take the certificate for that
    of a server, now.

    Raises:
        ssl.SSLError: it does not work.
        ValueError: the key has a passphrase.
    """
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Without a function that is called for it, OpenSSL would ask at the terminal.
    server_side.load_cert_chain(files.certificate, files.key, password=_refuse_passphrase)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_side.load_verify_locations(cadata=certificate)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(there, back, server_side=True)
    client = client_side.wrap_bio(back, there)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    found = client.getpeercert() or {}
    return str(found.get("notAfter", "?"))


def _refuse_passphrase() -> str:
    raise ValueError("the key has a passphrase: store it without one")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return f"it cannot be used: {error.reason or error}"
    return str(error)
