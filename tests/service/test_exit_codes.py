"""The exit codes of `inflora serve` and `inflora doctor`, as `inflora --help` lists them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from inflora_core.store import Store
from tests.clients.terminal import MAIN, environment
from tests.clients.walking import PROGRAM
from tests.service.mean_colour import make_backbone


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", MAIN, *map(str, words)]


def code(folder: Path, *words: object) -> int:
    found = subprocess.run(
        command(*words),
        capture_output=True,
        env=environment(XDG_CONFIG_HOME=str(folder)),
        check=False,
    )
    return found.returncode


def documented(name: str) -> set[int]:
    (line,) = re.findall(rf"Of 'inflora {name}': (.*)", PROGRAM.epilog)
    return {int(number) for number in re.findall(r"\d+", line)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that has learned nothing yet."""
    make_backbone(Store.open(tmp_path / "store"))
    return tmp_path / "store"


def serve_until_ready(store: Path, folder: Path) -> int:
    serving = subprocess.Popen(
        command("serve", "--store", store, "--port", 0, "--http-port", 0),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(XDG_CONFIG_HOME=str(folder)),
    )
    with serving:
        assert serving.stderr is not None
        for line in serving.stderr:
            if "ready; try" in line:
                serving.send_signal(signal.SIGTERM)
    return serving.returncode


def test_all_of_serve_are_met(store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    codes = [
        serve_until_ready(store, tmp_path),
        code(tmp_path, "serve", "--store", tmp_path / "other", "--port", 0),
        code(tmp_path, "serve", "--no-such-option"),
    ]
    assert codes == [0, 1, 2]
    assert set(codes) == documented("serve")


def test_all_of_doctor_are_met(store: Path, tmp_path: Path) -> None:
    serve_until_ready(store, tmp_path)
    sound = code(tmp_path, "doctor", store)
    weights, *_ = store.glob("backbones/*/*")
    weights.write_bytes(weights.read_bytes()[:-1])
    codes = [sound, code(tmp_path, "doctor", store), code(tmp_path, "doctor", tmp_path / "none")]
    assert codes == [0, 1, 2]
    assert set(codes) == documented("doctor")
