"""Tables, and the tree of versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from inflora_client import (
    ClassScore,
    Evaluation,
    GateCheck,
    HeldOutMethod,
    Task,
    TaskStage,
    TaskState,
    Version,
)
from inflora_client._bench import Latency, LoadReport
from inflora_client.cli.configuring import Setting
from inflora_client.cli.picture import load_name

_HELD_OUT = {
    HeldOutMethod.UNSPECIFIED: "held-out accuracy",
    HeldOutMethod.HELD_OUT: "held-out accuracy",
    HeldOutMethod.LEAVE_ONE_OUT: "accuracy, each left out",
}

LISTED_CLASSES = 10
"""Classes that a table of an evaluation shows: a person looks for those that went wrong."""


def short(name: str) -> str:
    """The last part of a resource name, which every command accepts."""
    return name.rpartition("/")[2] or "-"


def describe(task: Task) -> str:
    """One line on where a task is."""
    learning = task.state == TaskState.LEARNING and task.stage != TaskStage.UNSPECIFIED
    words = [(task.stage if learning else task.state).lower().replace("_", " ")]
    if learning and task.epochs:
        words += [f"epoch {task.epoch}/{task.epochs}", f"loss {task.loss:.4f}"]
    return "  ".join(words)


def describe_edit(task: Task) -> str:
    """One line on what a task is to change, "" if it is to learn."""
    if task.forget:
        words = [", ".join(task.forget.labels), *(["and purge"] if task.forget.purge else [])]
        return " ".join(["forget", *words])
    if task.update:
        update = task.update
        changes = [
            *([f"now {update.new_label}"] if update.new_label else []),
            *(f"not {alias}" for alias in update.remove_aliases),
            *(f"also {alias}" for alias in update.add_aliases),
        ]
        return f"{update.label}: {', '.join(changes)}"
    return ""


def task_table(tasks: Iterable[Task]) -> Table:
    """One row a task."""
    return _table(
        ("task", "name", "state", "classes", "images", "version", "created"),
        (
            (
                task.id,
                task.display_name or describe_edit(task),
                describe(task),
                len(task.classes),
                task.example_count,
                short(task.version),
                _when(task.create_time),
            )
            for task in tasks
        ),
    )


def setting_table(settings: Iterable[Setting]) -> Table:
    """One row an option."""
    return _table(
        ("option", "value", "from"),
        (
            (each.option, "-" if each.value is None else each.value, each.origin)
            for each in settings
        ),
    )


def _state_of(version: Version) -> str:
    states = {
        "stands in": version.stand_in,  # for the current one, which is damaged
        "current": version.current,
        "purged": version.purged,
        "retired": version.retired,
        "candidate": version.candidate,
    }
    state = next((name for name, holds in states.items() if holds), "")
    return ", ".join(filter(None, (state, "pinned" if version.pinned else "")))


def version_table(versions: Iterable[Version]) -> Table:
    """One row a version."""
    return _table(
        ("version", "state", "classes", "parent", "task", "created"),
        (
            (
                version.number,
                _state_of(version),
                len(version.classes),
                short(version.parent),
                short(version.task),
                _when(version.create_time),
            )
            for version in versions
        ),
    )


def version_view(version: Version) -> RenderableType:
    """A version, and a row for each of its classes."""
    classes = _table(
        ("class", "aliases", "task"),
        ((c.label, ", ".join(c.aliases), short(c.task)) for c in version.classes),
    )
    return Group(version_table([version]), Text(), classes)


def version_tree(versions: Iterable[Version]) -> RenderableType:
    """The lineage, oldest first: what goes on from a version follows it, branches are indented.

    Of several that go on from one version, the line that leads to the current one is kept
    straight, or else the newest, so that a hundred versions in a row are a list.
    """
    by_name = {version.name: version for version in sorted(versions, key=lambda v: v.number)}
    children: dict[str, list[Version]] = {}
    for version in by_name.values():
        # The parent of the oldest ones may be gone.
        children.setdefault(version.parent if version.parent in by_name else "", []).append(version)
    to_current = _line_to_current(by_name)
    tree = Tree("", guide_style="dim", hide_root=True)
    lines = [(tree, first, True) for first in reversed(children.get("", []))]
    while lines:
        branch, version, begins = lines.pop()
        origin = f"  from {short(version.parent)}" if begins and version.parent else ""
        node = branch.add(Text(in_lineage(version) + origin))
        following = sorted(
            children.get(version.name, ()),
            key=lambda v: (v.name in to_current, not v.candidate, v.number),
        )
        if following:
            lines += [(node, each, True) for each in reversed(following[:-1])]
            # Behind branches it would look as if it went on from one of them.
            lines.append((branch, following[-1], len(following) > 1))
    return tree


def _line_to_current(by_name: Mapping[str, Version]) -> set[str]:
    line = set()
    version = next((each for each in by_name.values() if each.current), None)
    while version is not None:
        line.add(version.name)
        version = by_name.get(version.parent)
    return line


def in_lineage(version: Version) -> str:
    """One line on what a version is."""
    count = len(version.classes)
    facts = (
        _state_of(version),
        f"{count} class{'es' if count != 1 else ''}",
        f"task {short(version.task)}",
        _when(version.create_time),
    )
    return "  ".join([str(version.number), *filter(None, facts)])


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """What ``inflora predict`` shows of one image.

    Attributes:
        file: The image.
        version: The version that answered.
        scores: The likeliest classes, best first.
        novelty: 0 (known) to 1 (new).
    """

    file: Path
    version: str
    scores: tuple[ClassScore, ...]
    novelty: float


def prediction_table(
    answers: Sequence[FileAnswer], *, first: bool = True, width: int | None = None
) -> Table:
    """One row for each class of each image.

    Args:
        answers: The images.
        first: Whether these are the first, and need the columns' names.
        width: Of the first column at least; tables that follow each other have the same.
    """
    table = _table(
        ("file", "label", "probability", "novelty", "version"),
        (
            (
                answer.file,
                score.label,
                f"{score.probability:.4f}",
                f"{answer.novelty:.3f}",
                short(answer.version),
            )
            for answer in answers
            for score in answer.scores
        ),
        header=first,
    )
    if width is not None:
        for column, least in zip(table.columns, (width, 20, 11, 7, 7), strict=True):
            column.min_width = least
    return table


def summary_table(task: Task) -> Table:
    """What a person wants to know of a task that was published or held back."""
    rows: list[Sequence[object]] = [
        ("task", task.id),
        ("version", short(task.version)),
    ]
    if change := describe_edit(task):
        rows.append(("change", change))
    else:
        rows += [
            ("classes", ", ".join(c.label for c in task.classes)),
            ("images", task.example_count),
        ]
    if task.report:
        report = task.report
        rows += [
            ("training accuracy", _percent(report.training_accuracy)),
            (_HELD_OUT[report.held_out_method], _percent(report.held_out_accuracy)),
            ("  with the task known", _percent(report.held_out_accuracy_task_known)),
            ("largest leak", f"{report.leak:.1e}"),
            ("largest interference", f"{report.interference:.3f}"),
            ("capacity left", _percent(report.capacity)),
            ("about so many tasks more", _number(report.tasks_left)),
            ("seconds", f"{sum(s.seconds for s in report.stage_seconds):.1f}"),
        ]
        if report.parity:
            rows.append(("ONNX against torch", f"{report.parity.max_abs_diff:.1e}"))
        rows += [
            (f"held back for {check.name}", f"{_checked(check)}: {check.message}")
            for check in report.failed_checks
        ]
        rows += [("warning", warning) for warning in report.warnings]
    return _table(("", ""), rows, header=False)


def evaluation_view(evaluation: Evaluation) -> RenderableType:
    """Several tables: overall, tasks, the worst classes, the most frequent errors, unknown."""
    worst = sorted(evaluation.classes, key=lambda c: (c.accuracy, -c.images))[:LISTED_CLASSES]
    parts = [
        _overall_table(evaluation),
        _table(
            ("task", "images", "accuracy", "with the task known"),
            (
                (short(t.task), t.images, _percent(t.accuracy), _percent(t.accuracy_task_known))
                for t in evaluation.tasks
            ),
        ),
        _table(
            ("worst classes", "images", "accuracy", "mean probability", "taken most often for"),
            (
                (
                    c.label,
                    c.images,
                    _percent(c.accuracy),
                    f"{c.mean_probability:.4f}",
                    f"{c.confused_with} ({c.confused_images})" if c.confused_images else "",
                )
                for c in worst
            ),
        ),
        _table(
            ("class", "taken for", "images", "share of the class"),
            ((c.truth, c.answer, c.images, _percent(c.share)) for c in evaluation.confusions),
        ),
        _unknown_table(evaluation),
    ]
    shown = [part for part in parts if part.row_count]
    spaced = [part for table in shown for part in (Text(), table)]
    return Group(*spaced[1:])


def bench_view(loads: Sequence[LoadReport]) -> RenderableType:
    """Two tables, a row for each load: how fast it was, and how its calls ended."""
    speed = _table(
        ("load", "calls", "failed", "calls/s", "p50 ms", "p90", "p99", "p99.9", "max"),
        (
            (
                load_name(load),
                load.calls,
                load.failed,
                f"{load.throughput:.1f}",
                *_milliseconds(load.latency),
            )
            for load in loads
        ),
    )
    ends = _table(
        ("load", "ended as", "calls"),
        (
            (load_name(load), end, calls)
            for load in loads
            for end, calls in (
                *((f"answered by version {version}", n) for version, n in load.versions.items()),
                *load.errors.items(),
            )
        ),
    )
    return Group(speed, Text(), ends)


def _milliseconds(latency: Latency | None) -> list[str]:
    if latency is None:
        return ["-"] * 5
    values = (latency.p50, latency.p90, latency.p99, latency.p999, latency.max)
    return [f"{1000 * value:.1f}" for value in values]


def _overall_table(evaluation: Evaluation) -> Table:
    calibration, novelty = evaluation.calibration, evaluation.novelty
    rows: list[Sequence[object]] = [
        ("version", short(evaluation.version)),
        ("images of known classes", evaluation.images),
        ("accuracy", _percent(evaluation.accuracy)),
        ("  with the task known", _percent(evaluation.accuracy_task_known)),
        ("  mean of the classes", _percent(evaluation.mean_class_accuracy)),
    ]
    if calibration:
        rows += [
            ("calibration error", f"{calibration.expected_error:.4f}"),
            ("negative log-likelihood", f"{calibration.negative_log_likelihood:.4f}"),
            ("Brier score", f"{calibration.brier:.4f}"),
        ]
    if evaluation.unknown_images:
        rows.append(("images of unknown classes", evaluation.unknown_images))
    if novelty.auroc is not None:
        rows.append(("told by novelty (AUROC)", f"{novelty.auroc:.4f}"))
    return _table(("", ""), rows, header=False)


def _unknown_table(evaluation: Evaluation) -> Table:
    most = sorted(evaluation.unknown_labels, key=lambda u: -u.images)
    rows: list[Sequence[object]] = [(u.label, u.images) for u in most[:LISTED_CLASSES]]
    if rest := most[LISTED_CLASSES:]:
        rows.append((f"... and {len(rest)} more", sum(u.images for u in rest)))
    return _table(("not known to the version", "images"), rows)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, header: bool = True
) -> Table:
    table = Table(box=None, pad_edge=False, show_header=header)
    for column in columns:
        # Ids are copied from here into the next command, so they are never broken in two.
        table.add_column(column, overflow="fold", no_wrap=column == "task")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: a label is not markup
    return table


def _checked(check: GateCheck) -> str:
    value = "not a number" if check.value is None else f"{check.value:.3g}"
    return f"{value}, limit {check.limit:.3g}"


def _when(time: datetime | None) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
