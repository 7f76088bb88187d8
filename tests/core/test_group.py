"""Several processes learn what one does."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inflora_core.backbone import create_backbone
from inflora_core.compute import Compute
from inflora_core.group import Group
from tests.core import group_member, tiny
from tests.core.torchrun import torchrun


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_are_disjoint_complete_and_even(size: int, count: int) -> None:
    shares = [range(count)[Group(rank, size).share(count)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_has_to_be_told() -> None:
    group, rows = Group(), torch.arange(6.0).view(3, 2)
    before = rows.clone()
    group.sum(rows)
    assert torch.equal(rows, before)
    assert group.joined(rows, 3) is rows
    assert group.told(rows) is rows
    assert group.leads


@pytest.mark.parametrize("size", [2, 3])
def test_processes_learn_what_one_does(size: int, tmp_path: Path) -> None:
    """Uneven batches and tasks with fewer images than processes included."""
    backbone = create_backbone(str(tiny.write_backbone(tmp_path)))
    torchrun(size, "tests.core.group_member", str(tmp_path))
    together = pickle.loads((tmp_path / "learned.pickle").read_bytes())
    for alone, model in zip(group_member.learn(backbone, Compute()), together, strict=True):
        for name, layer in alone.model.layers.items():
            other = model.layers[name]
            np.testing.assert_allclose(other.key_value, layer.key_value, atol=1e-4)
            np.testing.assert_allclose(other.moment, layer.moment, atol=1e-4)
            assert (other.protected, other.tokens) == (layer.protected, layer.tokens)
            kept, also = (x.basis[:, : x.protected] for x in (layer, other))
            np.testing.assert_allclose(kept @ kept.T, also @ also.T, atol=1e-3)
        for mine, theirs in (
            (alone.model.class_means, model.class_means),
            (alone.model.head_bias, model.head_bias),
            (alone.model.head_weight, model.head_weight),
        ):
            np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-3)
