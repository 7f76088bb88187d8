"""The shortest sound way to a version, between versions that were really learned."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from inflora_core import updates
from inflora_core.errors import DamagedError
from inflora_core.store import ONNX_FILE, Store
from inflora_edge import Delta, apply
from tests.edge.lineage import PARENTS


def sha256(store: Store, number: int) -> str:
    return hashlib.sha256(store.onnx(number)).hexdigest()


def merges(delta: Delta) -> int:
    return sum(piece[0] == "merge" for piece in delta.pieces)


@pytest.mark.parametrize("target", PARENTS)
@pytest.mark.parametrize("base", PARENTS)
def test_any_version_leads_to_any_other(
    store: Store, tmp_path: Path, base: int, target: int
) -> None:
    content = updates.between(store, base, target)
    assert content is not None
    path = tmp_path / "model.onnx"
    path.write_bytes(store.onnx(base))
    delta = apply(path, content, path)
    assert (delta.base.version, delta.target.version) == (base, target)
    assert path.read_bytes() == store.onnx(target)
    descends = base in store.ancestors(target)
    assert merges(delta) == (4 if descends else 0), "two layers, keys and values"
    assert updates.between(store, base, target) == content


@pytest.mark.parametrize(
    ("held", "target", "order"),
    [
        ((1, 2), 4, [2, 1]),  # the nearest ancestor first
        ((3, 2), 4, [2, 3]),  # what was rolled back last
        ((3, 4), 4, [4, 3]),  # nothing to do
        ((3,), 4, [3]),  # of another branch
        ((3, 4), 1, [4, 3]),  # backwards
        ((), 4, []),
    ],
)
def test_the_best_of_what_is_held_comes_first(
    store: Store, held: tuple[int, ...], target: int, order: list[int]
) -> None:
    foreign = hashlib.sha256(b"another model").hexdigest()
    hashes = [foreign, *(sha256(store, number) for number in held)]
    assert updates.bases(store, target, hashes) == order


def test_a_version_whose_file_is_damaged_leads_nowhere(store: Store) -> None:
    path = store.path(2, ONNX_FILE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"~")
    try:
        assert updates.between(store, 2, 4) is None
        with pytest.raises(DamagedError):
            updates.between(store, 1, 2)
    finally:
        path.write_bytes(whole)
