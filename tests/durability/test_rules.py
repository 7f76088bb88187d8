"""A slice of ``rules``: one short history, always the same."""

from __future__ import annotations

from tests.durability.rules import history

STEPS = 50


def test_a_server_is_as_expected_after_every_step() -> None:
    assert history(8, STEPS).total() == STEPS - 1  # the first is the start
