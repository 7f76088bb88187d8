"""Pictures and tables of made-up pasts: whatever was learned, they are well formed and say so."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_core.model import Failure, Forget, HeldOut, LayerReport, TaskReport, TaskState
from inflora_service import pictures, views
from inflora_service.lineage import Step
from inflora_service.overview import Cell, Lesson, Node, Overview, Source, finite, titled
from inflora_service.pictures import Picture
from inflora_service.pulse import Moment, quantile
from tests.service.test_records import make_task

SVG = "{http://www.w3.org/2000/svg}"
BEGAN = datetime(2026, 11, 27, tzinfo=UTC)
EVIL = "<script>alert(1)</script> & \"'"


def report(position: int, layers: int = 3, **changes: Any) -> TaskReport:
    """Return what came of a task."""
    shown = {
        "layers": tuple(
            LayerReport(f"blocks.{n}.attn", 64, 4, 64, 64 - position, 1e-7, 0.2)
            for n in range(layers)
        ),
        "threshold": 0.95,
        "training_accuracy": 1.0,
        "held_out_accuracy_task_known": None,
        "held_out_accuracy": 0.75,
        "held_out_counts": {"a": 3, "b": 1},
        "held_out_method": HeldOut.HELD_OUT,
        "temperature": 1.0,
        "tasks_left": None if position == 1 else 12.4,
        "class_bytes": 1,
        "shared_bytes": 1,
        "epoch_losses": (),
        "stage_seconds": {},
        "settings": {},
        "device": "cpu",
        **changes,
    }
    return TaskReport(**shown)


def past(tasks: int, accuracies: dict[tuple[int, int], float], **changes: Any) -> Overview:
    """Return what was learned in some tasks, and measured after them."""
    lessons = tuple(
        Lesson(n, f"task-{n}", n, (EVIL, f"class {n}"), BEGAN + timedelta(hours=n), report(n))
        for n in range(1, tasks + 1)
    )
    cells = {
        key: Cell(share, 20, Source.EVALUATED, key[0], BEGAN) for key, share in accuracies.items()
    }
    nodes = tuple(
        Node(
            Step(n, n - 1 or None, f"task-{n}", BEGAN, (EVIL,), n, report(n), False),
            "current" if n == tasks else "",
            n == tasks,
            n == 1,
            False,
        )
        for n in range(1, tasks + 1)
    )
    found = Overview(tasks or None, 2 * tasks, lessons, cells, nodes)
    return replace(found, **changes)


def drawn(picture: Picture) -> list[str]:
    """Return the texts of a picture once it is known to be one, in both of its forms."""
    for content in (picture.inline(), picture.alone()):
        root = ElementTree.fromstring(content)
        assert root.tag == f"{SVG}svg"
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None
        assert description is not None
        assert title.text
        assert description.text
        assert f"{title.get('id')} {description.get('id')}" == root.get("aria-labelledby")
        for each in root.iter():
            assert not {"style", "onload", "onclick"} & set(each.attrib)
            for value in each.attrib.values():
                assert "nan" not in value
                assert "inf" not in value
    assert "<style" not in picture.inline()
    return [text.text or "" for text in ElementTree.fromstring(picture.inline()).iter(f"{SVG}text")]


def all_of(found: Overview) -> list[Picture]:
    return [view.picture for view in views.views(found) if view.picture is not None]


class _Tags(HTMLParser):
    """The elements of a page, each of which must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(content: str) -> set[str]:
    parser = _Tags()
    parser.feed(content)
    assert not parser.open
    return parser.seen


@given(
    tasks=st.integers(1, 6),
    shares=st.lists(st.floats(0, 1), min_size=21, max_size=21),
    known=st.lists(st.booleans(), min_size=21, max_size=21),
)
def test_whatever_was_measured(tasks: int, shares: list[float], known: list[bool]) -> None:
    keys = [(after, task) for after in range(1, tasks + 1) for task in range(1, after + 1)]
    measured = {key: share for key, share, there in zip(keys, shares, known, strict=False) if there}
    found = past(tasks, measured)
    for picture in all_of(found):
        drawn(picture)
    cells = ElementTree.fromstring(pictures.accuracy(found.lessons, found.cells).inline())
    assert len(cells.findall(f"{SVG}rect/{SVG}title")) == len(measured)
    for each in found.fared:
        line = [measured[key] for key in keys if key in measured and key[1] == each.lesson.position]
        if len(line) > 1:
            assert each.lost == max(line[:-1]) - line[-1]
        else:
            assert each.lost is None
    lost = [each.lost for each in found.fared if each.lost is not None]
    assert (found.mean_lost is None) == (not lost)
    if found.mean_lost:
        assert found.mean_lost == (pytest.approx(np.mean(lost)), len(lost))
    newest = [measured[key] for key in keys if key in measured and key[0] == tasks]
    if found.mean_accuracy:
        assert found.mean_accuracy == (pytest.approx(np.mean(newest)), len(newest))
    else:
        assert not newest


@pytest.mark.parametrize("tasks", [1, 20, 41, 300])
def test_many_tasks_are_still_a_small_picture(tasks: int) -> None:
    measured = {(a, t): 0.9 for a in range(1, tasks + 1) for t in range(1, a + 1)}
    found = past(tasks, measured)
    for picture in all_of(found):
        drawn(picture)
        assert len(picture.inline()) < 250_000
        assert picture.height < 500
    assert len(pictures.accuracy(found.lessons, found.cells).inline()) > 500


