"""The file that says who may call, and how much they may use."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_core.errors import InvalidInputError, QuotaExceededError
from inflora_service.principals import ROLES, Principals, Quota, certificate_names, token_digest
from inflora_service.quotas import Account, Bucket
from tests.service.security_cases import entry

HASH = hashlib.sha256(b"token").hexdigest()


def read(path: Path, text: str, *, certificates: bool = True) -> Principals:
    file = path / "tokens.toml"
    file.write_text(text)
    return Principals.read(file, certificates=certificates)


def test_tokens_and_roles(tmp_path: Path) -> None:
    found = read(tmp_path, "".join(map(entry, ROLES)))
    for number, role in enumerate(ROLES):
        principal = found.by_digest(token_digest(f"token-of-{role}"))
        assert principal is not None
        assert [principal.may(each) for each in ROLES] == [at <= number for at in range(3)]
    assert found.by_digest(token_digest("token-of-")) is None


def test_certificates(tmp_path: Path) -> None:
    text = (
        entry("admin", "a", "CN:a")
        + entry("learn", "b", "URI:spiffe://x/b")
        + entry("predict", "c", "*")
    )
    found = read(tmp_path, text)
    ssl = {"transport_security_type": [b"ssl"]}

    def name(**context: list[bytes]) -> str | None:
        principal = found.by_certificate(certificate_names({**ssl, **context}))
        return principal.name if principal else None

    assert name(x509_common_name=[b"a"]) == "a"
    assert name(peer_uri=[b"spiffe://x/b"]) == "b"
    assert name(x509_common_name=[b"b"], peer_dns=[b"a"]) == "c"  # of another kind
    assert name(x509_common_name=[b"a"], peer_uri=[b"spiffe://x/b"]) is None
    assert name() == "c"
    assert certificate_names({"x509_common_name": [b"a"]}) == frozenset()  # of no TLS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "principals"),
        ("principals = []", "principals"),
        ("x = 1\n" + entry("learn"), "x:"),
        (entry("learn").replace('role = "learn"', 'role = "root"'), "principals[0].role"),
        (entry("learn") + entry("learn"), "'learn' and 'learn'"),
        (entry("learn", "a") + entry("learn", "b").replace("b", "b"), ""),
        (entry("learn", "a b"), "principals[0].name"),
        (entry("learn", "a@b"), "principals[0].name"),
        ('[[principals]]\nname = "a"\nrole = "learn"', "neither token_sha256 nor"),
        (
            f'[[principals]]\nname = "a"\nrole = "learn"\ntoken_sha256 = ["{HASH.upper()}"]',
            "sha256",
        ),
        (
            f'[[principals]]\nname = "a"\nrole = "learn"\ntoken_sha256 = ["{HASH}", "{HASH}"]',
            "twice",
        ),
        ('[[principals]]\nname = "a"\nrole = "learn"\ntoken = "secret"', "principals[0].token"),
        (entry("learn", certificate="a.example"), "principals[0].certificates[0]"),
        (entry("learn", certificate="DNS:"), "principals[0].certificates[0]"),
        (entry("learn", quota="calls_per_second = 0"), "principals[0].quota.calls_per_second"),
        (entry("learn", quota="calls = 1"), "principals[0].quota.calls"),
        (entry("learn", quota="calls_per_second = inf"), "principals[0].quota.calls_per_second"),
        ("[[principals", "tokens.toml"),
    ],
)
def test_what_is_not_taken(tmp_path: Path, text: str, message: str) -> None:
    if not message:
        assert len(read(tmp_path, text).entries) == 2
        return
    with pytest.raises(InvalidInputError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "tokens.toml" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_certificates_that_nobody_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="--tls-client-ca"):
        read(tmp_path, entry("learn", certificate="CN:a"), certificates=False)


STEPS = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=60)


@given(st.floats(0.1, 100), STEPS)
def test_a_bucket_gives_no_more_than_its_rate(rate: float, steps: list[tuple[float, int]]) -> None:
    now = 0.0
    bucket = Bucket(rate, 1.0, lambda: now)
    taken = [0.0]
    for pause, units in steps:
        now += pause
        if not (delay := bucket.delay()):
            bucket.take(units)
            taken.append(units)
            # A second's worth, what came since, and what the last one may owe.
            assert sum(taken[:-1]) <= max(rate, 1.0) + rate * now + 1e-3
        else:
            # Who waits as told is let in.
            now += delay
            assert bucket.delay() == 0
            bucket.take(units)
            taken.append(units)


async def test_streams_wait_and_calls_are_refused() -> None:
    account = Account("a", Quota(bytes_per_second=200_000))
    loop = asyncio.get_running_loop()
    began = loop.time()
    account.call()
    await asyncio.gather(*(account.pace(50_000) for _ in range(8)))
    # All but a second's worth, and the one that may owe, had to come in.
    assert loop.time() - began >= 0.7
    with pytest.raises(QuotaExceededError) as caught:
        account.call()
    assert caught.value.retry_seconds is not None
    with pytest.raises(QuotaExceededError):
        account.take(1)
