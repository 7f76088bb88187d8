"""Options of the server from flags, the environment and a file, in this order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_service.__main__ import _parser, _settings
from inflora_service.configuring import PREFIX

OPTION = "keep-versions"


def variable(option: str) -> str:
    return PREFIX + option.upper().replace("-", "_")


def toml(path: Path, content: str) -> dict[str, str]:
    """Write a file, and return the environment that names it."""
    path.write_text(content)
    return {"INFLORA_CONFIG": str(path)}


@given(
    flag=st.none() | st.integers(0, 9),
    environment=st.none() | st.integers(10, 19),
    file=st.none() | st.integers(20, 29),
)
def test_flags_come_before_the_environment_and_both_before_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    flag: int | None,
    environment: int | None,
    file: int | None,
) -> None:
    environ = toml(
        tmp_path_factory.mktemp("config") / "c.toml",
        "" if file is None else f"[serve]\n{OPTION} = {file}\n",
    )
    if environment is not None:
        environ[variable(OPTION)] = str(environment)
    words = [] if flag is None else [f"--{OPTION}", str(flag)]
    result, origins = _parser().settled(words, environ)
    candidates = [("flag", flag), ("environment", environment), ("file", file), (None, 0)]
    origin, value = next(each for each in candidates if each[1] is not None)
    assert (origins.get("keep_versions"), result.keep_versions) == (origin, value)
    assert _settings(result).retention.versions == value


@pytest.mark.parametrize(
    ("content", "environ", "words", "insecure"),
    [
        ("insecure = true", {}, [], True),
        ("insecure = true", {"insecure": "no"}, [], False),
        ("insecure = false", {"insecure": "1"}, [], True),
        ("insecure = false", {}, ["--insecure"], True),
        ("", {}, [], False),
    ],
)
def test_switches_can_be_switched_off(
    tmp_path: Path, content: str, environ: dict[str, str], words: list[str], insecure: bool
) -> None:
    variables = {variable(name): value for name, value in environ.items()}
    named = toml(tmp_path / "c.toml", f"[serve]\n{content}\n")
    result, _ = _parser().settled(words, named | variables)
    assert result.insecure is insecure


def test_what_can_be_given_again_adds_up(tmp_path: Path) -> None:
    environ = toml(tmp_path / "c.toml", '[serve]\nset = ["rank=3", "seed=1"]\n')
    environ[variable("set")] = "seed=2"
    result, _ = _parser().settled(["--set", "rank=5"], environ)
    assert (_settings(result).learn.rank, _settings(result).learn.seed) == (5, 2)


def test_what_is_shown_is_a_file_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = _parser()
    words = ["--store", "shop", "--gate-leak", "off", "--set", "rank=3", "--insecure"]
    shown = parser.shown(*parser.settled(words, {}))
    assert "[serve]\n" in shown
    assert 'store = "shop"  # flag' in shown
    assert "port = 50051  # default" in shown
    (tmp_path / "c.toml").write_text(shown)
    again, _ = parser.settled(["--config", str(tmp_path / "c.toml")], {})
    assert _settings(again) == _settings(parser.parse_args(words))
    assert set(tomllib.loads(shown)["serve"]) >= {"store", "port", "gate-leak", "keep-versions"}


@pytest.mark.parametrize(
    ("content", "environ", "said"),
    [
        ("[serve]\nprt = 3", {}, "c.toml [serve]: there is no option 'prt'"),
        ("[serve]\nport = 'x'", {}, "c.toml [serve]: argument --port: 'x' is no port"),
        ("[serve]\ninsecure = 3", {}, "[serve]: argument --insecure: 3 is neither true nor false"),
        ("[serve]\nconfig = 'x'", {}, "there is no option 'config'"),
        ("serve = 3", {}, "'serve' has to be a table"),
        ("[serve", {}, "c.toml: "),
        ("", {"INFLORA_SERVE_PRT": "3"}, "environment: there is no option 'prt'"),
        ("", {"INFLORA_SERVE_PORT": "x"}, "environment: argument --port: 'x' is no port"),
        ("", {"INFLORA_CONFIG": "/nowhere.toml"}, "/nowhere.toml: "),
        ("", {"INFLORA_SERVE_PORT": "65536"}, "'65536' is no port, 0 to 65535"),
        ("[serve]\nhealth-port = -1", {}, "'-1' is no port, 0 to 65535"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    environ: dict[str, str],
    said: str,
) -> None:
    named: dict[str, Any] = toml(tmp_path / "c.toml", content)
    with pytest.raises(SystemExit, match="2"):
        _parser().settled([], named | environ)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        shown = subprocess.run(
            [sys.executable, "-m", "inflora_service", "--show-config"],
            stdout=output,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (shown.returncode, shown.stderr) == (-signal.SIGPIPE, b"")
