"""Help that can be trusted: examples that parse, exit codes that are met, words that Tab offers."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inflora_client.cli import app
from inflora_service import __main__ as server_program
from inflora_service import doctor, report
from tests.clients.peer import Peer, status
from tests.clients.terminal import CTRL_C, MAIN, environment, terminal
from tests.clients.walking import COMMANDS, PROCESSES, PROGRAM

PARSERS = {
    "serve": server_program._parser(),
    "doctor": doctor._parser(),
    "report": report._parser(),
}
"""Of the programs that commands become."""


def example_lines(text: str) -> list[str]:
    _, separator, examples = text.partition("Example")
    assert separator, text
    return [line.strip() for line in examples.splitlines() if "inflora " in line]


def words_of(line: str) -> list[list[str]]:
    """The words of each `inflora` in a line of a shell, without its name."""
    parts = " ".join(shlex.split(line, comments=True, posix=False)).split(" | ")
    found = [shlex.split(part) for part in parts]
    return [words[1:] for words in found if words[0] == "inflora"]


def parse(command: Any, words: list[str], parent: Any = None) -> tuple[str, Any]:
    """Parse words as the program does, and run nothing; return the command's name and context."""
    context = command.make_context(command.name or "inflora", list(words), parent=parent)
    if not getattr(command, "commands", None):
        return command.name, context
    left = [*context._protected_args, *context.args]
    _, below, rest = command.resolve_command(context, left)
    name, found = parse(below, rest, context)
    return f"{command.name} {name}".strip(), found


@pytest.fixture
def _files_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples name, so that the parser finds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for folder in ("photos", "test-photos", "cifar10"):
        (tmp_path / folder).mkdir()
    for file in ("train.csv", "test.csv", "photos.tar.gz", "new.jpg", "another.png"):
        (tmp_path / file).touch()


