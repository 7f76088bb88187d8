"""What goes into a spool comes out again, or damage is noticed."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inflora_core.errors import DamagedError
from inflora_core.spool import (
    IMAGES,
    INDEX,
    ORIGIN,
    STEP_BYTES,
    SpoolSummary,
    SpoolWriter,
    read_labels,
    read_origin,
    read_spool,
    recover,
)

Examples = list[tuple[bytes, str]]

LABELS = st.text(st.characters(codec="utf-8"), max_size=12)
EXAMPLES: st.SearchStrategy[Examples] = st.lists(
    st.tuples(st.binary(max_size=60), st.one_of(st.sampled_from("ab"), LABELS)), max_size=12
)
SOME: Examples = [(b"first image", "cat"), (b"", "Käfer 🪲"), (b"third", "cat"), (b"4", "dog")]


def write(folder: Path, examples: Examples) -> SpoolSummary:
    with SpoolWriter(folder) as spool:
        for image, label in examples:
            spool.add(image, label)
        return spool.finish()


@settings(max_examples=50, deadline=None)  # each waits for the disk
@given(EXAMPLES)
def test_what_goes_in_comes_out_in_order(examples: Examples) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "not" / "there yet"
        summary = write(folder, examples)
        assert list(read_spool(folder)) == examples
    counts = Counter(label for _, label in examples)
    assert summary.labels == tuple(dict.fromkeys(label for _, label in examples))
    assert dict(zip(summary.labels, summary.counts, strict=True)) == counts
    assert summary.size == sum(len(image) for image, _ in examples)


@pytest.mark.parametrize("label", ["a\nb", "\r", "\x85", "\u2028", '"', "\\", "\0", "😀", "\x1c"])
def test_a_label_may_hold_any_character(tmp_path: Path, label: str) -> None:
    write(tmp_path / "spool", [(b"x", label), (b"y", "b")])
    assert [found for _, found in read_spool(tmp_path / "spool")] == [label, "b"]


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, EXAMPLES)
def test_the_content_hash_tells_uploads_apart(left: Examples, right: Examples) -> None:
    with tempfile.TemporaryDirectory() as name:
        first = write(Path(name) / "1", left)
        assert write(Path(name) / "2", left) == first
        assert (write(Path(name) / "3", right).sha256 == first.sha256) == (left == right)


@settings(max_examples=30, deadline=None)
@given(EXAMPLES, st.randoms(use_true_random=False))
def test_the_content_hash_depends_on_the_order(examples: Examples, random: object) -> None:
    shuffled = list(examples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assume(shuffled != examples)
    with tempfile.TemporaryDirectory() as name:
        first = write(Path(name) / "1", examples)
        assert write(Path(name) / "2", shuffled).sha256 != first.sha256


def test_the_content_hash_depends_on_where_an_image_ends(tmp_path: Path) -> None:
    uploads: list[Examples] = [
        [(b"ab", "x"), (b"c", "x")],
        [(b"a", "x"), (b"bc", "x")],
        [(b"abc", "x")],
        [(b"ab", "x"), (b"c", "x"), (b"", "x")],
        [(b"ab", "xx"), (b"c", "x")],
    ]
    hashes = {write(tmp_path / str(i), upload).sha256 for i, upload in enumerate(uploads)}
    assert len(hashes) == len(uploads)


# -- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spool of ``SOME``."""
    folder = tmp_path_factory.mktemp("intact") / "spool"
    write(folder, SOME)
    return folder


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["images.bin", "examples.jsonl"]),
    position=st.integers(0, 2**16),
    mask=st.integers(1, 255),
)
def test_a_flipped_byte_is_found(intact: Path, name: str, position: int, mask: int) -> None:
    """Or it makes no difference: white space between JSON's tokens, and ``offset``."""

    def flip(content: bytearray) -> None:
        content[position % len(content)] ^= mask

    assert noticed(intact, name, flip) or name == "examples.jsonl"


@pytest.mark.parametrize("name", ["images.bin", "examples.jsonl"])
def test_a_file_cut_short_anywhere_is_found(intact: Path, name: str) -> None:
    lengths = range((intact / name).stat().st_size - 1)  # the last newline tells nothing
    for length in lengths[:: 1 if name == "images.bin" else 7]:

        def cut(content: bytearray, length: int = length) -> None:
            del content[length:]

        assert noticed(intact, name, cut)


def test_bytes_too_many_are_found(intact: Path) -> None:
    assert noticed(intact, "images.bin", lambda content: content.extend(b"0"))
    assert noticed(intact, "examples.jsonl", lambda content: content.extend(b"0"))


def test_lines_that_are_lost_or_repeated_are_found(intact: Path) -> None:
    def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytearray], None]:
        def apply(content: bytearray) -> None:
            content[:] = b"".join(change(bytes(content).splitlines(keepends=True)))

        return apply

    assert noticed(intact, "examples.jsonl", lines(lambda rows: [*rows[:1], *rows]))
    assert noticed(intact, "examples.jsonl", lines(lambda rows: [*rows, rows[0]]))
    for index in range(len(SOME) + 1):

        def without(rows: list[bytes], index: int = index) -> list[bytes]:
            return rows[:index] + rows[index + 1 :]

        assert noticed(intact, "examples.jsonl", lines(without))


def noticed(intact: Path, name: str, change: Callable[[bytearray], object]) -> bool:
    """Whether a changed file is refused; if not, it must hold the same examples."""
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(intact, Path(root) / "spool")
        content = bytearray((folder / name).read_bytes())
        change(content)
        (folder / name).write_bytes(content)
        try:
            found = list(read_spool(folder))
        except DamagedError:
            return True
    assert found == SOME
    return False


