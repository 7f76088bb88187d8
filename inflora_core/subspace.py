"""The linear algebra of InfLoRA: pure functions on tensors, in whatever precision they are given.

Notation: C (d, d) is the second moment of a layer's inputs; G is what directions are
ranked by, ``C C`` ("code", the published implementation) or ``C`` ("paper", section 4.2); Q (d, d)
is orthonormal, its first k columns M are protected, the others F are free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inflora_core.config import Criterion, FirstTask


def gram(moment: Tensor, criterion: Criterion) -> Tensor:
    """Return G, (d, d), for the second moment C, (d, d).

    With "code", a direction's energy is its squared singular value in C, that is the fourth power
    of the one in the inputs themselves: the published thresholds only make sense with it.
    """
    return moment @ moment if criterion == "code" else moment


def principal_directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-decompose a symmetric positive semi-definite matrix (n, n), largest value first.

    Returns:
        Eigenvalues (n,), clipped at 0, and eigenvectors (n, n) as columns.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def design_reduction(
    moment: Tensor, basis: Tensor, protected: int, rank: int, criterion: Criterion
) -> Tensor:
    """Design B_t: the leading directions of the new task's inputs within the free space.

    Section 4.2 of the paper, equation 10: ``B = (F V_r)^T / sqrt(3)`` with V the leading
    eigenvectors of F^T G F. Rows come in descending order of eigenvalue: Adam works entry by entry,
    so rotating them within their span would change the result.

    Args:
        moment: C (d, d), symmetric positive semi-definite.
        basis: Q (d, d), orthonormal columns.
        protected: k, 0 to d.
        rank: Upper bound of r, at least 1.
        criterion: What G is.

    Returns:
        B (r, d) with B M = 0 and B B^T = I / 3. r is less than ``rank`` when fewer directions are
        free or in use: the published code fills up with protected directions there.
    """
    free = basis[:, protected:]
    ranking = gram(moment, criterion)
    values, vectors = principal_directions(free.mT @ ranking @ free)
    # Relative to all of G, not to what is free: when the inputs lie within M, the free block is
    # rounding noise, and noise must not be taken for directions.
    noise = len(ranking) * torch.finfo(ranking.dtype).eps * torch.linalg.matrix_norm(ranking)
    rank = min(rank, int((values > noise).sum()))
    return (free @ vectors[:, :rank]).mT / math.sqrt(3)


def extend_basis(
    moment: Tensor,
    basis: Tensor,
    protected: int,
    threshold: float,
    criterion: Criterion,
    first_task: FirstTask | None = None,
) -> tuple[Tensor, int]:
    """Move leading free directions into M until M holds ``threshold`` of the energy of G.

    DualGPM (paper, section 4.3 and appendix), without its two branches: Q holds both sides.

    Args:
        moment: C (d, d) of the task's inputs with its update in place.
        basis: Q (d, d).
        protected: k, 0 to d.
        threshold: eps_t. From 1 on, everything becomes protected.
        criterion: What G is.
        first_task: For the first task: "one-fewer" keeps one direction fewer than reaching the
            threshold takes, but at least one, as the published code does.

    Returns:
        The new Q (d, d), whose leading columns are the old M unchanged, and the new k.
    """
    free = basis[:, protected:]
    if threshold >= 1 or free.shape[1] == 0:
        return basis, basis.shape[1]
    kept = basis[:, :protected]
    ranking = gram(moment, criterion)
    values, vectors = principal_directions(free.mT @ ranking @ free)
    total = ranking.trace()
    if total <= 0:
        return basis, protected
    held = (kept.mT @ ranking @ kept).trace() / total
    shares = held + torch.cat([values.new_zeros(1), values.cumsum(0)]) / total
    added = min(int((shares < threshold).sum()), free.shape[1])
    if first_task == "one-fewer":
        added = max(added - 1, 1)
    return torch.cat([kept, free @ vectors], 1), protected + added


def orthonormalise(basis: Tensor) -> Tensor:
    """Return the orthonormal matrix (d, d) whose leading columns span those of ``basis``.

    For every number of leading columns; signs are kept. Takes away the rounding of float32.
    """
    q, r = torch.linalg.qr(basis)
    result: Tensor = q * r.diagonal().sign()
    return result


def leak(update: Tensor, basis: Tensor, protected: int) -> float:
    """Return norm(dW M) / norm(dW) for dW (rows, d): 0 by construction, 0 when dW is 0."""
    size = torch.linalg.matrix_norm(update)
    if size == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(update @ basis[:, :protected]) / size)


def interference(update: Tensor, old_moment: Tensor) -> float:
    """Return norm(dW C_old^(1/2)) / (norm(dW) lambda_max(C_old)^(1/2)), 0 to 1.

    How much the update moves what old tasks' inputs are mapped to, relative to the most an update
    of this size could. Not 0 by construction: M holds most of the energy, never all.

    Args:
        update: dW (rows, d).
        old_moment: C_old (d, d), of all older tasks' inputs.
    """
    size = torch.linalg.matrix_norm(update)
    # Symmetric: a norm by way of all singular values would cost ten times as much.
    largest = torch.linalg.eigvalsh(old_moment)[-1].clamp_min(0)
    if size == 0 or largest == 0:
        return 0.0
    # trace(dW C dW^T) = norm(dW C^(1/2))^2, without the root of a matrix.
    moved = ((update @ old_moment) * update).sum().clamp_min(0)
    return float((moved / largest).sqrt() / size)


def threshold_at(
    task: int, first: float, last: float, limit: float, expected_tasks: int | None
) -> float:
    """Return eps_t, the share of energy that is protected after task t (0-based).

    With ``expected_tasks`` T it is the published ``first + (last - first) t / T``. Without, it
    rises towards ``limit`` the slower the nearer it comes, half of the way at t = 10. It never
    exceeds ``limit`` < 1, also when more tasks come than were expected: at 1 nothing would be left
    for later tasks to learn with.
    """
    if expected_tasks is not None:
        return min(limit, first + (last - first) * task / expected_tasks)
    ceiling = min(limit, last)
    return first + (ceiling - first) * task / (task + 10)