class TestExamples:
    @pytest.mark.usefixtures("_files_of_examples")
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_some_that_parse(self, name: str) -> None:
        examples = example_lines(COMMANDS[name].epilog or "")
        found = [parse(PROGRAM, words) for line in examples for words in words_of(line)]
        assert found
        assert {command for command, _ in found} == {name}
        for _, context in found:
            if name in PROCESSES:
                PARSERS[name].parse_args(context.args)

    @pytest.mark.usefixtures("_files_of_examples")
    def test_the_program_has_one_itself(self) -> None:
        (line,) = example_lines(PROGRAM.epilog.partition("Exit codes")[0])
        assert [parse(PROGRAM, words)[0] for words in words_of(line)] == ["learn"]

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name not in PROCESSES])
    def test_help_shows_them(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        result = CliRunner().invoke(app, [*name.split(), "--help"])
        assert result.exit_code == 0, result.output
        assert example_lines(result.stdout) == example_lines(COMMANDS[name].epilog)

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name not in PROCESSES])
    def test_help_shows_all_of_every_option(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What looks like markup in a text would be missing."""
        monkeypatch.setenv("COLUMNS", "400")
        shown = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
        for parameter in COMMANDS[name].params:
            assert parameter.help in shown, parameter.name

    @pytest.mark.parametrize("name", PROCESSES)
    def test_so_does_the_help_of_programs_of_their_own(self, name: str, tmp_path: Path) -> None:
        result = inflora(tmp_path, name, "--help")
        assert result.returncode == 0, result.stderr
        shown = " ".join(result.stdout.split())
        assert f"Example: inflora {name} " in shown
        words = shown.rpartition(f"Example: inflora {name} ")[2].split()
        PARSERS[name].parse_args(words)


def inflora(folder: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, words)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environment(XDG_CONFIG_HOME=str(folder), **more),
        check=False,
    )


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return f"localhost:{taken.getsockname()[1]}"


class TestExitCodes:
    """Those of servers are in ``tests/service/test_exit_codes.py``."""

    def documented(self) -> set[int]:
        _, _, codes = PROGRAM.epilog.partition("Exit codes:")
        return {int(code) for code in re.findall(r"^(\d+) +\w", codes, re.MULTILINE)}

    def test_all_that_are_documented_are_met(self, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        peer.add_task("t1", state="TASK_STATE_LEARNING", fraction_done=0.5)
        at = ("--server", peer.address)
        met = {
            inflora(tmp_path, *at, "versions").returncode: "done",
            inflora(tmp_path, *at, "promote", "9").returncode: "refused",
            inflora(tmp_path, *at, "learn", "no-such-folder").returncode: "wrong usage",
            inflora(tmp_path, "--server", nobody(), "tasks").returncode: "unreachable",
        }
        with terminal([*at, "watch", "t1"], tmp_path) as screen:
            screen.until("50%")
            screen.press(CTRL_C)
            screen.until("or cancel it?")
            met[screen.interrupt()] = "interrupted"
        assert met == {
            0: "done",
            1: "refused",
            2: "wrong usage",
            3: "unreachable",
            130: "interrupted",
        }
        assert set(met) == self.documented()

    def test_a_task_that_is_not_published_is_a_failure(self, peer: Peer, tmp_path: Path) -> None:
        peer.release.set()
        for state in ("FAILED", "CANCELLED", "SET_ASIDE", "HELD_BACK"):
            peer.add_task("t1", state=f"TASK_STATE_{state}")
            found = inflora(tmp_path, "--server", peer.address, "watch", "t1")
            assert found.returncode == 1
            (line,) = found.stderr.splitlines()
            assert f"ended as {state}; " in line, "and what to do next"

    def test_a_file_that_cannot_be_read_or_written(self, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        at = ("--server", peer.address)
        for words in (["predict", "gone.png"], ["export", "--output", "gone/model.onnx"]):
            found = inflora(tmp_path, *at, *words)
            assert found.returncode == 2
            (line,) = found.stderr.splitlines()
            assert "gone" in line
            assert "check the name" in line

    @pytest.mark.parametrize(
        ("code", "hint"),
        [
            ("ALREADY_EXISTS", "choose another name"),
            ("FAILED_PRECONDITION", "inflora tasks"),
            ("RESOURCE_EXHAUSTED", "repeat it later"),
            ("DEADLINE_EXCEEDED", "repeat it"),
            ("DATA_LOSS", "inflora doctor"),
            ("INTERNAL", "the server's log"),
            ("NOT_FOUND", "inflora versions"),
            ("UNAUTHENTICATED", "--token-file"),
            ("PERMISSION_DENIED", "another role"),
        ],
    )
    def test_what_is_refused_says_what_to_do_next(self, peer: Peer, code: str, hint: str) -> None:
        peer.failures["PromoteVersion"].append(status(code, "no"))
        result = CliRunner().invoke(app, ["--server", peer.address, "promote", "1"])
        assert result.exit_code == 1
        assert result.stderr.startswith("inflora: no; ")
        assert hint in result.stderr

    def test_nobody_has_to_read_all_of_it(self, peer: Peer, tmp_path: Path) -> None:
        """`inflora versions | head` ends without a word on the broken pipe."""
        for _ in range(5):
            peer.add_version()
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as closed:
            process = subprocess.run(
                [sys.executable, "-c", MAIN, "--server", peer.address, "--json", "versions"],
                stdout=closed,
                stderr=subprocess.PIPE,
                cwd=tmp_path,
                env=environment(XDG_CONFIG_HOME=str(tmp_path)),
                check=False,
            )
        assert process.stderr == b""
        assert process.returncode == 1


class TestCompletion:
    @pytest.fixture
    def history(self, peer: Peer) -> Iterator[Peer]:
        peer.add_task("t1", state="TASK_STATE_PUBLISHED")
        peer.add_task("u2", state="TASK_STATE_QUEUED")
        for _ in range(12):
            peer.add_version()
        return peer

    def offered(self, folder: Path, line: str, **more: str) -> list[str]:
        """What Bash would offer for the last word of a line."""
        words = line.split(" ")
        found = inflora(
            folder,
            COMP_WORDS=line,
            COMP_CWORD=str(len(words) - 1),
            _INFLORA_COMPLETE="complete_bash",
            **more,
        )
        assert found.stderr == ""
        return found.stdout.split()

    @pytest.mark.parametrize(
        ("line", "offers"),
        [
            ("inflora ver", ["versions"]),
            ("inflora watch ", ["u2", "t1"]),
            ("inflora cancel t", ["t1"]),
            ("inflora predict x.png --task u", ["u2"]),
            ("inflora promote 1", ["12", "11", "10", "1"]),
            ("inflora export --version 12", ["12"]),
            ("inflora evaluate x --version 9", ["9"]),
            ("inflora forget c", ["cat"]),
        ],
    )
    def test_offers_what_there_is(
        self, history: Peer, tmp_path: Path, line: str, offers: list[str]
    ) -> None:
        assert self.offered(tmp_path, line, INFLORA_SERVER=history.address) == offers

    def test_asks_the_server_that_the_command_would(self, history: Peer, tmp_path: Path) -> None:
        at = history.address
        assert self.offered(tmp_path, f"inflora --server {at} watch t") == ["t1"]
        assert self.offered(tmp_path, f"inflora watch --server {at} t") == ["t1"]
        (tmp_path / "inflora").mkdir()
        (tmp_path / "inflora" / "config.toml").write_text(f'server = "{at}"\n')
        assert self.offered(tmp_path, "inflora watch t") == ["t1"]

    @pytest.mark.parametrize("code", ["UNAUTHENTICATED", "UNAVAILABLE", "INTERNAL"])
    def test_is_silent_if_the_server_says_nothing(
        self, history: Peer, tmp_path: Path, code: str
    ) -> None:
        history.failures["ListTasks"].append(status(code))
        assert self.offered(tmp_path, "inflora watch t", INFLORA_SERVER=history.address) == []

    def test_is_silent_if_nobody_listens_or_answers(self, tmp_path: Path) -> None:
        assert self.offered(tmp_path, "inflora watch t", INFLORA_SERVER=nobody()) == []
        with socket.socket() as mute:
            mute.bind(("localhost", 0))
            mute.listen()
            address = f"localhost:{mute.getsockname()[1]}"
            assert self.offered(tmp_path, "inflora watch t", INFLORA_SERVER=address) == []
        secret = {"INFLORA_TOKEN_FILE": "gone", "INFLORA_SERVER": "example.invalid:1"}
        assert self.offered(tmp_path, "inflora watch t", **secret) == []

    def test_what_a_shell_would_not_take_as_one_word_is_not_offered(
        self, history: Peer, tmp_path: Path
    ) -> None:
        current = history.add_version()
        for label in ("red apple", r"\$(touch ran)", "a;b", "*", "=ls", "-x", "~", "Käfer", "c-3"):
            current.classes.add(label=label)
        offered = self.offered(tmp_path, "inflora forget ", INFLORA_SERVER=history.address)
        assert offered == ["cat", "Käfer", "c-3"]

    @pytest.mark.parametrize("line", ["forget ", "watch ", "promote "])
    def test_nothing_that_a_server_says_becomes_code(
        self, history: Peer, tmp_path: Path, line: str
    ) -> None:
        """Zsh evaluates what it is told twice: itself, then in its function `_arguments`."""
        hostile = r"\$(touch ran)"
        current = history.add_version()
        current.classes.add(label=hostile)
        current.task = history.add_task(hostile, state="TASK_STATE_QUEUED").name
        told = inflora(
            tmp_path,
            INFLORA_SERVER=history.address,
            _TYPER_COMPLETE_ARGS=f"inflora {line}",
            _INFLORA_COMPLETE="complete_zsh",
        ).stdout
        assert '"' in told, "something is offered"
        zsh = '_arguments() { local words=${1#*((}; eval "words=( ${words%))} )"; }; eval "$1"'
        subprocess.run(["bash", "-c", zsh, "bash", told], cwd=tmp_path, check=True)
        assert not (tmp_path / "ran").exists()

    def test_can_be_installed(self, history: Peer, tmp_path: Path) -> None:
        """Bash itself reads what was installed, and presses Tab."""
        program = tmp_path / "bin" / "inflora"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{MAIN}" "$@"\n')
        program.chmod(0o755)
        env = environment(
            HOME=str(tmp_path),
            XDG_CONFIG_HOME=str(tmp_path),
            INFLORA_SERVER=history.address,
            PATH=f"{program.parent}:{os.environ['PATH']}",
        )

        def bash(script: str) -> str:
            return subprocess.run(
                ["bash", "-c", script], capture_output=True, text=True, env=env, check=True
            ).stdout

        assert "bash completion installed" in bash("inflora --install-completion; true")
        offered = bash(
            'source "$HOME/.bashrc"; COMP_WORDS=(inflora watch t); COMP_CWORD=2; '
            "_inflora_completion inflora; echo ${COMPREPLY[@]}"
        )
        assert offered.split() == ["t1"]
