"""A few of the hostile inputs and of the flipped bytes, through the same code as thousands of them.

On a store whose embedding is an image's mean colour: it is made in no time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.durability import flips, inputs, scene
from tests.service import test_doctor

EACH = 15
"""Inputs of each kind."""
FLIPS = 20


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a past."""
    with pytest.MonkeyPatch.context() as patch:
        scene.give_roots_to_workers(patch.setenv)
        return asyncio.run(test_doctor.lead_a_life(tmp_path_factory.mktemp("slices")))


@pytest.fixture(autouse=True)
def roots(monkeypatch: pytest.MonkeyPatch) -> None:
    scene.give_roots_to_workers(monkeypatch.setenv)


def test_hostile_inputs(template: Path, tmp_path: Path) -> None:
    wanted = dict.fromkeys(inputs.KINDS, EACH)
    state = inputs.Run(tmp_path, wanted, template, chunk=2 * EACH).go()
    assert (state.crashes, state.hangs, state.leaks) == ([], [], [])
    assert state.summary()["by_kind"] == wanted
    assert inputs.State.load(tmp_path / "state.json") == state


def test_flipped_bytes(template: Path, tmp_path: Path) -> None:
    state = flips.Run(tmp_path, template, processes=False).go(FLIPS)
    assert state.missed == []
    assert state.summary()["flips"] == FLIPS
    assert flips.State.load(tmp_path / "state.json") == state


def test_a_missed_flip_would_be_seen(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked for can be found: with a store that takes every file for sound."""
    monkeypatch.setattr(flips.Store, "damage", lambda store, version: iter(()))
    state = flips.Run(tmp_path, template, processes=False).go(len(flips.FILES))
    assert state.missed
