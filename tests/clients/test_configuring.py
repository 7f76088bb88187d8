"""Options of the command line from a file and the environment, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from inflora_client.cli import app
from tests.clients.peer import Peer

Run = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder that has nothing yet; returns where its file is to be."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "inflora").mkdir()
    return tmp_path / "inflora" / "config.toml"


@pytest.fixture
def run(home: Path) -> Run:
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


def shown(result: Result) -> dict[str, tuple[object, str]]:
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {row["option"]: (row["value"], row["origin"]) for row in rows}


def test_flags_come_before_the_environment_and_both_before_the_file(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def server() -> tuple[object, str]:
        return shown(run("config", "show", "--json"))["server"]

    assert server() == ("localhost:50051", "default")
    home.write_text('server = "file:1"\ntls = true\n')
    assert server() == ("file:1", "file")
    monkeypatch.setenv("INFLORA_SERVER", "environment:1")
    assert server() == ("environment:1", "environment")
    found = shown(run("--server", "flag:1", "config", "show", "--json"))
    assert found["server"] == ("flag:1", "flag")
    assert found["tls"] == (True, "file")
    assert found["key"] == (None, "default")


def test_another_file_can_be_named(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text('server = "home:1"\n')
    other = tmp_path / "other.toml"
    other.write_text('server = "other:1"\n')
    assert shown(run("--config", other, "config", "show", "--json"))["server"][0] == "other:1"
    monkeypatch.setenv("INFLORA_CONFIG", str(other))
    result = run("config", "show")
    assert "other:1" in result.stdout
    assert f"file: {other}" in result.stderr


def test_a_table_has_the_options_of_its_command(
    run: Run, home: Path, peer: Peer, tmp_path: Path
) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "1.png").write_bytes(b"cat")
    home.write_text(
        f'server = "{peer.address}"\njson = true\n'
        "[learn]\nepochs = 7\nheld-out-share = 0.25\ndetach = true\n[serve]\nany = 1\n"
    )
    result = run("learn", tmp_path / "pets", "--epochs", 9)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["state"] == "QUEUED"
    spec = peer.calls["LearnTask"][0][0].spec
    assert (spec.epochs, spec.held_out_share) == (9, 0.25)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("serv = 'x'", "there is no option 'serv': is it 'server'?"),
        ("[lern]\nepochs = 3", "there is no table 'lern': is it 'learn'?"),
        ("[learn]\nepocs = 3", "[learn]: there is no option 'epocs': is it 'epochs'?"),
        ("[learn.more]\nepochs = 3", "[learn]: there is no table 'more'"),
        ("config = 'x'", "there is no option 'config'"),
        ("server = ", "config.toml: "),
    ],
)
def test_what_is_wrong_is_named(run: Run, home: Path, content: str, said: str) -> None:
    home.write_text(content)
    result = run("config", "show")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert said in line


def test_a_value_that_makes_no_sense_is_named(run: Run, home: Path) -> None:
    home.write_text("[tasks]\njson = 'perhaps'\n")
    result = run("tasks")
    assert result.exit_code == 2
    assert "--json" in result.stderr


def test_a_file_that_is_named_has_to_be_there(run: Run, tmp_path: Path) -> None:
    result = run("--config", tmp_path / "none.toml", "config", "show")
    assert result.exit_code == 2
    assert "none.toml" in result.stderr


def test_help_needs_no_file(run: Run, home: Path) -> None:
    home.write_text("what is this")
    assert run("--help").exit_code == 0
