"""Laws of the linear algebra over generated shapes, ranks and spectra, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from inflora_core import subspace
from inflora_core.adapters import adapted
from inflora_core.config import Criterion
from inflora_core.memory import GradientMemory
from inflora_core.merge import merge, product
from inflora_core.model import Factors, LayerState
from inflora_core.moments import SecondMoment

CRITERIA = st.sampled_from(["code", "paper"])


def orthonormal(d: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


@st.composite
def moments(draw: st.DrawFn, d: int) -> Tensor:
    """A second moment (d, d): spectra flat, decaying over many decades, or of low rank."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, d))
    decades = draw(st.floats(0, 6))
    scale = draw(st.floats(1e-4, 1e4))
    values = scale * torch.logspace(0, -decades, rank, dtype=torch.float64)
    vectors = orthonormal(d, generator)[:, :rank]
    return (vectors * values) @ vectors.mT


@st.composite
def memories(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A second moment (d, d), Q (d, d) and k, with k from 0 to d."""
    d = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return draw(moments(d)), orthonormal(d, generator), draw(st.integers(0, d))


def empty_memory(d: int) -> GradientMemory:
    eye = torch.eye(d, dtype=torch.float64)
    return GradientMemory(eye, 0, torch.zeros_like(eye), 0)


def moment_of(matrix: Tensor, tokens: int = 10) -> SecondMoment:
    return SecondMoment(matrix * tokens, tokens)


@given(memories(), st.integers(1, 12), CRITERIA)
def test_a_reduction_is_free_of_the_memory_and_orthogonal(
    memory: tuple[Tensor, Tensor, int], rank: int, criterion: Criterion
) -> None:
    moment, basis, protected = memory
    reduction = subspace.design_reduction(moment, basis, protected, rank, criterion)
    r = len(reduction)
    assert r <= min(rank, len(basis) - protected)
    assert (reduction @ basis[:, :protected]).abs().sum() < 1e-11
    expected = torch.eye(r, dtype=torch.float64) / 3
    assert torch.allclose(reduction @ reduction.mT, expected, atol=1e-12)


@given(memories(), st.integers(1, 12), CRITERIA)
def test_a_reduction_takes_the_leading_energy_in_descending_order(
    memory: tuple[Tensor, Tensor, int], rank: int, criterion: Criterion
) -> None:
    moment, basis, protected = memory
    reduction = subspace.design_reduction(moment, basis, protected, rank, criterion)
    ranking = subspace.gram(moment, criterion)
    energies = 3 * torch.einsum("rd,de,re->r", reduction, ranking, reduction)
    free = basis[:, protected:]
    best = subspace.principal_directions(free.mT @ ranking @ free)[0][: len(reduction)]
    assert torch.allclose(energies, best, rtol=1e-6, atol=1e-9 * float(ranking.norm()))


def test_nothing_free_gives_a_reduction_of_rank_0() -> None:
    moment = torch.eye(5, dtype=torch.float64)
    assert subspace.design_reduction(moment, moment, 5, 3, "code").shape == (0, 5)


@given(st.integers(2, 20), st.data())
def test_inputs_within_the_memory_leave_nothing_to_design(d: int, data: st.DataObject) -> None:
    # The published code fills up with protected directions here: its leak is 1.
    basis = orthonormal(d, torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    protected = data.draw(st.integers(1, d - 1))
    moment = basis[:, :protected] @ basis[:, :protected].mT
    assert len(subspace.design_reduction(moment, basis, protected, 10, "code")) == 0


@given(memories(), st.floats(0.01, 0.9999), CRITERIA)
def test_extending_keeps_the_old_memory_and_reaches_the_threshold_with_the_fewest(
    memory: tuple[Tensor, Tensor, int], threshold: float, criterion: Criterion
) -> None:
    moment, basis, protected = memory
    after, grown = subspace.extend_basis(moment, basis, protected, threshold, criterion)
    assert protected <= grown <= len(basis)
    assert torch.equal(after[:, :protected], basis[:, :protected])
    assert torch.allclose(after.mT @ after, torch.eye(len(basis), dtype=torch.float64), atol=1e-12)
    ranking = subspace.gram(moment, criterion)

    def share(k: int) -> float:
        return float((after[:, :k].mT @ ranking @ after[:, :k]).trace() / ranking.trace())

    assert share(grown) >= threshold - 1e-9
    if grown > protected:
        assert share(grown - 1) < threshold + 1e-9


@given(memories())
def test_a_threshold_of_1_protects_everything(memory: tuple[Tensor, Tensor, int]) -> None:
    moment, basis, protected = memory
    assert subspace.extend_basis(moment, basis, protected, 1.0, "code")[1] == len(basis)


@given(st.integers(1, 16), st.data())
def test_the_published_first_task_keeps_one_direction_fewer_but_at_least_one(
    d: int, data: st.DataObject
) -> None:
    moment, eye = data.draw(moments(d)), torch.eye(d, dtype=torch.float64)
    threshold = data.draw(st.floats(0.1, 0.99))
    full = subspace.extend_basis(moment, eye, 0, threshold, "code", "reach")[1]
    fewer = subspace.extend_basis(moment, eye, 0, threshold, "code", "one-fewer")[1]
    assert fewer == max(full - 1, 1)


@pytest.mark.parametrize("d", [6, 32])
@pytest.mark.parametrize("criterion", ["code", "paper"])
def test_a_hundred_tasks_stay_orthonormal_leak_nothing_and_leave_room(
    d: int, criterion: Criterion
) -> None:
    generator = torch.Generator().manual_seed(d)
    memory, key_value = empty_memory(d), np.zeros((2 * d, d), np.float32)
    ranks = []
    for task in range(100):
        spectrum = torch.logspace(0, -4, d, dtype=torch.float64)
        vectors = orthonormal(d, generator)
        moment = (vectors * spectrum) @ vectors.mT
        reduction = memory.design(moment, 4, criterion)
        ranks.append(len(reduction))
        expansion = torch.randn(2 * d, len(reduction), generator=generator)
        factors = Factors(expansion.numpy(), reduction.float().numpy())
        key_value = merge(key_value, factors)
        update = torch.from_numpy(product(factors))
        assert subspace.leak(update, memory.basis, memory.protected) < 1e-6
        threshold = subspace.threshold_at(task, 0.95, 1.0, 0.9999, None)
        grown = memory.extend(moment_of(moment), threshold, criterion, "reach")
        assert grown.protected >= memory.protected
        # A restart between any two tasks: the state is stored in float32.
        memory = GradientMemory.of(grown.state(key_value), torch.device("cpu"))
        deviation = memory.basis.mT @ memory.basis - torch.eye(d, dtype=torch.float64)
        assert deviation.abs().max() < 1e-12
    assert np.isfinite(key_value).all()
    assert ranks[0] == min(4, d)
    assert memory.tokens == 1000


def test_with_nothing_free_the_memory_stays_as_it_is() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    memory = GradientMemory(eye, 4, eye, 10)
    grown = memory.extend(moment_of(eye), 0.9, "code", "reach")
    assert grown.protected == 4
    assert grown.free == 0


@given(st.integers(0, 500), st.floats(0.5, 0.99), st.one_of(st.none(), st.integers(1, 20)))
def test_the_threshold_rises_but_never_protects_everything(
    task: int, first: float, expected: int | None
) -> None:
    now, later = (subspace.threshold_at(t, first, 1.0, 0.9999, expected) for t in (task, task + 1))
    assert first <= now <= later <= 0.9999 < 1


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_leak_and_interference_are_shares(rows: int, d: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    update = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    basis, k = orthonormal(d, generator), data.draw(st.integers(0, d))
    assert 0 <= subspace.leak(update, basis, k) <= 1 + 1e-12
    assert subspace.leak(update, basis, d) == pytest.approx(1)
    moment = data.draw(moments(d))
    measured = subspace.interference(update, moment)
    values, vectors = subspace.principal_directions(moment)
    root = (vectors * values.sqrt()) @ vectors.mT
    expected = (update @ root).norm() / (update.norm() * values[0].sqrt())
    assert measured == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
    assert subspace.leak(torch.zeros(rows, d), torch.eye(d), k) == 0
    assert subspace.interference(torch.zeros(rows, d), moment.float()) == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 12), st.data())
def test_a_moment_does_not_depend_on_how_the_inputs_are_cut(
    chunks: list[int], d: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows = torch.randn(sum(chunks), d, generator=generator, dtype=torch.float64)
    whole, cut = SecondMoment(), SecondMoment()
    whole.add(rows)
    for piece in rows.split(chunks):
        cut.add(piece[None])
    assert cut.tokens == whole.tokens == len(rows)
    assert torch.allclose(cut.mean, whole.mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(whole.mean, rows.mT @ rows / len(rows))


class Attention(nn.Module):
    """The least that an adapter needs: a module with a fused qkv."""

    def __init__(self, d: int, a: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, 3 * a, dtype=torch.float64).requires_grad_(False)


@given(st.integers(1, 10), st.integers(1, 6), st.integers(0, 2**31), st.floats(1e-3, 1.0))
def test_one_sgd_step_moves_the_weight_by_the_projected_gradient(
    d: int, a: int, seed: int, rate: float
) -> None:
    """Proposition 1 of the paper: dW = -(lr / 3) grad(W) P, P the projector onto span(B)."""
    generator = torch.Generator().manual_seed(seed)
    layer = Attention(d, a)
    x = torch.randn(7, d, generator=generator, dtype=torch.float64)
    direction = torch.randn(7, 3 * a, generator=generator, dtype=torch.float64)
    rank = 1 + seed % d
    reduction = orthonormal(d, generator)[:rank] / math.sqrt(3)

    with adapted({"0": layer}, {"0": reduction}) as branches:
        branch = branches["0"]
        (torch.tanh(layer.qkv(x)) * direction).sum().backward()
        update = -rate * branch.expansion.grad @ reduction

    weight = layer.qkv.weight.clone().requires_grad_()
    bias = layer.qkv.bias
    (torch.tanh(nn.functional.linear(x, weight, bias)) * direction).sum().backward()
    expected = -rate * weight.grad[a:] @ (reduction.mT @ reduction)
    assert torch.allclose(update, expected, atol=1e-12)


@given(st.integers(2, 10), st.integers(1, 6), st.integers(0, 2**31))
def test_merged_equals_unmerged_and_protected_inputs_see_no_update(
    d: int, a: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = Attention(d, a)
    basis, k = orthonormal(d, generator), seed % d
    moment = torch.eye(d, dtype=torch.float64)
    reduction = subspace.design_reduction(moment, basis, k, 3, "code")
    x = torch.randn(5, d, generator=generator, dtype=torch.float64)
    protected = torch.randn(5, k, generator=generator, dtype=torch.float64) @ basis[:, :k].mT
    frozen = layer.qkv

    with adapted({"0": layer}, {"0": reduction}) as branches:
        branch = branches["0"]
        branch.expansion.data.normal_(generator=generator)
        unmerged, unmoved = layer.qkv(x), layer.qkv(protected)
        update = branch.expansion.detach() @ branch.reduction
    assert layer.qkv is frozen
    assert torch.allclose(unmoved, frozen(protected), atol=1e-10)
    frozen.weight[a:] += update
    assert torch.allclose(frozen(x), unmerged, atol=1e-10)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6), st.integers(0, 2**31))
def test_merging_has_the_bits_of_exact_products_added_in_order(
    rows: int, d: int, rank: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(rows, d)).astype(np.float32)
    factors = Factors(
        generator.normal(size=(rows, rank)).astype(np.float32),
        generator.normal(size=(rank, d)).astype(np.float32),
    )
    merged = merge(weight, factors)
    for i in range(rows):
        for j in range(d):
            total = float(weight[i, j])
            for k in range(rank):
                total += float(factors.expansion[i, k]) * float(factors.reduction[k, j])
            assert merged[i, j] == np.float32(total)


@given(memories())
def test_storing_a_memory_in_float32_keeps_what_is_protected(
    memory: tuple[Tensor, Tensor, int],
) -> None:
    moment, basis, protected = memory
    stored = GradientMemory(basis, protected, moment, 3).state(np.zeros((2, len(basis))))
    assert isinstance(stored, LayerState)
    read = GradientMemory.of(stored, torch.device("cpu"))
    before = basis[:, :protected] @ basis[:, :protected].mT
    kept = read.basis[:, : read.protected]
    assert torch.allclose(kept @ kept.mT, before, atol=1e-5)
    assert read.protected == protected


@given(moments(4), moments(4), st.integers(1, 9), st.integers(1, 9))
def test_the_memory_keeps_the_mean_over_all_tokens(
    first: Tensor, second: Tensor, n: int, m: int
) -> None:
    memory = empty_memory(4)
    for moment, tokens in ((first, n), (second, m)):
        memory = memory.extend(moment_of(moment, tokens), 0.9, "code", "reach")
    assert memory.tokens == n + m
    assert torch.allclose(memory.moment, (n * first + m * second) / (n + m))
