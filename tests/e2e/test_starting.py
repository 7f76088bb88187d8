"""`inflora learn` where there is no server yet: it starts one, if somebody wants that."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from inflora_client.cli import app
from tests.clients.terminal import CTRL_C, ENTER, MAIN, environment, terminal

STARTED = re.compile(r"started a server at (\S+), with its store in (\S+) .*kill (\d+)", re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where somebody works who has images of two classes, and nothing else."""
    for label, colour in (("red", "#c01010"), ("blue", "#1010c0")):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            image = Image.new("RGB", (40 + number, 40), colour)
            image.save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path


@pytest.fixture
def address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return f"localhost:{taken.getsockname()[1]}"


def environ(folder: Path) -> dict[str, str]:
    return environment(XDG_CONFIG_HOME=str(folder / "config"))


def inflora(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environ(folder),
        check=False,
    )


@contextmanager
def stopping(pid: int) -> Iterator[None]:
    """End a server at the end, and wait for that: it is no child of ours."""
    handle = os.pidfd_open(pid)
    try:
        yield
    finally:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], 120)
        os.close(handle)
        assert ended, "the server does not end"


def test_starts_one_without_asking_if_it_is_told_to(folder: Path, address: str) -> None:
    learn = ("--server", address, "learn", "photos", "--start-server", "--epochs", "1")
    first = inflora(folder, *learn)
    found = STARTED.search(first.stderr)
    assert found, first.stderr
    with stopping(int(found[3])):
        assert first.returncode == 0, first.stderr
        assert (found[1], found[2]) == (address, "inflora-store")
        assert "red" in first.stdout
        log = folder / "inflora-store" / "server.log"
        assert "ready; try: inflora learn" in log.read_text()
        again = inflora(folder, *learn, "--detach")
        assert again.returncode == 0, again.stderr
        assert "started" not in again.stderr
        versions = inflora(folder, "--server", address, "--json", "versions")
        assert json.loads(versions.stdout.splitlines()[-1])["name"].endswith("/1")
    assert "stopped" in log.read_text()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_asks_at_a_terminal(folder: Path, address: str) -> None:
    (folder / "config" / "inflora").mkdir(parents=True)
    config = folder / "config" / "inflora" / "config.toml"
    config.write_text(f'server = "{address}"\n[serve]\nstore = "shop"\n')
    question = f"No server listens at {address}. Start one here, with its store in shop? [y/n] (y)"
    words = ["learn", "photos", "--detach"]
    with terminal(words, folder, environ(folder)) as screen:
        screen.until(question)
        screen.press(f"n{ENTER}")
        assert screen.end() == 3
    assert "inflora learn --start-server" in screen.shown
    with terminal(words, folder, environ(folder)) as screen:
        screen.until(question)
        assert screen.interrupt() == 130
    assert not (folder / "shop").exists()
    with terminal(words, folder, environ(folder)) as screen:
        screen.until(question)
        screen.press(ENTER)
        screen.until("kill ")
        code = screen.end()
    found = STARTED.search(screen.shown)
    assert found
    with stopping(int(found[3])):
        assert code == 0, screen.shown
        assert found[2] == "shop"
        assert (folder / "shop" / "server.log").exists()
        assert "inflora watch" in screen.shown


def test_asks_about_a_store_whatever_its_name(folder: Path, address: str) -> None:
    (folder / "config" / "inflora").mkdir(parents=True)
    config = folder / "config" / "inflora" / "config.toml"
    config.write_text(f'server = "{address}"\n[serve]\nstore = "[red]/[/x]"\n')
    with terminal(["learn", "photos", "--detach"], folder, environ(folder)) as screen:
        screen.until("with its store in [red]/[/x]?")
        screen.press(f"n{ENTER}")
        assert screen.end() == 3


def test_ctrl_c_while_it_starts_leaves_no_server(folder: Path, address: str) -> None:
    words = ["--server", address, "learn", "photos", "--start-server"]
    with terminal(words, folder, environ(folder)) as screen:
        screen.until("starting a server")
        screen.press(CTRL_C)
        assert screen.end() == 130
    assert "the server was stopped before it listened" in screen.shown
    assert inflora(folder, "--server", address, "tasks").returncode == 3


def test_without_a_terminal_it_says_how(folder: Path, address: str) -> None:
    found = inflora(folder, "--server", address, "learn", "photos")
    assert found.returncode == 3
    (line,) = found.stderr.splitlines()
    assert "inflora serve" in line
    assert "--start-server" in line
    assert not (folder / "inflora-store").exists()


def test_one_that_does_not_start_says_why(folder: Path, address: str) -> None:
    (folder / "inflora-store").mkdir()
    (folder / "inflora-store" / "notes.txt").write_text("no store")
    found = inflora(folder, "--server", address, "learn", "photos", "--start-server")
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert "the server did not start: inflora_service: error: inflora-store has no FORMAT" in line
    log = Path(line.rpartition("see ")[2])
    assert "no FORMAT" in (folder / log).read_text()
    assert [path.name for path in (folder / "inflora-store").iterdir()] == ["notes.txt"]


def test_a_configuration_that_makes_no_sense_is_told_before(folder: Path, address: str) -> None:
    (folder / "config" / "inflora").mkdir(parents=True)
    (folder / "config" / "inflora" / "config.toml").write_text("[serve]\nstor = 'x'\n")
    found = inflora(folder, "--server", address, "learn", "photos", "--start-server")
    assert found.returncode == 2
    assert "no server can be started" in found.stderr
    assert "'stor'" in found.stderr


@pytest.mark.parametrize(
    "server", ["example.org:50051", "localhost", "unix:/tmp/x", "dns:///localhost:1"]
)
def test_it_is_only_for_this_machine(folder: Path, server: str) -> None:
    words = ["--server", server, "learn", str(folder / "photos"), "--start-server"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert f"not at {server}" in result.stderr


def test_the_client_alone_cannot(
    folder: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--server", address, "learn", str(folder / "photos"), "--start-server"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "the server is not installed here" in result.stderr
