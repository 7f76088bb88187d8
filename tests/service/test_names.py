"""Resource names and page tokens."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_core.errors import InvalidInputError, NotFoundError
from inflora_service import names


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_a_task_s_name_is_read_as_it_was_written(task: str) -> None:
    assert names.parse_task(names.task_name(task), field="name") == task


@given(st.integers(1, 999_999_999))
def test_a_version_s_name_is_read_as_it_was_written(number: int) -> None:
    assert names.parse_version(names.version_name(number), field="name") == number
    assert names.parse_version_or_current(names.version_name(number), field="name") == number


def test_the_current_version_has_a_name_where_that_is_allowed() -> None:
    name = "models/default/versions/current"
    assert names.parse_version_or_current(name, field="name") is None
    with pytest.raises(InvalidInputError) as caught:
        names.parse_version(name, field="version")
    assert caught.value.field == "version"


@given(st.text())
def test_any_other_text_is_refused_with_its_field(text: str) -> None:
    for parse in (names.parse_task, names.parse_version, names.parse_version_or_current):
        with pytest.raises(InvalidInputError) as caught:
            parse(text, field="some.field")
        assert caught.value.field == "some.field"
        caught.value.message.encode()  # can be sent, also when the text is no valid Unicode


@pytest.mark.parametrize(
    "name",
    [
        "",
        "models/default/tasks/",
        "models/default/tasks/a/b",
        "models/default/tasks/..",
        "models/default/tasks/-a",
        "models/default/tasks/a\n",
        "models/default/tasks/A",
        "models/default/versions/1",
        "/models/default/tasks/a",
        "models/default/tasks/" + "a" * 64,
    ],
)
def test_what_is_no_task_s_name(name: str) -> None:
    with pytest.raises(InvalidInputError):
        names.parse_task(name, field="name")


@pytest.mark.parametrize("number", ["0", "-1", "01", "1.0", "1e3", "9" * 10, "١", ""])
def test_what_is_no_version_s_number(number: str) -> None:
    with pytest.raises(InvalidInputError):
        names.parse_version(f"models/default/versions/{number}", field="name")


def test_there_is_one_model() -> None:
    names.check_model("", field="parent")
    names.check_model("models/default", field="parent")
    for check, name in (
        (names.check_model, "models/other"),
        (names.parse_task, "models/other/tasks/a"),
        (names.parse_version, "models/other/versions/1"),
    ):
        with pytest.raises(NotFoundError) as caught:
            check(name, field="parent")
        assert caught.value.field == "parent"


rows = st.lists(st.integers(1, 2**63 - 1), unique=True, max_size=30).map(
    lambda numbers: [(number, f"entry {number}") for number in sorted(numbers, reverse=True)]
)


@given(rows, st.integers(1, 10))
def test_pages_joined_are_the_list(rows: list[tuple[int, str]], size: int) -> None:
    seen: list[str] = []
    token = ""
    while True:
        page = names.Page.of("tasks", size, token)
        rest = [row for row in rows if page.before is None or row[0] < page.before]
        entries, token = page.cut(rest[: page.size + 1])
        assert len(entries) <= size
        seen += entries
        if not token:
            break
    assert seen == [entry for _, entry in rows]


def _token(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode()


@pytest.mark.parametrize(
    "token",
    [
        "nonsense",
        "ünïcode",
        "====",
        _token(None),
        _token([]),
        _token({"kind": "tasks"}),
        _token(["tasks", "models/default", "7"]),
        _token(["tasks", "models/default", 0]),
        _token(["tasks", "models/default", True]),
        _token(["tasks", "models/default", 2**63]),
        _token(["tasks", "models/other", 7]),
        _token(["versions", "models/default", 7]),
        base64.urlsafe_b64encode(b"[" * 100_000).decode(),
    ],
)
def test_what_is_no_page_token_of_the_list(token: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        names.Page.of("tasks", 10, token)
    assert caught.value.field == "page_token"


@given(st.text(min_size=1))
def test_no_text_is_a_page_token_by_accident(token: str) -> None:
    with pytest.raises(InvalidInputError):
        names.Page.of("tasks", 10, token)


def test_page_sizes() -> None:
    assert names.Page.of("tasks", 0, "").size == names.DEFAULT_PAGE_SIZE
    assert names.Page.of("tasks", 1000, "").size == 1000
    for size in (-1, 1001):
        with pytest.raises(InvalidInputError) as caught:
            names.Page.of("tasks", size, "")
        assert caught.value.field == "page_size"
