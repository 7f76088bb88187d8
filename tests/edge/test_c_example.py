"""What `clients/examples/classify.c` says, beside what `inflora_edge` does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from inflora_core.store import Store
from inflora_edge import Model
from tests.core import tiny
from tests.edge.lineage import CLASSES

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "clients" / "examples" / "classify.c"
INCLUDE = Path(os.environ.get("ORT_INCLUDE") or ROOT / "build" / "onnxruntime-include")
LIBRARIES = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
COMPILER = shutil.which(os.environ.get("CC") or "cc")
LINE = re.compile(r"(.+): (.+) (\d+\.\d)%(, unlike anything learned)?")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
    pytest.mark.skipif(
        not (INCLUDE / "onnxruntime_c_api.h").exists(),
        reason=f"{INCLUDE} has no onnxruntime_c_api.h: make test-edge, or ORT_INCLUDE=folder",
    ),
    pytest.mark.skipif(not LIBRARIES, reason="onnxruntime's wheel has no library to link with"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # to link with, and to load
        (folder / name).symlink_to(LIBRARIES[-1])
    command = [
        *(str(COMPILER), "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic"),
        # Its own headers are not held to what ours is.
        *("-isystem", str(INCLUDE), str(SOURCE)),
        *(f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"),
        *("-o", str(folder / "classify")),
    ]
    subprocess.run(command, check=True)
    return folder / "classify"


@pytest.fixture
def model(store: Store, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(store.onnx(4))
    return path


def write_ppm(path: Path, pixels: NDArray[np.uint8]) -> Path:
    height, width, _ = pixels.shape
    path.write_bytes(b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes())
    return path


def run(program: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *files], capture_output=True, encoding="utf-8", timeout=60, check=False
    )


def test_it_answers_as_a_device_does(program: Path, model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [tiny.pattern(colour, 50 + i) for colour in tiny.COLOURS for i in range(4)]
    images += [a // 2 + b // 2 for a in images[::4] for b in images[1::4]]  # hard to tell apart
    images += [tiny.pattern("red", 60, side=side) for side in (1, 7, 61)]
    images += [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((83, 16), (16, 83), (3, 1))]
    paths = [write_ppm(tmp_path / f"{i}.ppm", pixels) for i, pixels in enumerate(images)]
    said = run(program, model, *paths)
    assert (said.returncode, said.stderr) == (0, "")
    device, news, likely = Model(model), set(), set()
    for path, pixels, line in zip(paths, images, said.stdout.splitlines(), strict=True):
        found, expected = LINE.fullmatch(line), device.predict(pixels)
        assert found
        assert found[1] == str(path)
        assert found[2] == expected.label
        assert float(found[3]) == pytest.approx(100 * expected.probabilities[0], abs=0.06)
        assert (found[4] is not None) == (expected.novelty > 0.95)
        news.add(found[4])
        likely.add(round(expected.probabilities[0], 1))
    assert len(news) == 2, "known ones and new ones"
    assert len(likely) > 3


def test_labels_are_what_they_were(program: Path, store: Store, tmp_path: Path) -> None:
    """Those of the file are quoted as JSON does."""
    names = ['"red", \\n', "\\", "blau-grün 蓝", "[]", "a, b"]
    message = onnx.load_from_string(store.onnx(4))
    (classes,) = (entry for entry in message.metadata_props if entry.key == "classes")
    assert len(json.loads(classes.value)) == len(names)
    classes.value = json.dumps(names, ensure_ascii=False)
    path = tmp_path / "model.onnx"
    path.write_bytes(message.SerializeToString())
    images = [tiny.pattern(colour, 50) for number in (1, 2, 4) for colour in CLASSES[number]]
    paths = [write_ppm(tmp_path / f"{i}.ppm", pixels) for i, pixels in enumerate(images)]
    said = run(program, path, *paths).stdout.splitlines()
    labels = [found[2] for found in map(LINE.fullmatch, said) if found]
    device = Model(path)
    assert labels == [device.predict(pixels).label for pixels in images]
    assert set(labels) == set(names)


def test_a_bad_image_is_named_and_the_others_are_classified(
    program: Path, model: Path, tmp_path: Path
) -> None:
    good = write_ppm(tmp_path / "good.ppm", tiny.pattern("red", 50))
    contents = {
        "cut": good.read_bytes()[:-1],
        "empty": b"",
        "png": tiny.png("red", 50),
        "deep": b"P6 1 1 65535\n" + bytes(6),
        "grey": b"P5 1 1 255\n" + bytes(3),
        "flat": b"P6 0 4 255\n" + bytes(9),
        "negative": b"P6 -1 -1 255\n" + bytes(9),
        "large": b"P6 1000000000000 1 255\n" + bytes(9),
        "larger": b"P6 16385 16384 255\n" + bytes(9),
        "liar": b"P6 16384 16384 255\n" + bytes(9),
        "header": b"P6 1 1 255",
        "thin": b"P6 1010 10 255\n" + bytes(3 * 1010 * 10),
    }
    bad = [tmp_path / f"{name}.ppm" for name in contents]
    for path, content in zip(bad, contents.values(), strict=True):
        path.write_bytes(content)
    bad += [tmp_path / "absent.ppm", tmp_path]
    said = run(program, model, *bad, good)
    assert said.returncode == 1
    assert said.stdout.startswith(f"{good}: red ")
    assert said.stdout.count("\n") == 1
    lines = said.stderr.splitlines()
    assert len(lines) == len(bad)
    for path, line in zip(bad, lines, strict=True):
        assert line.startswith(f"{path}: ")
    assert lines[-2].endswith("No such file or directory")


def foreign(classes: str | None) -> bytes:
    """Return another's model, with our inputs and outputs, but a class for each byte."""
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["probabilities"]),
        helper.make_node("ReduceSum", ["probabilities", "axes"], ["novelty"], keepdims=0),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", "h", "w", 3])
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", "classes"]),
        helper.make_tensor_value_info("novelty", TensorProto.FLOAT, ["n"]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "foreign", [images], outputs, [axes])
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    if classes is not None:
        model.metadata_props.add(key="classes", value=classes)
    return model.SerializeToString()


