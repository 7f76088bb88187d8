"""Who may call, and what: the file that ``--tokens`` names.

    [[principals]]
    name = "camera-7"                # what the audit log calls it
    role = "predict"                 # or "learn", or "admin": each may do what those before may
    token_sha256 = ["9f86...", ]     # some, so that a new token can come before the old one goes
    certificates = ["DNS:camera-7.plant.example"]   # or CN:, URI:, EMAIL:, IP:; "*" is any other

    [principals.quota]                   # what is left out is not limited
    calls_per_second = 20
    bytes_per_second = 10_000_000
    concurrent_calls = 8
    queued_tasks = 3

Tokens themselves are nowhere in it. They are random (``inflora token`` makes them), so that a plain
hash cannot be turned back: nobody gets through all 256-bit numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from inflora_core.errors import InvalidInputError

Role = Literal["predict", "learn", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what those before it may."""

MOST_PRINCIPALS = 1000
"""All hashes are looked at in every call."""

ANY_CERTIFICATE = "*"

_KINDS = {
    "CN": "x509_common_name",
    "DNS": "peer_dns",
    "URI": "peer_uri",
    "EMAIL": "peer_email",
    "IP": "peer_ip",
}
"""What gRPC calls the names in a verified certificate."""


def _certificate(text: str) -> str:
    kind, separator, name = text.partition(":")
    if text != ANY_CERTIFICATE and not (separator and kind in _KINDS and name):
        raise ValueError(
            f"{text!r} is neither {', '.join(f'{kind}:...' for kind in _KINDS)} nor "
            f"{ANY_CERTIFICATE!r}"
        )
    return text


def _digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("it is no sha256 of 64 lower-case hexadecimal digits")
    return text


class Quota(BaseModel):
    """What one principal may use; None: any."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    calls_per_second: float | None = Field(None, gt=0)
    """Calls, and requests of a ``PredictStream``; a second's worth may come at once."""
    bytes_per_second: int | None = Field(None, ge=1024)
    """Of messages in both directions; likewise."""
    concurrent_calls: int | None = Field(None, ge=1)
    queued_tasks: int | None = Field(None, ge=1)


class Principal(BaseModel):
    """Somebody who may call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    role: Role
    token_sha256: tuple[Annotated[str, AfterValidator(_digest)], ...] = Field((), max_length=8)
    certificates: tuple[Annotated[str, AfterValidator(_certificate)], ...] = ()
    quota: Quota = Quota()

    def may(self, role: Role) -> bool:
        """Whether it has ``role``, or one that includes it."""
        return ROLES.index(self.role) >= ROLES.index(role)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    principals: tuple[Principal, ...] = Field(min_length=1, max_length=MOST_PRINCIPALS)


@dataclass(frozen=True)
class Principals:
    """All who may call.

    Attributes:
        entries: In the order of the file.
        tokens: Digest of every token, with whose it is.
    """

    entries: tuple[Principal, ...]
    tokens: tuple[tuple[bytes, Principal], ...]

    def __str__(self) -> str:
        roles = ", ".join(
            f"{sum(each.role == role for each in self.entries)} with {role}" for role in ROLES
        )
        return f"{len(self.entries)} principals: {roles}"

    @classmethod
    def read(cls, path: Path, *, certificates: bool) -> Principals:
        """Read the file.

        Args:
            path: Where it is.
            certificates: Whether clients are asked for certificates.

        Raises:
            InvalidInputError: it cannot be read, or does not say clearly who may do what; the
                message names the file, and what in it.
        """
        try:
            entries = _File.model_validate(tomllib.loads(path.read_text())).principals
            _check(entries, certificates)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInputError(f"{path}: {_place(first['loc'])}: {first['msg']}") from error
        except OSError as error:
            raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # of TOML or UTF-8, or of _check
            raise InvalidInputError(f"{path}: {error}") from error
        return cls(
            entries, tuple((bytes.fromhex(d), each) for each in entries for d in each.token_sha256)
        )

    def by_digest(self, digest: bytes) -> Principal | None:
        """Return whose token it is that has this sha256, None if it is nobody's.

        All are looked at, each in constant time: how long it takes says nothing about any of them.
        """
        found = None
        for known, principal in self.tokens:
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def by_certificate(self, names: frozenset[str]) -> Principal | None:
        """Return whose certificate it is, None if it is nobody's, or could be of several.

        Args:
            names: As ``certificate_names`` returns them.
        """
        found = [each for each in self.entries if not names.isdisjoint(each.certificates)]
        if not found:
            found = [each for each in self.entries if ANY_CERTIFICATE in each.certificates]
        return found[0] if len(found) == 1 else None


def token_digest(token: str) -> bytes:
    """Return the sha256 of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """Return the names in a caller's verified certificate, as in the file; none without one."""
    if b"ssl" not in auth_context.get("transport_security_type", ()):
        return frozenset()
    return frozenset(
        f"{kind}:{name.decode('utf-8', 'replace')}"
        for kind, key in _KINDS.items()
        for name in auth_context.get(key, ())
    )


def _check(entries: tuple[Principal, ...], certificates: bool) -> None:
    seen: dict[str, str] = {}
    for each in entries:
        if not each.token_sha256 and not each.certificates:
            raise ValueError(f"{each.name!r} has neither token_sha256 nor certificates")
        if each.certificates and not certificates:
            raise ValueError(
                f"{each.name!r} is known by its certificate, but clients are not asked for any: "
                "give --tls-client-ca"
            )
        for what in (f"the name {each.name}", *each.token_sha256, *each.certificates):
            if what in seen:
                raise ValueError(f"{what} is there twice, of {seen[what]!r} and {each.name!r}")
            seen[what] = each.name


def _place(location: tuple[Any, ...]) -> str:
    """Return where in the file something is, for example ``principals[2].role``."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")
