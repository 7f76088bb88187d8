"""Sources of labelled images: folders, tables, archives, and the layouts of `datasets`."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import string
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from typer.testing import CliRunner

from inflora_client._images import read_image
from inflora_client.cli import app
from inflora_client.cli.sources import Choice, Kind, Source, SourceError, kind_of, open_source
from tests.clients.peer import Peer, status

Labelled = tuple[str, str, bytes]
"""Label, name of the file, and what is in it."""

WITH_BYTES = pa.schema(
    {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.string()}
)

PETS: list[Labelled] = [
    ("cat", "1.png", b"cat one"),
    ("cat", "2.JPG", b"cat two"),
    ("dog", "1.webp", b"dog one"),
]


@contextmanager
def opened(path: Path, **choice: object) -> Iterator[Source]:
    with ExitStack() as stack:
        yield open_source(path, Choice(**choice), stack)  # type: ignore[arg-type]


def content(path: Path, **choice: object) -> list[tuple[str, bytes]]:
    with opened(path, **choice) as source:
        return [(example.label, read_image(example.image)) for example in source.examples]


def refusal(path: Path, **choice: object) -> str:
    with pytest.raises(SourceError) as caught, opened(path, **choice):
        pass
    return str(caught.value)


def sent(messages: Sequence[Any]) -> list[Any]:
    """The examples of an upload."""
    return [example for message in messages for example in message.examples.examples]


def make_folder(folder: Path, images: Sequence[Labelled]) -> Path:
    for label, name, image in images:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / name).write_bytes(image)
    return folder


def make_csv(folder: Path, images: Sequence[Labelled], name: str = "table.csv") -> Path:
    make_folder(folder, images)
    delimiter = "\t" if name.endswith(".tsv") else ","
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["path", "label"])
        writer.writerows([f"{label}/{name}", label] for label, name, _ in images)
    return folder / name


def make_jsonl(folder: Path, images: Sequence[Labelled]) -> Path:
    make_folder(folder, images)
    rows = [{"file_name": f"{label}/{name}", "label": label} for label, name, _ in images]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "table.jsonl"


def make_parquet_of_paths(folder: Path, images: Sequence[Labelled]) -> Path:
    make_folder(folder, images)
    columns = {"path": [f"{x}/{n}" for x, n, _ in images], "label": [x for x, _, _ in images]}
    parquet.write_table(pa.table(columns), folder / "table.parquet")
    return folder / "table.parquet"


def with_images(images: Sequence[Labelled]) -> pa.Table:
    """A table as `datasets` writes it: images inside, labels as numbers with names."""
    names = sorted({label for label, _, _ in images})
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    table = pa.table(
        {
            "image": [{"bytes": image, "path": name} for _, name, image in images],
            "label": [names.index(label) for label, _, _ in images],
        }
    )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


def make_parquet(folder: Path, images: Sequence[Labelled]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(with_images(images), folder / "table.parquet", row_group_size=2)
    return folder / "table.parquet"


def make_tar(folder: Path, images: Sequence[Labelled], suffix: str = "tar", top: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"images.{suffix}"
    with tarfile.open(path, f"w:{suffix.removeprefix('tar').removeprefix('.')}") as archive:
        for label, name, image in images:
            add(archive, f"{top}{label}/{name}", image)
    return path


def add(archive: tarfile.TarFile, name: str, image: bytes = b"image") -> None:
    member = tarfile.TarInfo(name)
    member.size = len(image)
    archive.addfile(member, io.BytesIO(image))


def make_imagefolder(folder: Path, images: Sequence[Labelled]) -> Path:
    make_folder(folder / "train", images)
    make_folder(folder / "test", [("other", "1.png", b"of the other split")])
    return folder


def make_metadata(folder: Path, images: Sequence[Labelled]) -> Path:
    make_csv(folder / "train", images).rename(folder / "train" / "metadata.csv")
    table = (folder / "train" / "metadata.csv").read_text()
    (folder / "train" / "metadata.csv").write_text(table.replace("path,", "file_name,", 1))
    return folder


def make_shards(folder: Path, images: Sequence[Labelled]) -> Path:
    (folder / "data").mkdir(parents=True)
    middle = len(images) // 2
    for number, part in enumerate((images[:middle], images[middle:])):
        if part:
            name = f"train-{number:05}-of-00002.parquet"
            parquet.write_table(with_images(part), folder / "data" / name)
    parquet.write_table(
        with_images([("other", "1.png", b"x")]), folder / "data" / "test-00000-of-00001.parquet"
    )
    return folder


LAYOUTS: dict[str, Callable[[Path, Sequence[Labelled]], Path]] = {
    "folder": make_folder,
    "csv": make_csv,
    "tsv": lambda folder, images: make_csv(folder, images, "table.tsv"),
    "jsonl": make_jsonl,
    "parquet of paths": make_parquet_of_paths,
    "parquet": make_parquet,
    "tar": make_tar,
    "tar.gz": lambda folder, images: make_tar(folder, images, "tar.gz"),
    "tar.xz": lambda folder, images: make_tar(folder, images, "tar.xz", top="./pets/"),
    "imagefolder": make_imagefolder,
    "metadata": make_metadata,
    "shards": make_shards,
}
KINDS = {
    "folder": Kind.FOLDER,
    "csv": Kind.TABLE,
    "tsv": Kind.TABLE,
    "jsonl": Kind.TABLE,
    "parquet of paths": Kind.PARQUET,
    "parquet": Kind.PARQUET,
    "tar": Kind.ARCHIVE,
    "tar.gz": Kind.ARCHIVE,
    "tar.xz": Kind.ARCHIVE,
    "imagefolder": Kind.LAYOUT,
    "metadata": Kind.LAYOUT,
    "shards": Kind.LAYOUT,
}

NAMES = st.text(string.ascii_lowercase + string.digits + "äß ,'_-", min_size=1, max_size=8).map(
    str.strip
)
IMAGES = st.dictionaries(
    st.tuples(NAMES.filter(bool), NAMES.filter(bool)),
    st.binary(min_size=1, max_size=40),
    min_size=1,
    max_size=9,
).map(lambda found: [(label, f"{name}.png", image) for (label, name), image in found.items()])


class TestAllLayouts:
    @settings(max_examples=25)
    @given(images=IMAGES)
    def test_the_same_images_and_labels_give_the_same_examples(
        self, images: list[Labelled]
    ) -> None:
        expected = sorted((label, image) for label, _, image in images)
        with tempfile.TemporaryDirectory() as folder:
            for name, make in LAYOUTS.items():
                path = make(Path(folder, name), images)
                assert kind_of(path) is KINDS[name], name
                assert sorted(content(path)) == expected, name

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_can_be_read_again_from_anywhere(self, tmp_path: Path, layout: str) -> None:
        path = LAYOUTS[layout](tmp_path / "x", PETS)
        with opened(path) as source:
            images = [read_image(example.image) for example in source.examples]
            numbers = [*range(len(images))] * 3
            random.Random(0).shuffle(numbers)
            for number in numbers:
                assert read_image(source.examples[number].image) == images[number]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_takes_some_classes(self, tmp_path: Path, layout: str) -> None:
        path = LAYOUTS[layout](tmp_path / "x", PETS)
        assert content(path, classes=["dog"]) == [("dog", b"dog one")]
        message = refusal(path, classes=["dog,cow"])
        assert "no class cow in" in message
        assert "cat, dog" in message

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_what_is_no_file_of_an_image_is_named(self, tmp_path: Path, layout: str) -> None:
        with opened(LAYOUTS[layout](tmp_path / "x", PETS)) as source:
            names = [str(example.image) for example in source.examples]
        assert len(set(names)) == len(PETS)
        assert all(str(tmp_path) in name for name in names)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_an_upload_goes_on_after_a_break(self, tmp_path: Path, peer: Peer, layout: str) -> None:
        images = [("cat", f"{n}.png", random.Random(n).randbytes(300_000)) for n in range(5)]
        path = LAYOUTS[layout](tmp_path / "x", images)
        peer.upload_breaks.append(2)
        arguments = ["--server", peer.address, "learn", str(path), "--detach"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        broken, whole = peer.calls["LearnTask"]
        start = whole[0].spec.resume_from
        assert 0 < start < len(images)
        received = [e.image for e in sent(broken)[:start] + sent(whole)]
        assert received == [image for _, image in content(path)]

    def test_an_image_that_turns_out_to_be_missing_ends_the_upload(
        self, tmp_path: Path, peer: Peer
    ) -> None:
        table = pa.table({"image": [b"a", None], "label": ["cat", "cat"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        arguments = ["--server", peer.address, "learn", str(tmp_path / "a.parquet")]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "a.parquet, row 2: has no image; nothing is learned of it" in result.stderr
        assert not peer.tasks

    def test_evaluate_takes_them_as_well(self, tmp_path: Path, peer: Peer) -> None:
        path = make_tar(tmp_path, PETS, "tar.gz")
        arguments = ["--server", peer.address, "evaluate", str(path), "--classes", "cat", "--json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert [e.image for e in sent(peer.calls["Evaluate"][0])] == [b"cat one", b"cat two"]

    def test_a_file_at_fault_is_named(self, tmp_path: Path, peer: Peer) -> None:
        path = make_tar(tmp_path, PETS)
        peer.failures["LearnTask"].append(
            status("INVALID_ARGUMENT", "no image", fields={"examples[2].image": "no image"})
        )
        result = CliRunner().invoke(app, ["--server", peer.address, "learn", str(path)])
        assert result.exit_code == 1
        assert f"that is {path}: dog/1.webp: replace it" in result.stderr

    def test_options_of_another_kind_are_refused(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "x", PETS)
        assert "--split is for a datasets folder" in refusal(folder, split="test")
        assert "are for tables" in refusal(folder, label_column="class")

    def test_a_label_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "x"
        os.makedirs(os.fsencode(folder) + b"/\xff")
        assert "'\\udcff' is not Unicode text" in refusal(folder)

    def test_anything_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("no images")
        message = refusal(tmp_path / "notes.txt")
        assert "give a folder" in message
        assert ".parquet" in message


class TestTables:
    def test_finds_columns_by_name(self, tmp_path: Path) -> None:
        make_folder(tmp_path, PETS)
        (tmp_path / "a.csv").write_text("\ufeffid, Class ,FILE\n7,cat,cat/1.png\n")
        assert content(tmp_path / "a.csv") == [("cat", b"cat one")]

    def test_takes_columns_that_are_named(self, tmp_path: Path) -> None:
        make_folder(tmp_path, PETS)
        (tmp_path / "a.csv").write_text("path,picture,label,kind\nno,cat/1.png,no,tabby\n")
        found = content(tmp_path / "a.csv", path_column="picture", label_column="kind")
        assert found == [("tabby", b"cat one")]
        message = refusal(tmp_path / "a.csv", label_column="sort")
        assert message.endswith(
            "has no column sort; there are path, picture, label, kind: name one with --label-column"
        )

    def test_takes_absolute_paths(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "elsewhere", PETS)
        (tmp_path / "a.csv").write_text(f"path,label\n{folder}/dog/1.webp,dog\n")
        assert content(tmp_path / "a.csv") == [("dog", b"dog one")]

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("path,label\ncat/1.png,cat\ngone.png,cat\n", "line 3: there is no file"),
            ("path,label\ncat/1.png,\n", "line 2: has no label"),
            ("path,label\ncat/1.png\n", "line 2: has no label"),
            ("path,label\n,cat\n", "line 2: has no path in column path"),
            ("path,label\ncat/1.png,cat, red\n", "line 2: has more fields than the first line"),
            ('path,label\n"cat/1.png,cat\n', "line 2: unexpected end of data"),
            ("path,label\n", "holds no images"),
            ("", "holds no images"),
            ("path,label\ncat/1.png,\xff\n", "is not text in UTF-8"),
            ("colour,label\nred,cat\n", "has no column path or file or file_name or image"),
        ],
    )
    def test_names_the_line_at_fault(self, tmp_path: Path, table: str, message: str) -> None:
        make_folder(tmp_path, PETS)
        (tmp_path / "a.csv").write_bytes(table.encode("latin-1"))
        found = refusal(tmp_path / "a.csv")
        assert str(tmp_path / "a.csv") in found
        assert message in found

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ('{"path": "cat/1.png", "label": "cat"}\n{\n', "line 2: is no JSON"),
            ("[1]\n", "line 1: is no JSON object"),
            ("[" * 200_000, "line 1: is no JSON"),
            ('{"path": "cat/1.png", "label": "\\ud800"}\n', "'\\ud800' is not Unicode text"),
            ('{"path": "cat/1.png", "label": true}\n', "line 1: True is neither text nor"),
            ('{"path": "cat/1.png", "label": 1.5}\n', "line 1: 1.5 is neither text nor"),
            ('{"path": 3, "label": "cat"}\n', "line 1: has no path in column path"),
        ],
    )
    def test_names_the_line_of_json_at_fault(
        self, tmp_path: Path, table: str, message: str
    ) -> None:
        make_folder(tmp_path, PETS)
        (tmp_path / "a.jsonl").write_text(table)
        assert message in refusal(tmp_path / "a.jsonl")


class TestParquet:
    def test_numbers_without_names_are_labels(self, tmp_path: Path) -> None:
        table = pa.table({"image": [b"a", b"b"], "class": pa.array([3, 12], pa.int8())})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert content(tmp_path / "a.parquet") == [("3", b"a"), ("12", b"b")]

    def test_an_image_may_be_beside_it(self, tmp_path: Path) -> None:
        make_folder(tmp_path, PETS)
        images = [{"bytes": None, "path": "cat/1.png"}, {"bytes": b"inside", "path": None}]
        parquet.write_table(
            pa.table({"image": images, "label": ["cat", "cat"]}), tmp_path / "a.parquet"
        )
        assert content(tmp_path / "a.parquet") == [("cat", b"cat one"), ("cat", b"inside")]

    @pytest.mark.parametrize("kind", ["absolute", "relative", "link"])
    def test_an_image_beside_it_is_not_elsewhere(self, tmp_path: Path, kind: str) -> None:
        secret = tmp_path / "secret.png"
        secret.write_bytes(b"mine")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "link").symlink_to(secret)
        path = {"absolute": str(secret), "relative": "../secret.png", "link": "link"}[kind]
        table = pa.table({"image": [{"bytes": None, "path": path}], "label": ["cat"]})
        parquet.write_table(table.cast(WITH_BYTES), tmp_path / "x" / "a.parquet")
        with pytest.raises(SourceError, match=r"row 1: .* leads out of the table's folder"):
            content(tmp_path / "x" / "a.parquet")

    def test_labels_may_be_a_dictionary(self, tmp_path: Path) -> None:
        labels = pa.array(["cat", "dog"]).dictionary_encode()
        parquet.write_table(
            pa.table({"image": [b"a", b"b"], "label": labels}), tmp_path / "a.parquet"
        )
        assert content(tmp_path / "a.parquet") == [("cat", b"a"), ("dog", b"b")]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"image": [b"a", b"b"], "label": ["cat", None]}, "row 2: has no label"),
            ({"image": [1.5], "label": ["cat"]}, "column image is double, but images are paths"),
            ({"path": ["gone.png"], "label": ["cat"]}, "row 1: there is no file"),
            ({"path": [None, "x"], "label": ["cat", "cat"]}, "row 1: has no path"),
            ({"colour": ["red"], "label": ["cat"]}, "has no column path or file"),
        ],
    )
    def test_names_the_row_at_fault(
        self, tmp_path: Path, columns: dict[str, list[object]], message: str
    ) -> None:
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        found = refusal(tmp_path / "a.parquet")
        assert str(tmp_path / "a.parquet") in found
        assert message in found

    def test_a_label_without_a_name_is_refused(self, tmp_path: Path) -> None:
        table = with_images(PETS)
        wrong = table.set_column(1, "label", pa.array([0, -1, 1]))
        parquet.write_table(wrong.cast(wrong.schema), tmp_path / "a.parquet")
        assert "row 2: label -1, but there are names of 2" in refusal(tmp_path / "a.parquet")

    def test_a_path_that_is_no_text_is_no_image(self, tmp_path: Path) -> None:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.int64()})
        images = pa.array([{"bytes": None, "path": 7}], kind)
        parquet.write_table(pa.table({"image": images, "label": ["cat"]}), tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=r"a\.parquet, row 1: has no image"):
            content(tmp_path / "a.parquet")

    def test_text_that_is_not_utf_8_is_refused(self, tmp_path: Path) -> None:
        labels = pa.Array.from_buffers(
            pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
        )
        parquet.write_table(pa.table({"image": [b"a"], "label": labels}), tmp_path / "a.parquet")
        assert "cannot be read as Parquet" in refusal(tmp_path / "a.parquet")

    def test_what_names_of_labels_are_is_no_trap(self, tmp_path: Path) -> None:
        table = pa.table({"image": [b"a"], "label": [3]})
        hostile = table.replace_schema_metadata({"huggingface": "[" * 200_000})
        parquet.write_table(hostile, tmp_path / "a.parquet")
        assert content(tmp_path / "a.parquet") == [("3", b"a")]

    def test_a_row_without_an_image_is_named(self, tmp_path: Path) -> None:
        table = pa.table({"image": [b"a", None], "label": ["cat", "cat"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=r"a\.parquet, row 2: has no image"):
            content(tmp_path / "a.parquet")

    def test_what_is_no_parquet_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"no parquet")
        assert "cannot be read as Parquet" in refusal(tmp_path / "a.parquet")

    def test_without_pyarrow_it_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = make_parquet(tmp_path, PETS)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert "pip install 'inflora-server[parquet]'" in refusal(path)
        assert len(content(make_csv(tmp_path / "csv", PETS))) == len(PETS)


class TestArchives:
    @pytest.mark.parametrize("name", ["/cat/1.png", "../cat/1.png", "cat/../../1.png"])
    def test_hostile_names_are_refused(self, tmp_path: Path, name: str) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            add(archive, "cat/0.png")
            add(archive, name)
        assert "leads out of the archive" in refusal(tmp_path / "a.tar")

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
    def test_links_and_devices_are_refused(self, tmp_path: Path, kind: bytes) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            add(archive, "cat/0.png")
            member = tarfile.TarInfo("cat/1.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        assert "'cat/1.png' is a link or something else" in refusal(tmp_path / "a.tar")

    def test_an_image_too_large_for_a_message_is_refused_unread(self, tmp_path: Path) -> None:
        size = 65 << 20
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
            add(archive, "cat/0.png")
            add(archive, "cat/1.png", bytes(size))
        tracemalloc.start()
        try:
            message = refusal(tmp_path / "a.tar.gz")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert f"cat/1.png has {size} bytes, more than a call carries" in message
        assert peak < size

    def test_hidden_files_and_others_are_left_out(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name in ("README", "cat/1.png", "cat/._1.png", ".git/x.png", "cat/notes.txt"):
                add(archive, name)
        with opened(tmp_path / "a.tar") as source:
            assert [example.label for example in source.examples] == ["cat"]
            assert source.left_out == 2

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["cat/1.png", "2.png"], "2.png is in no folder"),
            (["cat/1.png", "x/dog/1.png"], "are not in the same place"),
            (["cat/notes.txt"], "holds no .bmp"),
        ],
    )
    def test_refuses_what_is_no_task(self, tmp_path: Path, names: list[str], message: str) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name in names:
                add(archive, name)
        assert message in refusal(tmp_path / "a.tar")

    @pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
    def test_a_part_of_an_archive_is_refused(self, tmp_path: Path, suffix: str) -> None:
        images = [("cat", f"{n}.png", random.Random(n).randbytes(3000)) for n in range(8)]
        path = make_tar(tmp_path, images, suffix)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert "cannot be read as a tar archive" in refusal(path)

    def test_a_damaged_header_is_not_taken_for_the_end(self, tmp_path: Path) -> None:
        path = make_tar(tmp_path, PETS)
        damaged = bytearray(path.read_bytes())
        damaged[1024] ^= 0xFF  # the second member's name, of which its header has a sum
        path.write_bytes(damaged)
        assert "is damaged at byte 1024" in refusal(path)


class TestLayouts:
    def test_takes_the_split_that_is_named(self, tmp_path: Path) -> None:
        folder = make_imagefolder(tmp_path / "x", PETS)
        assert content(folder, split="test") == [("other", b"of the other split")]
        message = refusal(folder, split="validation")
        assert message.endswith(
            "has no split validation; there are test, train: choose with --split"
        )

    def test_takes_the_shards_of_a_split_alone(self, tmp_path: Path) -> None:
        assert content(make_shards(tmp_path / "x", PETS), split="test") == [("other", b"x")]

    @pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
    def test_takes_a_table_beside_the_images(self, tmp_path: Path, name: str) -> None:
        make = {"csv": make_csv, "jsonl": make_jsonl, "parquet": make_parquet_of_paths}
        table = make[name.rpartition(".")[2]](tmp_path / "x", PETS)
        table.rename(table.with_name(name))
        assert sorted(content(tmp_path / "x")) == sorted((x, image) for x, _, image in PETS)

    @pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname"])
    def test_a_downloaded_table_does_not_choose_files_elsewhere(
        self, tmp_path: Path, path: str
    ) -> None:
        (tmp_path / "secret.png").write_bytes(b"mine")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "metadata.csv").write_text(f"file_name,label\n{path},cat\n")
        assert "leads out of the table's folder" in refusal(tmp_path / "x")

    @pytest.mark.parametrize("link", ["x/cat", "x/cat.png"])
    def test_nor_by_a_link(self, tmp_path: Path, link: str) -> None:
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "1.png").write_bytes(b"mine")
        (tmp_path / "x").mkdir()
        target = tmp_path / "secret"
        (tmp_path / link).symlink_to(target / "1.png" if link.endswith(".png") else target)
        path = link.removeprefix("x/") + ("" if link.endswith(".png") else "/1.png")
        (tmp_path / "x" / "metadata.csv").write_text(f"file_name,label\n{path},cat\n")
        assert f"{path!r} leads out of the table's folder" in refusal(tmp_path / "x")

    def test_links_within_the_folder_are_followed(self, tmp_path: Path) -> None:
        folder = make_metadata(tmp_path / "real", PETS)
        (folder / "train" / "puss").symlink_to("cat")
        (folder / "train" / "metadata.csv").write_text("file_name,label\npuss/1.png,cat\n")
        (tmp_path / "x").symlink_to(folder)
        assert content(tmp_path / "x") == [("cat", b"cat one")]

    @pytest.mark.parametrize("label", ["train", "test", "data", "validation"])
    def test_a_class_may_be_called_like_a_split(self, tmp_path: Path, label: str) -> None:
        folder = make_folder(tmp_path / "x", [(label, "1.png", b"a"), ("bus", "1.png", b"b")])
        assert kind_of(folder) is Kind.FOLDER
        assert content(folder) == sorted([(label, b"a"), ("bus", b"b")])

    def test_a_parquet_beside_classes_is_no_split(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "x", PETS)
        parquet.write_table(with_images(PETS), folder / "embeddings.parquet")
        assert kind_of(folder) is Kind.FOLDER

    def test_shards_are_open_and_in_memory_one_at_a_time(self, tmp_path: Path) -> None:
        count, size = 24, 1 << 18
        for number in range(count):
            image = random.Random(number).randbytes(size)
            parquet.write_table(
                pa.table({"image": [image], "label": ["cat"]}),
                tmp_path / f"train-{number:05}-of-{count:05}.parquet",
            )
        before = pa.total_allocated_bytes()
        with opened(tmp_path) as source:
            for number, example in enumerate(source.examples):
                assert read_image(example.image) == random.Random(number).randbytes(size)
            assert number == count - 1
            # Not of one shard: pyarrow's threads free what they decoded with a moment later.
            assert pa.total_allocated_bytes() - before < count // 2 * size
            files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
            assert len([name for name in files if name.startswith(str(tmp_path))]) == 1

    def test_a_shard_that_becomes_another_is_named(self, tmp_path: Path) -> None:
        folder = make_shards(tmp_path / "x", PETS)
        _, second = sorted((folder / "data").glob("train-*"))
        with opened(folder) as source:
            assert read_image(source.examples[0].image) == PETS[0][2]
            parquet.write_table(with_images(PETS[:1]), second)
            with pytest.raises(SourceError, match=rf"{second.name} cannot be read as Parquet"):
                read_image(source.examples[2].image)
            assert read_image(source.examples[0].image) == PETS[0][2]

    def test_a_split_may_be_one_file(self, tmp_path: Path) -> None:
        parquet.write_table(with_images(PETS), tmp_path / "train.parquet")
        assert len(content(tmp_path)) == len(PETS)