def test_an_image_that_the_model_fails_at_is_named_and_the_others_are_classified(
    program: Path, tmp_path: Path
) -> None:
    """A class for each byte: it has three for an image of one pixel, and more for others."""
    (path := tmp_path / "three.onnx").write_bytes(foreign('["red", "green", "blue"]'))
    pixels = {"red": [200, 100, 0], "green": [100, 200, 0], "blue": [0, 100, 200]}
    good = [write_ppm(tmp_path / f"{k}.ppm", np.array([[v]], np.uint8)) for k, v in pixels.items()]
    bad = [write_ppm(tmp_path / f"{n}.ppm", np.zeros((1, n, 3), np.uint8)) for n in (2, 3)]
    said = run(program, path, good[0], bad[0], good[1], bad[1], good[2])
    assert said.returncode == 1
    found = [LINE.match(line) for line in said.stdout.splitlines()]
    assert [(line[1], line[2]) for line in found if line] == [
        (str(file), label) for file, label in zip(good, pixels, strict=True)
    ]
    for file in bad:
        assert f"{file}: {path}: " in said.stderr


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "File doesn't exist"),
        (b"", "failed"),
        (b"nonsense", "failed"),
        (foreign(None), "no model of InfLoRA Server"),
        (foreign("[]"), "no model of InfLoRA Server"),
        (foreign('["red'), "no model of InfLoRA Server"),
        (foreign('["red\\'), "no model of InfLoRA Server"),
        (foreign('["red", "green"]'), "shape"),
    ],
    ids=["absent", "empty", "damaged", "foreign", "no class", "cut", "cut quote", "other classes"],
)
def test_a_bad_model_is_named(
    program: Path, tmp_path: Path, content: bytes | None, why: str
) -> None:
    path = tmp_path / "foreign.onnx"
    if content is not None:
        path.write_bytes(content)
    said = run(program, path, write_ppm(tmp_path / "x.ppm", tiny.pattern("red", 50)))
    assert (said.returncode, said.stdout) == (1, "")
    assert f"{path}: " in said.stderr
    assert why in said.stderr