def test_the_console_has_accuracies_of_the_newest_tasks_alone() -> None:
    measured = {(a, t): 0.9 for a in range(1, 201) for t in range(1, a + 1)}
    found = past(200, measured)
    (whole, *_), (short, *_) = views.views(found), views.views(found, 40)
    assert whole.table.count("<tr>") == 1 + 20_100
    assert short.table.count("<tr>") == 1 + 820
    assert "inflora report" in short.note
    assert "inflora report" not in whole.note


def test_no_number_is_none_in_plain_data() -> None:
    content = {"a": [math.nan, 1.5, {"b": (math.inf, "nan", None)}]}
    assert finite(content) == {"a": [None, 1.5, {"b": [None, "nan", None]}]}


def test_what_comes_from_outside_is_text() -> None:
    found = past(3, {(1, 1): 1.0, (2, 1): 0.5, (3, 1): 0.25})
    task = make_task(1, state=TaskState.FAILED, failure=Failure("X", EVIL), display_name=EVIL)
    forgotten = make_task(2, labels=(), example_counts=(), edit=Forget((EVIL,)))
    pieces = [view.content for view in views.views(found)]
    pieces += [views.tasks_table([task, forgotten]), views.tiles_html(views.tiles(found))]
    seen = set().union(*map(tags, pieces))
    assert "table" in seen
    assert not seen & {"script", "style", "img", "link", "iframe"}
    assert "&lt;script&gt;" in pieces[0]


def test_before_there_is_anything() -> None:
    nothing = past(0, {})
    for view in views.views(nothing):
        assert view.picture is None
        assert "inflora learn FOLDER" in view.content
    first = past(1, {})
    notes = {view.name: view.content for view in views.views(first)}
    assert "inflora evaluate FOLDER" in notes["accuracy"]
    assert "inflora evaluate FOLDER" in notes["forgetting"]
    assert "from the second on" in notes["interference"]
    without = Lesson(1, "t", 1, (), BEGAN, report(1, layers=0))
    assert "no attention layer" in str(views.views(replace(first, lessons=(without,))))


def test_other_images_are_said_to_be_others() -> None:
    """Held out when learned, then evaluated: only what is alike is compared, where there is any."""
    found = past(2, {(2, 1): 0.5})
    held_out = Cell(0.9, 4, Source.HELD_OUT, 1, BEGAN)
    one = replace(found, cells={**found.cells, (1, 1): held_out})
    (view,) = [view for view in views.views(one) if view.name == "forgetting"]
    assert "+40.0 pp*" in view.content
    more = past(3, {(2, 1): 0.6, (3, 1): 0.5})
    both = replace(more, cells={**more.cells, (1, 1): held_out})
    (view,) = [view for view in views.views(both) if view.name == "forgetting"]
    assert "+10.0 pp" in view.content
    assert "pp*" not in view.content


def test_branches_have_lanes_of_their_own() -> None:
    def node(number: int, parent: int | None, *, answering: bool = False) -> Node:
        step = Step(number, parent, f"t{number}", BEGAN, (), 1, report(1), False)
        return Node(step, "", answering, False, False)

    nodes = [node(1, None), node(2, 1), node(3, 2), node(4, 1), node(5, 4, answering=True)]
    picture = pictures.lineage(nodes)
    root = ElementTree.fromstring(picture.inline())
    heights = {
        text.text: circle.get("cy")
        for circle, text in zip(root.iter(f"{SVG}circle"), root.iter(f"{SVG}text"), strict=True)
    }
    assert heights["1"] == heights["4"] == heights["5"]
    assert heights["2"] == heights["3"] != heights["1"]
    assert "version 5 answers" in picture.description


def test_every_class_has_a_rule() -> None:
    found = past(5, {(5, t): 0.2 * t for t in range(1, 6)})
    moments = [Moment(60.0, 3.0, 3.0, 0.01, 0.02), Moment(0.0, 5.0, 5.0, 0.01, 0.5)]
    light, _, dark = pictures.stylesheet().partition("@media (prefers-color-scheme: dark)")
    for picture in (*all_of(found), pictures.latency(moments, 300.0)):
        for each in ElementTree.fromstring(picture.inline()).iter():
            for name in each.get("class", "").split():
                for rules in (light, dark):
                    assert name == "picture" or f".{name} {{" in rules, name


def test_numbers_in_a_heat_map_can_be_read() -> None:
    """Text and ground differ by WCAG's 4.5 to 1, light and dark."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    light, _, dark = pictures.stylesheet().partition("@media")
    for rules in (light, dark):
        grounds, texts = (
            {
                line.split()[0][len(kind) :]: line.split()[3].rstrip(";")
                for line in rules.splitlines()
                if line.startswith(kind) and line[len(kind)].isdigit()
            }
            for kind in (".p-h", ".p-c")
        )
        assert len(grounds) == 20
        for step, ground in grounds.items():
            pair = sorted((luminance(ground), luminance(texts[step])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (step, ground)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    bounds = [1.0, 2.0, 5.0, 10.0, 50.0, math.inf]
    counts = [sum(value <= bound for value in values) for bound in bounds]
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    index = next(i for i, bound in enumerate(bounds) if true <= bound)
    found = quantile(bounds, counts, share)
    assert found is not None
    if index == len(bounds) - 1:
        assert found == bounds[-2]
    else:
        assert (bounds[index - 1] if index else 0.0) <= found <= bounds[index]


def test_a_quantile_of_nothing_is_none() -> None:
    assert quantile([1.0, math.inf], [0, 0], 0.5) is None


def test_names_of_tasks() -> None:
    assert titled(()) == "known classes"
    assert titled(("a", "b", "c", "d")) == "a, b, c, d"
    assert titled(tuple("abcde")) == "a, b, c and 2 more"
