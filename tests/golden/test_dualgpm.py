"""The memory update alone against the published code, and against exact float64 answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from inflora_core import subspace
from inflora_core.config import FirstTask

SEQUENCES = ["lamb95", "lamb99"]
CASES = [*SEQUENCES, "bug_first_gt_half", "bug_first_eq_half", "bug_exhausted", "bug_eps_one"]


def inputs(golden: Mapping[str, Any], case: str) -> np.ndarray:
    matrices: np.ndarray = golden[f"{case}/C" if f"{case}/C" in golden else "seq/C"]
    return matrices[: len(golden[f"{case}/epsilon"])]


def replay(
    golden: Mapping[str, Any], case: str, first_task: FirstTask
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield Q and k after each matrix of ``case``."""
    basis, protected = torch.eye(24, dtype=torch.float64), 0
    for step, matrix in enumerate(inputs(golden, case)):
        basis, protected = subspace.extend_basis(
            torch.from_numpy(matrix).double(),
            basis,
            protected,
            float(golden[f"{case}/epsilon"][step]),
            "code",
            first_task if step == 0 else None,
        )
        yield basis, protected


def projector(basis: torch.Tensor, protected: int) -> np.ndarray:
    memory = basis[:, :protected].numpy()
    return memory @ memory.T


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "first_task"), [("exact", "one-fewer"), ("minimal", "reach")])
def test_against_exact(
    dualgpm: Mapping[str, Any], case: str, name: str, first_task: FirstTask
) -> None:
    for step, (basis, protected) in enumerate(replay(dualgpm, case, first_task)):
        assert protected == dualgpm[f"{case}/{name}_protected_dim"][step]
        distance = projector(basis, protected) - dualgpm[f"{case}/{name}_P"][step]
        assert np.linalg.norm(distance, 2) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_against_the_published_code_where_it_is_right(
    dualgpm: Mapping[str, Any], case: str
) -> None:
    compared = 0
    for step, (basis, protected) in enumerate(replay(dualgpm, case, "one-fewer")):
        if step >= len(dualgpm[f"{case}/valid"]) or not dualgpm[f"{case}/valid"][step]:
            continue
        official = dualgpm[f"{case}/basis{step:02d}"].astype(np.float64)
        memory = official @ official.T
        if dualgpm[f"{case}/kind"][step] == "retain":
            memory = np.eye(24) - memory
        assert np.linalg.norm(projector(basis, protected) - memory, 2) < 1e-5
        compared += 1
    assert compared == int(dualgpm[f"{case}/valid"].sum())


@pytest.mark.parametrize("case", SEQUENCES)
def test_the_published_code_is_right_throughout_the_sequences(
    dualgpm: Mapping[str, Any], case: str
) -> None:
    assert dualgpm[f"{case}/valid"].all()


def test_designs_stay_out_of_the_memory_where_the_published_ones_leak(
    dualgpm: Mapping[str, Any],
) -> None:
    rows = dualgpm["bug_exhausted/design_rows"]
    ranks = []
    for step, (basis, protected) in enumerate(replay(dualgpm, "bug_exhausted", "one-fewer")):
        if step == len(rows):
            break
        moment = torch.from_numpy(inputs(dualgpm, "bug_exhausted")[step + 1]).double()
        reduction = subspace.design_reduction(moment, basis, protected, 4, "code")
        ranks.append(len(reduction))
        if len(reduction):
            assert (reduction @ basis[:, :protected]).abs().max() < 1e-12
        ours = reduction.numpy() * np.sqrt(3)
        cosines = np.abs((ours * rows[step][: len(ours)]).sum(1))
        assert np.all(cosines > 1 - 1e-4)
    assert ranks == [4, 4, 4, 4, 3, 1, 0]
