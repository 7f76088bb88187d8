"""Logs as JSON lines, with the ids of what a line is about; server and worker write them alike.

    {"time": "2026-11-26T22:08:16.123+00:00", "level": "INFO", "process": "server",
     "logger": "inflora_service.tasks", "message": "task ... accepted", "request_id": "..."}

``request_id``, ``task``, ``version``, ``trace_id``, ``span_id`` and ``exception`` are there where
there is something to say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from inflora_core import tracing

Format: TypeAlias = Literal["text", "json"]

_ABOUT: ContextVar[Mapping[str, str | int]] = ContextVar("about", default={})  # noqa: B039
"""What the present work is about; never changed in place."""


def note(**ids: str | int) -> None:
    """Have all that the present coroutine or thread logs from now on say what it is about."""
    _ABOUT.set({**_ABOUT.get(), **ids})


def noted(name: str) -> str | int | None:
    """Return an id of what the present work is about, None if it has none."""
    return _ABOUT.get().get(name)


@contextmanager
def about(**ids: str | int) -> Iterator[None]:
    """Have all that the block logs say what it is about: ``task``, ``version``, ``request_id``."""
    token = _ABOUT.set({**_ABOUT.get(), **ids})
    try:
        yield
    finally:
        _ABOUT.reset(token)


class JsonFormatter(logging.Formatter):
    """Makes each record one line, whatever is in it.

    Args:
        process: Which of our processes writes.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a JSON object."""
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, str | int] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_ABOUT.get(),
        }
        if parent := tracing.traceparent():
            _, line["trace_id"], line["span_id"], _ = parent.split("-")
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # in ASCII: nothing in a message can end the line


def configure(form: Format, level: int | str, process: str, text: str) -> None:
    """Set up logging for this process.

    Args:
        form: ``text`` for people, ``json`` for machines.
        level: Least severe messages to log.
        process: Which of our processes this is.
        text: How a line looks as text, in the ``%`` style of ``logging``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=level, handlers=[handler])
    if form == "json":
        logging.captureWarnings(True)  # else they are lines of another kind
