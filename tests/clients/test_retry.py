"""When the client gives up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from inflora_client import Failure, RetryPolicy, UnavailableError
from inflora_client._resume import Backoff

ERROR = UnavailableError(Failure("UNAVAILABLE", "stopping"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Seconds that pass between two looks at the clock."""
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))


def test_pauses_grow_up_to_a_limit() -> None:
    backoff = Backoff(RetryPolicy(initial_backoff=1, multiplier=3, max_backoff=5))
    pauses = [backoff.delay_after(ERROR) for _ in range(4)]
    assert pauses == [pytest.approx(p, rel=0.2) for p in (1, 3, 5, 5)]
    with pytest.raises(UnavailableError):
        backoff.delay_after(ERROR)


def test_a_server_that_was_heard_gets_more_patience(clock: Any) -> None:
    backoff = Backoff(RetryPolicy(max_attempts=1, patience=3.0))
    backoff.heard()
    assert backoff.delay_after(ERROR) < backoff.delay_after(ERROR)
    with pytest.raises(UnavailableError):
        backoff.delay_after(ERROR)
    backoff.heard()
    backoff.delay_after(ERROR)


def test_patience_lasts_for_any_number_of_attempts() -> None:
    backoff = Backoff(RetryPolicy(patience=1e9))
    backoff.heard()
    assert max(backoff.delay_after(ERROR) for _ in range(5000)) <= 5.0 * 1.2


@pytest.mark.parametrize(
    "values",
    [
        {"max_attempts": 0},
        {"max_attempts": 6},
        {"initial_backoff": 0.001},
        {"max_backoff": float("nan")},
        {"multiplier": 0.5},
        {"patience": -1.0},
    ],
)
def test_refuses_what_grpc_does_not_do(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**values)
