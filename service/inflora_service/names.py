"""Resource names and page tokens: the strings that a client hands back to us."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from inflora_core.errors import InvalidInputError, NotFoundError
from inflora_core.store import MODEL

T = TypeVar("T")

MODEL_NAME = f"models/{MODEL}"

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50

_ID = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_MODEL = re.compile(rf"models/({_ID})")
_TASK = re.compile(rf"models/({_ID})/tasks/({_ID})")
# Nine digits: more versions than a disk holds, and the number always fits an int32 and a file name.
_NUMBER = r"[1-9][0-9]{0,8}"
_VERSION = re.compile(rf"models/({_ID})/versions/({_NUMBER}|current)")


def is_task_id(text: str) -> bool:
    """Whether ``text`` can be the id of a task, or of an upload."""
    return re.fullmatch(_ID, text) is not None


def task_name(task: str) -> str:
    """Return the name of the task with id ``task``."""
    return f"{MODEL_NAME}/tasks/{task}"


def version_name(number: int) -> str:
    """Return the name of version ``number``."""
    return f"{MODEL_NAME}/versions/{number}"


def check_model(name: str, *, field: str) -> None:
    """Accept the name of the server's model, or "" for it.

    Raises:
        InvalidInputError: it is not a model's name.
        NotFoundError: there is no such model.
    """
    if name:
        _match(_MODEL, name, "models/{model}", field)


def parse_task(name: str, *, field: str) -> str:
    """Return the id in a task's name.

    Raises:
        InvalidInputError: it is not a task's name.
        NotFoundError: there is no such model.
    """
    return _match(_TASK, name, "models/{model}/tasks/{task}", field)[2]


def parse_version(name: str, *, field: str) -> int:
    """Return the number in a version's name.

    Raises:
        InvalidInputError: it is not a version's name.
        NotFoundError: there is no such model.
    """
    number = parse_version_or_current(name, field=field)
    if number is None:
        raise InvalidInputError(f"{name!r} names no fixed version: give its number", field=field)
    return number


def parse_version_or_current(name: str, *, field: str) -> int | None:
    """Return the number in a version's name, None for ``.../versions/current``.

    Raises:
        InvalidInputError: it is not a version's name.
        NotFoundError: there is no such model.
    """
    number = _match(_VERSION, name, "models/{model}/versions/{n}", field)[2]
    return None if number == "current" else int(number)


def check_model_id(text: str, *, field: str) -> None:
    """Accept the id of the server's model.

    Raises:
        InvalidInputError: there is none.
        NotFoundError: there is no such model.
    """
    if not text:
        raise InvalidInputError(f"say which model is meant: {MODEL!r}", field=field)
    if text != MODEL:
        raise NotFoundError(f"there is no model {short(text)}, only {MODEL!r}", field=field)


def parse_number(text: str, *, field: str) -> int | None:
    """Return the number of a version, None for "".

    Raises:
        InvalidInputError: it is not the number of a version.
    """
    if text and not re.fullmatch(_NUMBER, text):
        raise InvalidInputError(f"{short(text)} is not the number of a version", field=field)
    return int(text) if text else None


def _match(pattern: re.Pattern[str], name: str, form: str, field: str) -> re.Match[str]:
    match = pattern.fullmatch(name)
    if match is None:
        raise InvalidInputError(f"{short(name)} is not a name of the form {form}", field=field)
    if match[1] != MODEL:
        raise NotFoundError(f"there is no model {match[1]!r}, only {MODEL!r}", field=field)
    return match


def short(name: str) -> str:
    """Return ``name`` quoted, and cut to what an error message can carry."""
    return ascii(name if len(name) <= 100 else name[:100] + "...")


@dataclass(frozen=True)
class Page:
    """Which part of a list a client asks for.

    Attributes:
        kind: Which list: ``tasks`` or ``versions``.
        size: Entries at most.
        before: The page begins with the first entry whose number is smaller; None: with the newest.
    """

    kind: str
    size: int
    before: int | None

    @classmethod
    def of(cls, kind: str, page_size: int, page_token: str) -> Page:
        """Return the page that a request asks for.

        Raises:
            InvalidInputError: the size is out of its limits, or the token of another list.
        """
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            raise InvalidInputError(
                f"a page holds 0 (for {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE} entries, "
                f"not {page_size}",
                field="page_size",
            )
        before = _decode_token(page_token, kind) if page_token else None
        return cls(kind, page_size or DEFAULT_PAGE_SIZE, before)

    def cut(self, rows: Sequence[tuple[int, T]]) -> tuple[list[T], str]:
        """Return the page's entries, and the token of the next page or "".

        Args:
            rows: (number, entry), newest first; one more than ``size`` where there are more.
        """
        shown = rows[: self.size]
        token = _encode_token(self.kind, shown[-1][0]) if len(rows) > self.size else ""
        return [entry for _, entry in shown], token


def _encode_token(kind: str, before: int) -> str:
    content = json.dumps([kind, MODEL_NAME, before])
    return base64.urlsafe_b64encode(content.encode()).decode()


def _decode_token(token: str, kind: str) -> int:
    try:
        found, parent, before = json.loads(base64.b64decode(token.encode(), b"-_", validate=True))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInputError("it is not a page token", field="page_token") from error
    if type(before) is not int or not 0 < before < 2**63:
        raise InvalidInputError("it is not a page token", field="page_token")
    if (found, parent) != (kind, MODEL_NAME):
        raise InvalidInputError("the page token is of another list", field="page_token")
    return before