@pytest.mark.parametrize("name", ["images.bin", "examples.jsonl"])
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    write(tmp_path / "spool", SOME)
    (tmp_path / "spool" / name).unlink()
    with pytest.raises(DamagedError, match=name):
        list(read_spool(tmp_path / "spool"))


def test_a_spool_that_is_not_there_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="nowhere"):
        list(read_spool(tmp_path / "nowhere"))


# -- leaving nothing ----------------------------------------------------------------------------


def test_an_aborted_writer_leaves_nothing(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "spool") as spool:
        spool.add(b"image", "cat")
        assert (spool.state.count, spool.state.size) == (1, 5)
    assert not list(tmp_path.iterdir())


def test_an_error_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def upload() -> None:
        with SpoolWriter(tmp_path / "spool") as spool:
            spool.add(b"image" * 100_000, "cat")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        upload()
    assert not list(tmp_path.iterdir())


def test_a_finished_spool_stays_whatever_comes_after(tmp_path: Path) -> None:
    def upload() -> None:
        with SpoolWriter(tmp_path / "spool") as spool:
            spool.add(b"image", "cat")
            spool.finish()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        upload()
    assert list(read_spool(tmp_path / "spool")) == [(b"image", "cat")]


def test_an_unfinished_spool_cannot_be_read(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "spool") as spool:
        spool.add(b"image", "cat")
        with pytest.raises(DamagedError):
            list(read_spool(tmp_path / "spool"))


def test_a_spool_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "spool", SOME)
    with pytest.raises(FileExistsError):
        SpoolWriter(tmp_path / "spool")
    assert list(read_spool(tmp_path / "spool")) == SOME


# -- going on after a break ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    EXAMPLES,
    st.sets(st.integers(0, 12)),
    st.booleans(),
    st.floats(0, 1),
    st.floats(0, 1),
    st.binary(max_size=30),
)
def test_what_a_power_cut_leaves_is_continued(
    examples: Examples,
    flushes: set[int],
    sealed: bool,
    images_kept: float,
    index_kept: float,
    garbage: bytes,
) -> None:
    """Of what was not flushed, any part can be there, and anything in place of the index's end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "spool"
        with SpoolWriter(folder, {"request": "r"}) as spool:
            sizes = [(folder / file).stat().st_size for file in (IMAGES, INDEX)]
            for number, (image, label) in enumerate(examples):
                spool.add(image, label)
                if number in flushes:
                    spool.flush()
                    sizes = [(folder / file).stat().st_size for file in (IMAGES, INDEX)]
            durable_count = spool.durable_count
            if sealed:
                spool.finish()
            spool.suspend()
        for file, durable, kept in zip(
            (IMAGES, INDEX), sizes, (images_kept, index_kept), strict=True
        ):
            content = (folder / file).read_bytes()
            length = durable + int(kept * (len(content) - durable))
            (folder / file).write_bytes(content[:length] + (garbage if file == INDEX else b""))

        state = recover(folder)
        assert durable_count <= state.count <= len(examples)
        assert recover(folder).count == state.count, "once is enough"
        assert read_origin(folder) == {"request": "r"}
        with SpoolWriter(folder, state=recover(folder)) as spool:
            for image, label in examples[state.count :]:
                spool.add(image, label)
            summary = spool.finish()
        assert list(read_spool(folder)) == examples
        assert read_labels(folder) == summary.labels
        assert summary == write(Path(name) / "uninterrupted", examples)
        for file in (IMAGES, INDEX):
            expected = (Path(name) / "uninterrupted" / file).read_bytes()
            assert (folder / file).read_bytes() == expected


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([IMAGES, INDEX]),
    position=st.integers(0, 2**16),
    mask=st.integers(1, 255),
)
def test_what_is_recovered_is_what_was_written(
    intact: Path, name: str, position: int, mask: int
) -> None:
    """Whichever byte is damaged: also one of a label, for which only the seal vouched before."""
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(intact, Path(root) / "spool")
        content = bytearray((folder / name).read_bytes())
        content[position % len(content)] ^= mask
        (folder / name).write_bytes(content)
        state = recover(folder)
        with SpoolWriter(folder, state=state) as spool:
            spool.finish()
        assert list(read_spool(folder)) == SOME[: state.count]


def test_a_writer_flushes_by_itself(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "spool", {}) as spool:
        for _ in range(5):
            spool.add(bytes(STEP_BYTES // 2), "cat")
        assert (spool.durable_count, spool.durable_size) == (4, 2 * STEP_BYTES)
        spool.suspend()
    assert recover(tmp_path / "spool").count in (4, 5)


@pytest.mark.parametrize("change", [b"", b"{}", b"[]", b"null", b'{"upload": {"a": 2}}'])
def test_a_damaged_origin_is_found(tmp_path: Path, change: bytes) -> None:
    folder = tmp_path / "spool"
    with SpoolWriter(folder, {"a": 1}) as spool:
        spool.suspend()
    content = (folder / ORIGIN).read_bytes()
    assert read_origin(folder) == {"a": 1}
    for damaged in (change, content[:-2], content.replace(b"1", b"2", 1), content + b" "):
        (folder / ORIGIN).write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"upload\.json"):
            read_origin(folder)
    (folder / ORIGIN).unlink()
    with pytest.raises(DamagedError, match=r"upload\.json"):
        read_origin(folder)
