"""What console and report show, as parts of a page: each a picture, what to know, and a table.

Everything that comes from outside is escaped. There are neither scripts nor styles in it: both
pages have rules for the classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape

from inflora_core.model import Forget, Task, TaskKind
from inflora_service import pictures
from inflora_service.overview import Cell, Fared, Lesson, Node, Overview, Source, titled
from inflora_service.pictures import Picture, percent

MOST_ROWS = 100
"""Newest versions in their table."""

_DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class View:
    """A part of a page.

    Attributes:
        name: What it is called there.
        title: Its heading.
        note: What there is to know, as HTML.
        picture: The picture in it, None if there is none.
        table: The same figures as a table, as HTML; "" if there are none.
        folded: Whether the table is opened by those who want it.
    """

    name: str
    title: str
    note: str = ""
    picture: Picture | None = None
    table: str = ""
    folded: bool = True

    @property
    def drawn(self) -> str:
        """Picture and note."""
        return (_drawn(self.picture) if self.picture is not None else "") + self.note

    @property
    def content(self) -> str:
        """All that is under the heading."""
        if not self.table or not self.folded:
            return self.drawn + self.table
        return f"{self.drawn}<details><summary>As a table</summary>{self.table}</details>"


@dataclass(frozen=True)
class Tile:
    """A figure to be seen at a glance.

    Attributes:
        name: What it is of.
        value: The figure.
        note: What it is measured on.
    """

    name: str
    value: str
    note: str


def tiles(found: Overview) -> list[Tile]:
    """Return what matters most."""
    lessons = found.lessons
    last = lessons[-1] if lessons else None
    accuracy, lost = found.mean_accuracy, found.mean_lost
    left = last.report.tasks_left if last else None
    return [
        Tile("Tasks learned", str(len(lessons)), _counted(found.classes, "class", "classes")),
        Tile(
            "Mean accuracy",
            percent(accuracy[0]) if accuracy else _DASH,
            f"{accuracy[1]} of {found.measurable} tasks measured since the last one"
            if accuracy
            else "not measured yet",
        ),
        Tile(
            "Mean forgetting",
            f"{pictures.points(lost[0])} pp" if lost else _DASH,
            f"of {_counted(lost[1], 'task', 'tasks')}, best before less the newest"
            if lost
            else "not measured yet",
        ),
        Tile(
            "Free capacity",
            percent(last.report.capacity) if last and last.report.layers else _DASH,
            _left(left),
        ),
    ]


def tiles_html(shown: Iterable[Tile]) -> str:
    """Return figures as a list."""
    return "".join(
        f'<div class="tile"><dt>{escape(each.name)}</dt><dd><b>{escape(each.value)}</b> '
        f"<span>{escape(each.note)}</span></dd></div>"
        for each in shown
    )


def views(found: Overview, most: int | None = None) -> list[View]:
    """Return everything that a store has learned.

    Args:
        found: The same as plain data.
        most: How many of the newest tasks the table of accuracies has; None for all.
    """
    shown = (_forgetting, _capacity, _interference, _versions)
    return [_accuracy(found, most), *(show(found) for show in shown)]


_TEACH = (
    "Nothing is learned yet. Teach the first task: put images into a folder for each class, and "
    "run <code>inflora learn FOLDER</code>."
)


def _accuracy(found: Overview, most: int | None) -> View:
    title = "Accuracy of every task after every task"
    if not found.lessons:
        return View("accuracy", title, _empty(_TEACH))
    picture = pictures.accuracy(found.lessons, found.cells)
    evaluated = any(cell.source is Source.EVALUATED for cell in found.cells.values())
    note = "" if evaluated else _EVALUATE
    first = 1 if most is None else len(found.lessons) - most + 1
    if first > 1:
        note += (
            f"<p>The table has the newest {most} tasks; <code>inflora report</code> has all.</p>"
        )
    rows = [
        (
            str(after),
            f"{position} {found.lessons[position - 1].title}",
            percent(cell.accuracy, 1),
            str(cell.images),
            cell.source.value,
            str(cell.version),
            _moment(cell.time),
        )
        for (after, position), cell in sorted(found.cells.items())
        if position >= first
    ]
    head = ("After task", "Of task", "Accuracy", "Images", "Measured on", "Version", "When")
    return View("accuracy", title, note, picture, _table(head, rows, title))


_EVALUATE = (
    "<p>No old image is kept, so only you can say how old tasks fare now: "
    "<code>inflora evaluate FOLDER</code> with test images of all classes fills a row.</p>"
)


def _forgetting(found: Overview) -> View:
    title = "Forgetting"
    if not found.lessons:
        return View("forgetting", title, _empty(_TEACH))
    fared = found.fared
    if not any(each.lost is not None for each in fared):
        return View("forgetting", title, _empty(_EVALUATE_AGAIN))
    picture = pictures.forgetting(fared)
    unlike = any(_unlike(each) for each in fared)
    note = "<p>* compared with other images than those of the newest figure.</p>" if unlike else ""
    head = ("Task", "Best before", "Newest", "Lost", "At version")
    return View("forgetting", title, note, picture, _table(head, map(_lost_row, fared), title))


_EVALUATE_AGAIN = (
    "Forgetting is the best accuracy that a task had before, less the newest. It takes two: run "
    "<code>inflora evaluate FOLDER</code> with the same test images after each task."
)


def _unlike(each: Fared) -> bool:
    return (
        each.best is not None and each.now is not None and each.best.source is not each.now.source
    )


def _lost_row(each: Fared) -> tuple[str, ...]:
    lost = f"{pictures.points(each.lost)} pp" if each.lost is not None else _DASH
    return (
        f"{each.lesson.position} {each.lesson.title}",
        _accuracy_of(each.best),
        _accuracy_of(each.now),
        lost + ("*" if _unlike(each) else ""),
        str(each.now.version) if each.now else _DASH,
    )


def _accuracy_of(cell: Cell | None) -> str:
    return percent(cell.accuracy, 1) if cell else _DASH


def _capacity(found: Overview) -> View:
    title = "Capacity"
    lessons = [lesson for lesson in found.lessons if lesson.report.layers]
    if not lessons:
        return View("capacity", title, _empty(_TEACH if not found.lessons else _NO_LAYERS))
    picture = pictures.capacity(lessons)
    left = lessons[-1].report.tasks_left
    note = (
        "<p>How many tasks are left is known after the second.</p>"
        if left is None
        else f"<p>{_left(left).capitalize()} of this kind. When a layer is full, only the head "
        "learns there.</p>"
    )
    head = ("After task", "Free of all", "Free of the fullest layer", "Fullest layer", "Tasks left")
    rows = map(_capacity_row, lessons)
    return View("capacity", title, note, picture, _table(head, rows, title))


_SECOND = "The first task had nothing to disturb. This is known from the second on."
_NO_LAYERS = "This backbone has no attention layer that tasks could fill."


def _capacity_row(lesson: Lesson) -> tuple[str, ...]:
    fullest = min(lesson.report.layers, key=lambda layer: layer.free_after / layer.dimension)
    left = lesson.report.tasks_left
    return (
        str(lesson.position),
        percent(lesson.report.capacity, 1),
        f"{fullest.free_after} of {fullest.dimension}",
        fullest.layer,
        _DASH if left is None else f"{left:.1f}",
    )


def _interference(found: Overview) -> View:
    title = "Leak and interference"
    lessons = [each for each in found.lessons if each.report.layers and each.position > 1]
    if not lessons:
        lacking = _NO_LAYERS if len(found.lessons) > 1 else _SECOND
        return View("interference", title, _empty(lacking if found.lessons else _TEACH))
    picture = pictures.interference(lessons)
    note = (
        "<p>Leak guards the algebra and is next to nothing. Interference says how much of a task's "
        "update meets what old tasks look like.</p>"
    )
    rows = [
        (
            f"{lesson.position} {lesson.title}",
            f"{lesson.report.leak:.1e}",
            f"{lesson.report.interference:.3f}",
            _DASH if lesson.canary_loss is None else f"{pictures.points(lesson.canary_loss)} pp",
        )
        for lesson in lessons
    ]
    head = ("Task", "Leak", "Interference", "Lost on canary images")
    return View("interference", title, note, picture, _table(head, rows, title))


def _versions(found: Overview) -> View:
    title = "Versions"
    if not found.nodes:
        return View("lineage", title, _empty(_TEACH))
    picture = pictures.lineage(found.nodes)
    rows = [_version_row(node) for node in found.nodes[: -MOST_ROWS - 1 : -1]]
    head = ("Version", "Made from", "Status", "What it learned", "Classes", "When")
    key = (
        "<p>Filled: answers. Diamond: only names of classes changed. Dashed: held back by the "
        "publish gate. Grey: its data were deleted. With a dot: pinned.</p>"
    )
    return View("lineage", title, key, picture, _table(head, rows, title), folded=False)


def _version_row(node: Node) -> tuple[str, ...]:
    step = node.step
    status = ", ".join(part for part in (node.status, "pinned" if node.pinned else "") if part)
    return (
        str(step.number),
        str(step.parent) if step.parent else _DASH,
        status,
        titled(step.labels, forgotten=step.forgotten)
        if step.report is not None
        else "names of classes only",
        str(step.classes),
        _moment(step.create_time),
    )


def tasks_table(tasks: Sequence[Task]) -> str:
    """Return tasks as a table, in their order."""
    head = ["Task", "State", "Version", "What", "Images", "Took", "Sent"]
    rows = [_task_row(task) for task in tasks]
    if any(task.failure for task in tasks):
        head.append("Problem")
        rows = [
            (*row, task.failure.message if task.failure else "")
            for row, task in zip(rows, tasks, strict=True)
        ]
    return _table(head, rows, "Tasks")


def _task_row(task: Task) -> tuple[str, ...]:
    took = (
        duration((task.end_time - task.start_time).total_seconds())
        if task.start_time and task.end_time
        else _DASH
    )
    return (
        task.display_name or task.id,
        task.state.value.lower().replace("_", " "),
        str(task.version) if task.version else _DASH,
        _what(task),
        str(sum(task.example_counts)) if task.kind is TaskKind.LEARN else _DASH,
        took,
        _moment(task.create_time),
    )


def _what(task: Task) -> str:
    if task.edit is None:
        return titled(task.labels)
    if isinstance(task.edit, Forget):
        return f"forget {titled(task.edit.labels)}"
    return f"rename or alias {task.edit.label}"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


# -- parts of HTML --------------------------------------------------------------------------------


def _drawn(picture: Picture) -> str:
    if picture.width == pictures.WIDTH:
        return picture.inline()
    # What does not fit is scrolled to, by the keyboard, too.
    wide = picture.width > pictures.ROOM
    focus = f' tabindex="0" role="group" aria-label="{escape(picture.title)}"' if wide else ""
    return f'<div class="scroll"{focus}>{picture.inline()}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(each)}</th>' if not place else f"<td>{escape(each)}</td>"
            for place, each in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(name)}, as a table">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _empty(text: str) -> str:
    return f'<p class="empty">{text}</p>'


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _left(tasks: float | None) -> str:
    if tasks is None:
        return _DASH
    return f"room for about {_counted(round(tasks), 'more task', 'more tasks')}"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"
