"""Clients of the Open Inference Protocol, as they come from the registry, against a real server.

They run as programs of their own: each registers messages under the protocol's names, which two
packages in one process, or one of them and ours, cannot both do.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from inflora_core.store import Store
from tests.running_server import RunningServer, running_server
from tests.service.conftest import GREEN, RED, WHITE, png
from tests.service.mean_colour import make_backbone
from tests.service.test_bad_input import publish

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-oip/bin/python"
CLIENTS = Path(__file__).parent / "oip"

REFUSED = {
    "model": ("NOT_FOUND", "model_name: there is no model 'other', only 'default'"),
    "version": ("NOT_FOUND", "model_version: there is no version 9"),
    "input": (
        "INVALID_ARGUMENT",
        "inputs[0].name: there is no input 'INPUT0', only encoded_images and images",
    ),
    "datatype": ("INVALID_ARGUMENT", "inputs[0].datatype: images is UINT8, not 'FP32'"),
    "shape of bytes": (
        "INVALID_ARGUMENT",
        "inputs[0].shape: encoded_images is [n] or [n, 1], not [1, 2]",
    ),
    "shape of pixels": (
        "INVALID_ARGUMENT",
        "inputs[0].shape: images is [n, height, width, 3], not [1, 3, 8, 8]",
    ),
    "output": (
        "INVALID_ARGUMENT",
        "outputs[1].name: there is no output 'OUTPUT0', only labels, probabilities, logits, "
        "novelty, embedding, classes",
    ),
    "image": (
        "INVALID_ARGUMENT",
        "encoded_images[0]: the data is no readable image, or its header is damaged: send JPEG, "
        "PNG, WebP or BMP",
    ),
    "images": ("RESOURCE_EXHAUSTED", "inputs[0].shape: a call has at most 256 images"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with two versions, of two and of three classes."""
    folder = tmp_path_factory.mktemp("server")
    make_backbone(Store.open(folder / "store"))
    publish(folder / "store", red=RED, white=WHITE)
    publish(folder / "store", green=GREEN)
    with running_server(folder, ["--predict-threads", "1"]) as server:
        yield server


@pytest.fixture(scope="module", params=["triton", "kserving"])
def seen(
    request: pytest.FixtureRequest, server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What a client has seen."""
    if not PYTHON.exists() and "CI" not in os.environ:
        pytest.skip("the clients are not installed: make venv-oip")
    images = []
    for name, content in (("red", png(RED)), ("green", png(GREEN, (30, 20)))):
        images.append(tmp_path_factory.mktemp("images") / name)
        images[-1].write_bytes(content)
    # Without what leads to our packages.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [PYTHON, CLIENTS / f"{request.param}.py", server.address, *images],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_readiness(seen: Any) -> None:
    assert (seen["live"], seen["ready"]) == (True, True)
    assert seen["models"] == {"default": True, "other": False}
    assert seen["versions"] == {"1": True, "2": True, "3": False}


def test_metadata(seen: Any) -> None:
    assert seen["server"] == {
        "name": "inflora-server",
        "version": version("inflora-server"),
        "extensions": ["parameters"],
    }
    model = seen["model"]
    assert (model["name"], model["platform"]) == ("default", "onnx_onnxv1")
    assert model["versions"] == ["1", "2"]
    assert described(model["inputs"]) == {
        "encoded_images": ("BYTES", [-1]),
        "images": ("UINT8", [-1, -1, -1, 3]),
    }
    assert described(model["outputs"]) == {
        "labels": ("BYTES", [-1, -1]),
        "probabilities": ("FP32", [-1, -1]),
        "logits": ("FP32", [-1, -1]),
        "novelty": ("FP32", [-1]),
        "embedding": ("FP32", [-1, 3]),
        "classes": ("BYTES", [-1]),
    }


def described(tensors: list[dict[str, Any]]) -> dict[str, tuple[str, list[int]]]:
    # JSON of protobuf has 64-bit integers as texts.
    return {
        each["name"]: (each["datatype"], [int(side) for side in each["shape"]]) for each in tensors
    }


def test_encoded_images(seen: Any) -> None:
    found = seen["encoded"]
    assert (found["id"], found["model"], found["version"]) == ("a", "default", "2")
    assert [row[0] for row in found["labels"]] == ["red", "green"]
    assert [len(row) for row in found["labels"]] == [2, 2]
    for name in ("logits", "probabilities"):  # columns: red, white, green
        assert [row.index(max(row)) for row in found[name]] == [0, 2]
    assert [sum(row) for row in found["probabilities"]] == pytest.approx([1, 1])
    assert len(found["novelty"]) == 2
    assert seen.get("listed", found) == found


def test_pixels(seen: Any) -> None:
    found = seen["pixels"]
    assert (found["id"], found["version"]) == ("", "1")
    assert set(found) == {"id", "model", "version", "novelty", "labels"}
    assert found["labels"] == [["white"], ["white"]]


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(seen: Any, case: str) -> None:
    assert tuple(seen["refused"][case]) == REFUSED[case]


def test_nothing_else_was_refused(seen: Any) -> None:
    assert set(seen["refused"]) == set(REFUSED)
