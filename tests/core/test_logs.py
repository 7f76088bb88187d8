"""Logs as JSON: a line for each message, whatever it says, with what it is about."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from inflora_core import logs
from inflora_core.logs import JsonFormatter, about


@pytest.fixture(autouse=True)
def _nothing_noted() -> Iterator[None]:
    """What a worker that ran in this process was about is of no interest here."""
    token = logs._ABOUT.set({})
    yield
    logs._ABOUT.reset(token)


def line(message: str, *arguments: object, **more: Any) -> dict[str, Any]:
    """Return a message as it is read from a log."""
    record = logging.LogRecord("a.logger", logging.INFO, "here.py", 1, message, arguments, **more)
    (text,) = JsonFormatter("server").format(record).splitlines()
    read: dict[str, Any] = json.loads(text)
    return read


def test_what_a_line_has() -> None:
    read = line("version %d is current", 3, exc_info=None)
    age = datetime.now(UTC) - datetime.fromisoformat(read.pop("time"))
    assert abs(age) < timedelta(minutes=1)
    assert read == {
        "level": "INFO",
        "process": "server",
        "logger": "a.logger",
        "message": "version 3 is current",
    }


@pytest.mark.parametrize("message", ['two\nlines, "quoted"', "\u2028 \x85 \x00 \ud800", "100%"])
def test_no_message_ends_its_line(message: str) -> None:
    assert line(message, exc_info=None)["message"] == message


def test_an_error_has_its_traceback() -> None:
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        read = line("oh", exc_info=sys.exc_info())
    assert "ZeroDivisionError" in read["exception"]
    assert __file__ in read["exception"]


def test_what_a_line_is_about() -> None:
    def ids() -> dict[str, Any]:
        read = line("x", exc_info=None)
        return {name: read[name] for name in ("request_id", "task", "version") if name in read}

    found = [ids()]
    with about(request_id="r", task="t"):
        found.append(ids())
        with about(task="u", version=3):
            found.append(ids())
        found.append(ids())
        thread = threading.Thread(target=lambda: found.append(ids()))
        thread.start()
        thread.join()
    found.append(ids())
    inner = {"request_id": "r", "task": "u", "version": 3}
    outer = {"request_id": "r", "task": "t"}
    assert found == [{}, outer, inner, outer, {}, {}]
    assert logs.noted("task") is None


PROGRAM = """
import logging, warnings
from inflora_core import logs
logs.configure({form!r}, "INFO", "worker", "text: %(message)s")
logging.getLogger("x").debug("not this")
logging.getLogger("x").info("this")
warnings.warn("and this")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_process_that_logs(form: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(form=form)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ended.stderr.splitlines()
    if form == "text":
        assert lines[0] == "text: this"
        return
    read = [json.loads(each) for each in lines]
    assert [(each["logger"], each["process"]) for each in read] == [
        ("x", "worker"),
        ("py.warnings", "worker"),
    ]
    assert "and this" in read[1]["message"]
