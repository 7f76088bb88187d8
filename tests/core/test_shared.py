"""Shared stores: one conformance suite for every place where they may lie."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from inflora_core import shared as shared_module
from inflora_core.errors import (
    DamagedError,
    FencedError,
    InvalidInputError,
    NotFoundError,
    StoreFormatError,
    UnavailableError,
)
from inflora_core.shared import Index, IndexedVersion, Root, SharedStore, dump_index
from tests.core.object_store import s3, s3_endpoint, s3_environment, url

__all__ = ["s3", "url"]

ROOT = Root("a" * 32, "here", 1, 0, None, "0" * 64, datetime(2026, 11, 26, tzinfo=UTC))


@pytest.fixture
def shared(url: str) -> SharedStore:
    return SharedStore.open(url)


# --- The root -----------------------------------------------------------------------------------


def test_a_root_is_read_as_it_was_written(shared: SharedStore):
    assert shared.root() is None
    first = shared.move(ROOT, None)
    assert first.root == ROOT
    assert shared.root() == first
    later = replace(ROOT, serial=1, current=7)
    second = shared.move(later, first)
    assert shared.root() == second
    assert second.root == later


def test_who_has_not_read_the_last_root_moves_none(shared: SharedStore):
    first = shared.move(ROOT, None)
    other = replace(ROOT, writer="b" * 32, host="there")
    with pytest.raises(FencedError, match=r"learner a{32} on here"):
        shared.move(other, None)
    second = shared.move(replace(other, serial=1), first)
    with pytest.raises(
        FencedError, match=r"learner b{32} on there, who published last at 2026-11-26"
    ):
        shared.move(replace(ROOT, serial=1), first)
    assert shared.root() == second


def test_of_many_at_a_time_one_moves_it(shared: SharedStore):
    first = shared.move(ROOT, None)
    together = threading.Barrier(6)

    def move(number: int) -> int | None:
        together.wait(30)
        try:
            shared.move(replace(ROOT, serial=1, current=number), first)
        except FencedError:
            return None
        return number

    with ThreadPoolExecutor(6) as pool:
        won = [number for number in pool.map(move, range(1, 7)) if number is not None]
    seen = shared.root()
    assert seen is not None
    assert won == [seen.root.current]


def test_a_move_whose_answer_was_lost_has_happened(shared: SharedStore):
    """A client that is not answered asks again, and is refused for what it has done itself."""
    first = shared.move(ROOT, None)
    wanted = replace(ROOT, serial=1)
    second = shared.move(wanted, first)
    assert shared.move(wanted, first) == second


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda text: text.replace('"serial": 0', '"serial": 1'), DamagedError),
        (lambda text: text[:-20], DamagedError),
        (lambda text: "[]", DamagedError),
        (lambda text: "", DamagedError),
        (lambda text: text.replace('"format": 1', '"format": 2'), StoreFormatError),
    ],
)
def test_a_spoilt_root_is_told(tmp_path: Path, spoil: Callable[[str], str], error: type[Exception]):
    shared = SharedStore.open(tmp_path.as_uri())
    shared.move(ROOT, None)
    path = tmp_path / "CURRENT"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(error):
        shared.root()


def test_a_root_says_what_it_says_in_plain_words(tmp_path: Path):
    SharedStore.open(tmp_path.as_uri()).move(ROOT, None)
    said = json.loads((tmp_path / "CURRENT").read_text())
    assert said["host"] == "here"
    assert said["format"] == 1


# --- Objects ------------------------------------------------------------------------------------


def test_files_come_back(shared: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_module, "_PIECE_BYTES", 1000)
    contents = [bytes(range(256)) * count for count in (1, 4, 40)] + [b"x" * 1000, b"y" * 2000]
    names = [shared.put(content) for content in contents]
    assert names == [hashlib.sha256(content).hexdigest() for content in contents]
    path = tmp_path / "file"
    path.write_bytes(b"from a path" * 300)
    names.append(shared.put(path, hashlib.sha256(path.read_bytes()).hexdigest()))
    assert shared.put(path) == names[-1]
    contents.append(path.read_bytes())
    assert [shared.get(name) for name in names] == contents
    assert shared.names() == set(names)
    for name, content in zip(names, contents, strict=True):
        shared.fetch(name, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == content
    shared.delete([names[0], "f" * 64, names[1]])
    assert shared.names() == set(names[2:])


def test_what_is_not_there_is_not_found(shared: SharedStore, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(NotFoundError, match="f" * 64):
        shared.get("f" * 64)
    with pytest.raises(NotFoundError):
        shared.fetch("f" * 64, path)
    with pytest.raises(NotFoundError):
        shared.index(replace(ROOT, index="f" * 64))
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["file"]
    assert path.read_bytes() == b"before"


def test_what_is_not_what_its_name_says_is_not_taken(tmp_path: Path):
    shared = SharedStore.open((tmp_path / "shared").as_uri())
    name = shared.put(b"sound")
    (tmp_path / "shared" / "objects" / name).write_bytes(b"spoilt")
    with pytest.raises(DamagedError, match=name):
        shared.get(name)
    with pytest.raises(DamagedError, match=name):
        shared.fetch(name, tmp_path / "fetched")
    assert [each.name for each in tmp_path.iterdir()] == ["shared"]


def test_an_index_names_all_that_it_needs(shared: SharedStore):
    index = Index(
        "backbone",
        {"template.onnx": "1", "manifest.json": "2"},
        forgotten="3",
        versions={
            1: IndexedVersion("4", {"model.onnx": "5"}, pinned=True),
            12: IndexedVersion("6", {}),
        },
    )
    assert index.objects() == set("123456")
    assert Index().objects() == set()
    assert shared.index(replace(ROOT, index=shared.put(dump_index(index)))) == index
    with pytest.raises(DamagedError, match="index"):
        shared.index(replace(ROOT, index=shared.put(b"{")))


# --- Where it may be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["", "models", "/models", "http://host/x", "file:relative", "file://host/x", "file:///"]
)
def test_what_is_no_url_of_a_shared_store(url: str):
    with pytest.raises(InvalidInputError) as caught:
        SharedStore.open(url)
    assert caught.value.field == "shared"


def test_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with s3_endpoint() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        shared = SharedStore.open("s3://nobody-made-it/models")
        with pytest.raises(UnavailableError, match="s3://nobody-made-it/models"):
            shared.move(ROOT, None)
    with pytest.raises(UnavailableError, match="s3://nobody-made-it/models"):
        shared.root()
    with pytest.raises(UnavailableError):
        shared.fetch("f" * 64, tmp_path / "fetched")
