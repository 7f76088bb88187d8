"""What keeps a server from starting: one line that says why, and exit status 1."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file


def failed_start(folder: Path, *options: str) -> str:
    """Start a server that must not come up; return the one line that it ends with."""
    command = [sys.executable, "-m", "inflora_service", "--port", "0"]
    result = subprocess.run(
        [*command, "--store", str(folder), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *log, error = result.stderr.splitlines()
    for line in log:
        assert re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING) |worker: INFO ", line), line
    assert error.startswith("inflora_service: error: ")
    return error


def test_a_port_in_use(prepared: Path, tmp_path: Path) -> None:
    store = shutil.copytree(prepared, tmp_path / "store")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = failed_start(store, "--port", port)
    assert port in error
    assert "in use" in error


def test_a_store_of_a_newer_release(prepared: Path, tmp_path: Path) -> None:
    store = shutil.copytree(prepared, tmp_path / "store")
    (store / "FORMAT").write_text(json.dumps({"format": 99}))
    assert "format 99" in failed_start(store)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"")
    assert "not a store" in failed_start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


def test_a_setting_that_makes_no_sense(tmp_path: Path) -> None:
    assert "epochs" in failed_start(tmp_path / "store", "--epochs", "-3")
    assert "no_such" in failed_start(tmp_path / "store", "--set", "no_such=1")
    assert not (tmp_path / "store").exists()


def test_a_damaged_backbone_in_the_store(prepared: Path, tmp_path: Path) -> None:
    store = shutil.copytree(prepared, tmp_path / "store")
    (weights,) = store.glob("backbones/*/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "weights.safetensors" in failed_start(store)


def test_a_damaged_backbone_file(backbone_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(backbone_file.read_bytes()[:-100])
    error = failed_start(tmp_path / "store", "--backbone", str(path))
    assert str(path) in error
    assert_no_backbone(tmp_path / "store")


def test_a_backbone_that_cannot_be_taught(tmp_path: Path) -> None:
    path = tmp_path / "swin.safetensors"
    args: dict[str, Any] = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8}
    args |= {"depths": [1, 1], "num_heads": [1, 2]}
    name = "swin_tiny_patch4_window7_224"
    swin = timm.create_model(name, num_classes=0, **args)
    config = {"architecture": name, "model_args": args, "pretrained_cfg": {}}
    save_file(swin.state_dict(), path, metadata={"timm_config": json.dumps(config)})
    error = failed_start(tmp_path / "store", "--backbone", str(path))
    assert "SwinTransformer is not a plain vision transformer" in error
    assert_no_backbone(tmp_path / "store")


def assert_no_backbone(store: Path) -> None:
    """Assert that the next server can make the store with another backbone."""
    assert not (store / "models/default/backbone").exists()
    assert not list((store / "backbones").iterdir())
    assert not list((store / "drafts").iterdir())


@pytest.mark.parametrize("option", ["--port", "--backbone"])
def test_an_option_without_its_value_is_a_usage_error(option: str) -> None:
    command = [sys.executable, "-m", "inflora_service", option]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert option in result.stderr
