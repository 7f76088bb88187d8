"""How well a stream is learned, next to simpler and to stronger ways: ``make bench-accuracy``.

    python -m tests.benchmarks.accuracy --data FILE.npz --backbone FILE.safetensors

Runs in this process, run by run; what is done is kept under ``build/accuracy``, so that a killed
benchmark goes on where it was, and only what changed is run again. After every run the tables are
written anew, from raw answers alone. The last line is one JSON object.

Two processes may share the work: each passes over runs that the other is at.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from inflora_core import bundled, durable, evaluation
from inflora_core.backbone import Backbone, create_backbone
from inflora_core.compute import Precision, halves
from inflora_core.config import preset
from tests.benchmarks import figures, layouts, runs, teaching
from tests.benchmarks.checkout import ROOT, commit
from tests.benchmarks.head_study import novelty_study, over_the_stream, study
from tests.benchmarks.runs import ROWS, TRAINED, Plan, Recorded

SHARED = ROOT.parent / "shared" / "data"
STREAM = SHARED / "cifar100_stream50.npz"
STREAM_BACKBONE = SHARED / "deit_tiny_patch16_224.fp16.safetensors"
PUBLISHED_BACKBONE = "vit_base_patch16_224.augreg_in21k"
DOCS = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- accuracy -->", "<!-- /accuracy -->"
STUDIED = ("default", "plain", "frozen-head")
"""Rows whose saved features the study of heads looks at."""
FIGURES_CODE = ("accuracy.py", "figures.py", "head_study.py", "runs.py")
"""Where they change, figures are computed again from what the runs saved."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, write the tables, return what the last line says; see ``--help``."""
    options = parser().parse_args(arguments)
    fill_in(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(options)
    splits = layouts.splits_of(options.layout, options.data, options.seed)
    digest = runs.backbone_digest(backbone)
    backbone.module.to(options.device)
    images = runs.prepare(splits, backbone, out, console.print)
    # The names of files are in the data's hash: what is left are the images at model size.
    bench = runs.Bench.open(backbone, images, digest, out, console.print)
    facts = facts_of(options, backbone, images)
    plans = list(planned(options, images, digest))
    for plan in plans:
        if options.no_run or runs.finished_tasks(out / "runs" / plan.name) == plan.tasks:
            continue
        try:
            runs.execute(plan, bench)
        except runs.BusyError:
            console.print(f"{plan.row}, order {plan.order}: another process is at it")
            continue
        publish(options, plans, facts, out)
    result = publish(options, plans, facts, out)
    show(console, result)
    summary = summarise(result, options.tasks)
    print(json.dumps(summary), flush=True)
    return summary


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = result.add_argument
    add("--stream", choices=sorted(layouts.PUBLISHED), help="a published experiment")
    add("--data", help="digits, an npz file, or a folder (default: the shared stream, or digits)")
    add("--backbone", help="bundled, a timm name, or a file")
    add("--tasks", help="numbers of tasks (default: 5 10)")
    add("--seeds", default="0 1 2", help="orders of the classes; 0 is the order of names")
    add("--epochs", type=int, help="of all rows (default: 5; --stream: each preset's own)")
    add("--rows", default="", help="default: all; --stream: plain default")
    add("--only", dest="rows", help="the same as --rows")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of the default's rows")
    add("--mean", type=float, help="another mean for all channels, 0 to 1")
    add("--std", type=float, help="another deviation for all channels")
    add("--seed", type=int, default=0, help="which images are for testing, where data has no split")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--precision", default="float32", choices=get_args(Precision), help="of training")
    add("--threads", type=int, help="of torch (default: all)")
    add("--out", help="default: build/accuracy")
    add("--docs", default=str(DOCS), help="the file with the marks to write the tables between")
    add("--no-docs", action="store_true", help="write the tables under --out alone")
    add("--no-run", action="store_true", help="only make the tables of what is there")
    add("--no-study", action="store_true", help="leave the study of heads out")
    return result


def fill_in(options: argparse.Namespace) -> None:
    """Replace what was not said by what it means."""
    published = layouts.PUBLISHED.get(options.stream or "")
    options.layout = published.layout if published else "plain"
    options.plain = published.preset if published else "published"
    options.published = published is not None
    if published:
        if not options.data:
            raise SystemExit(f"say where the data is: make bench-{options.stream} DATA=folder")
        options.backbone = options.backbone or PUBLISHED_BACKBONE
        options.tasks = options.tasks or str(published.tasks)
        options.rows = options.rows or "plain default"
        options.out = options.out or str(ROOT / "build" / options.stream)
    shared = STREAM.exists() and STREAM_BACKBONE.exists()
    if not options.data:
        options.data = str(STREAM) if shared else "digits"
        options.backbone = options.backbone or (str(STREAM_BACKBONE) if shared else "bundled")
    options.backbone = options.backbone or "bundled"
    options.tasks = numbers_in(options.tasks or "5 10")
    options.seeds = numbers_in(options.seeds)
    options.rows = re.findall(r"[^\s,]+", options.rows or "") or list(ROWS)
    for row in options.rows:
        if row not in ROWS:
            raise SystemExit(f"there is no row {row!r}; there are: {', '.join(ROWS)}")
    options.out = options.out or str(ROOT / "build" / "accuracy")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    # Tables with settings that somebody tries out, or of somebody's own data, are theirs.
    options.no_docs = options.no_docs or bool(options.set) or published is not None


def numbers_in(text: str) -> list[int]:
    """Return the numbers in ``text``: "5 10" or "5,10"."""
    return [int(number) for number in re.findall(r"\d+", text)]


def load_backbone(options: argparse.Namespace) -> Backbone:
    """Return the backbone, with another normalisation if one was asked for."""
    source = str(bundled.PATH) if options.backbone == "bundled" else options.backbone
    backbone = create_backbone(source)
    changes = {
        key: (value,) * 3
        for key, value in (("mean", options.mean), ("std", options.std))
        if value is not None
    }
    return replace(backbone, preprocessing=replace(backbone.preprocessing, **changes))


def planned(
    options: argparse.Namespace, images: runs.ImageSet, backbone: str
) -> Iterable[Plan]:  # fmt: skip
    """Yield the runs that were asked for: order after order, so that a part has all rows."""
    code, frozen_code = teaching.method_digest(), teaching.code_digest(
        Path(__file__).with_name("head_study.py")
    )  # fmt: skip
    for order in options.seeds:
        for number, tasks in enumerate(options.tasks):
            if tasks > len(images.names):
                raise SystemExit(f"{len(images.names)} classes cannot make {tasks} tasks")
            for row in (row for row in ROWS if row in options.rows):
                if row == "joint" and number > 0:
                    continue
                yield Plan(
                    row,
                    order,
                    1 if row == "joint" else tasks,
                    settings_of(options, row, tasks, order) if row in TRAINED else {},
                    images.digest,
                    backbone,
                    code if row in TRAINED else frozen_code,
                    half=row in TRAINED and halves(options.precision, torch.device(options.device)),
                )


def settings_of(
    options: argparse.Namespace, row: str, tasks: int, order: int
) -> dict[str, Any]:  # fmt: skip
    """Return the settings of a row that trains."""
    # All rows share the epochs; a published experiment has its own, which are not our default's.
    epochs = options.epochs or (None if options.published else 5)
    if row in ("plain", "sequential"):
        config = preset(options.plain).updated(expected_tasks=tasks, epochs=epochs)
        if not options.published:
            # What the published code was run with on this stream: its figures are to be met.
            config = config.updated(batch_size=32, learning_rate=2e-3)
    else:
        changes = dict(setting.split("=", 1) for setting in options.set)
        config = preset("default").updated(**{"epochs": epochs, **changes})
    return config.updated(seed=order).model_dump()


# -- figures: from what the runs wrote, without any model -----------------------------------------


@dataclass(frozen=True)
class Result:
    """Figures of all finished runs, and what is missing."""

    facts: dict[str, Any]
    runs: list[dict[str, Any]]
    missing: list[str]


def publish(
    options: argparse.Namespace, plans: list[Plan], facts: dict[str, Any], out: Path
) -> Result:
    """Write figures and tables of what is done by now."""
    done, missing = [], []
    for plan in plans:
        folder = out / "runs" / plan.name
        tasks = runs.finished_tasks(folder)
        if tasks < plan.tasks:
            missing.append(f"{plan.row}, order {plan.order} ({tasks} of {plan.tasks} tasks)")
        else:
            done.append(measured(plan, folder, with_study=not options.no_study))
    result = Result(facts, done, missing)
    durable.replace(out / "results.json", json.dumps(asdict(result), indent=1).encode())
    text = markdown(result)
    durable.replace(out / "table.md", text.encode())
    if not options.no_docs:
        put_between_marks(Path(options.docs), text)
    return result


@cache
def showndigest() -> str:
    """Return a hash of the code that turns what runs saved into figures."""
    paths = [Path(__file__).with_name(name) for name in FIGURES_CODE]
    return "".join(teaching.code_digest(path) for path in [*paths, Path(evaluation.__file__)])


def measured(plan: Plan, folder: Path, *, with_study: bool) -> dict[str, Any]:
    """Return the figures of a finished run, computed once."""
    code = showndigest()
    studied = with_study and plan.row in STUDIED
    path = folder / "figures.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["code"] == code and kept["studied"] >= studied:
            return kept["figures"]
    recorded = runs.read(folder)
    result = shownof(recorded)
    if studied:
        result["study"] = study(
            recorded.tasks(),
            recorded.fresh(),
            (recorded.stages[-1]["test"], recorded.truth),
            recorded.sizes,
        )
        result["stream_study"] = over_the_stream(
            recorded.tasks(),
            [stage["test"] for stage in recorded.stages],
            recorded.truth,
            recorded.sizes,
        )
        half = half_of(recorded)
        test = recorded.stages[half - 1]["test"], recorded.truth
        result["novelty_study"] = (
            novelty_study(recorded.tasks(half), test, recorded.sizes[:half])
            if half < len(recorded.sizes)
            else None
        )
    durable.replace(
        path, json.dumps({"code": code, "studied": studied, "figures": result}).encode()
    )
    return result


def half_of(recorded: Recorded) -> int:
    """Return the number of tasks after which novelty is measured."""
    return max(len(recorded.sizes) // 2, 1)


def shownof(recorded: Recorded) -> dict[str, Any]:
    """Return a run's figures from its raw answers."""
    plan, reports = recorded.plan, recorded.reports
    stages = [stage["logits"] for stage in recorded.stages]
    result: dict[str, Any] = {
        "row": plan.row,
        "order": plan.order,
        "tasks": plan.tasks,
        "settings": plan.settings,
        "code": plan.code,
        **figures.summarise(stages, recorded.truth, recorded.sizes),
        "seconds": sum(report["seconds"] for report in reports),
        "state": reports[-1]["state"],
    }
    if plan.row not in TRAINED:
        return result
    errors = [
        figures.calibration_error(figures.softmax(scores), recorded.truth) for scores in stages
    ]
    novelty = [
        figures.auroc(stage["novelty"], recorded.truth >= scores.shape[1])
        for stage, scores in zip(recorded.stages, stages, strict=True)
    ]
    guarded = plan.row in ("plain", "default")
    return result | {
        "ece": errors[-1],
        "ece_by_stage": errors,
        "novelty": novelty[half_of(recorded) - 1],
        "novelty_by_stage": novelty,
        "leak": max(report["leak"] for report in reports) if guarded else None,
        "interference": max(report["interference"] for report in reports),
        "capacity": reports[-1]["capacity"],
        "protected": reports[-1]["protected"],
        "device": reports[-1]["device"],
    }


def of_row(result: Result, row: str, tasks: int | None) -> list[dict[str, Any]]:
    """Return the figures of a row's runs, one for each order; joint training has one number."""
    return [
        run
        for run in result.runs
        if run["row"] == row and (row == "joint" or tasks is None or run["tasks"] == tasks)
    ]


def mean_of(part: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean of a figure over runs."""
    return figures.mean([run.get(key) for run in part])


def summarise(result: Result, tasks: Sequence[int]) -> dict[str, Any]:
    """Return the last line: shares of 1, means over the orders that were measured, or null."""
    first = tasks[0]

    def final(row: str, number: int) -> float | None:
        return mean_of(of_row(result, row, number), "final")

    default, plain = of_row(result, "default", first), of_row(result, "plain", first)
    ten = of_row(result, "default", 10) if 10 in tasks else []
    summary = {
        "default_final": final("default", first),
        "plain_final": final("plain", first),
        "sequential_final": final("sequential", first),
        "frozen_ncm_final": final("frozen-ncm", first),
        "frozen_ridge_final": final("frozen-ridge", first),
        "frozen_same_head_final": final("frozen-head", first),
        "joint_final": final("joint", first),
        "default_average": mean_of(default, "average"),
        "default_forgetting": mean_of(default, "forgetting"),
        "plain_forgetting": mean_of(plain, "forgetting"),
        "novelty_auroc": mean_of(ten, "novelty"),
        "ece": mean_of(default, "ece"),
        "default_final_10x5": mean_of(ten, "final"),
        "default_leak": max((run["leak"] for run in default), default=None),
        "orders": len(default),
        "orders_10x5": len(ten),
        "missing": result.missing,
        "commit": result.facts["commit"],
        "results": result.facts["results"],
    }
    return {
        key: round(value, 6) if isinstance(value, float) and key != "default_leak" else value
        for key, value in summary.items()
    }


# -- tables ---------------------------------------------------------------------------------------

COLUMNS = (
    "row",
    "orders",
    "final",
    "average",
    "forgetting",
    "task known",
    "calibration error",
    "leak",
    "interference",
    "state per class, bytes",
    "shared state, bytes",
    "seconds",
)


SHOWN = ("row", "final", "average", "forgetting", "task known", "calibration error", "seconds")
"""What fits on a console."""


def rows_of(
    result: Result, tasks: int, titles: dict[str, str] = ROWS
) -> list[tuple[str, ...]]:  # fmt: skip
    """Return the cells of one partition's table."""
    rows = []
    for row, title in titles.items():
        part = of_row(result, row, tasks)
        if not part:
            continue
        finals = [run["final"] for run in part]
        spread = f" ± {100 * float(np.std(finals)):.1f}" if len(part) > 1 else ""
        joint, trained = row == "joint", row in TRAINED
        rows.append(
            (
                title,
                str(len(part)),
                f"{percent(mean_of(part, 'final'))}{spread}",
                "" if joint else percent(mean_of(part, "average")),
                "" if joint else points(mean_of(part, "forgetting")),
                "" if joint else percent(mean_of(part, "task_known")),
                number(mean_of(part, "ece"), ".3f") if trained else "",
                number(largest(part, "leak"), ".1e"),
                number(largest(part, "interference"), ".2f") if row != "frozen-head" else "",
                f"{part[0]['state']['per_class']:,}",
                f"{part[0]['state']['shared']:,}",
                number(mean_of(part, "seconds"), ",.0f"),
            )
        )
    return rows


def partitions(result: Result) -> list[int]:
    """Return the numbers of tasks that were asked for."""
    return result.facts["tasks"]


def markdown(result: Result) -> str:
    """Return the tables for docs/benchmarks.md."""
    facts = result.facts
    lines = [
        f"`{facts['command']}`",
        "",
        f"{facts['images']}; backbone {facts['backbone']}. {facts['machine']}, "
        f"torch {facts['torch']}, {facts['date']}, commit {facts['commit'][:9]}. "
        "Means over the orders of classes; ± is their standard deviation. Forgetting in points. "
        "Leak and interference are the largest of any task and layer. Seconds are those of "
        "learning, on a machine that may have been busy.",
    ]
    if result.missing:
        lines += ["", f"Not measured yet: {'; '.join(result.missing)}."]
    for tasks in partitions(result):
        cells = rows_of(result, tasks)
        if cells:
            lines += ["", f"**{title_of(result, tasks)}**", "", *table(COLUMNS, cells)]
    lines += more_figures(result)
    for row in STUDIED:
        for tasks in partitions(result):
            lines += study_tables(result, row, tasks)
    return "\n".join(lines)


def title_of(result: Result, tasks: int) -> str:
    """Return "5 x 10": tasks by classes, where all tasks have as many."""
    each, rest = divmod(result.facts["classes"], tasks)
    return f"{tasks} x {each}" if not rest else f"{tasks} tasks of {each} or {each + 1} classes"


def more_figures(result: Result) -> list[str]:
    """Return what the default's answers are worth beyond accuracy."""
    lines = []
    for tasks in partitions(result):
        part = of_row(result, "default", tasks)
        if part:
            stages = np.mean([run["ece_by_stage"] for run in part], axis=0)
            novelty = [run["novelty_by_stage"][:-1] for run in part]
            protected = np.mean([run["protected"] for run in part], axis=0)
            lines += [
                "",
                f"Our default, {title_of(result, tasks)}, after each task: calibration error "
                f"{', '.join(f'{value:.3f}' for value in stages)}; AUROC of novelty between "
                "classes learned and not yet learned "
                f"{', '.join(f'{value:.3f}' for value in np.mean(novelty, axis=0)) or 'none'}. "
                "Protected directions at the end, first to last layer: "
                f"{', '.join(f'{value:.0f}' for value in protected)}.",
            ]
    return lines


def study_tables(result: Result, row: str, tasks: int) -> list[str]:
    """Return the table of heads for the features of one row."""
    part = [run for run in of_row(result, row, tasks) if run.get("study")]
    if not part:
        return []
    kinds = ("stored",) if row == "frozen-head" else ("stored", "fresh", "sdc", "linear")
    cells = []
    for name in part[0]["study"]["heads"]:
        line = [name]
        for kind in kinds:
            found = [run["study"]["heads"][name].get(kind) for run in part]
            have = None not in found
            line += [percent(mean_of(found, "accuracy")) if have else ""]
            if kind == "stored":
                line += [number(mean_of(found, "ece"), ".3f") if have else ""]
        cells.append(tuple(line))
    lines = [
        "",
        f"**Heads on the same features: {ROWS[row]}, {title_of(result, tasks)}** "
        f"(final accuracy; orders: {len(part)})",
        "",
        *table(("head", kinds[0], "calibration error", *kinds[1:]), cells),
    ]
    streams = [run["stream_study"] for run in part]
    shown = ("final", "average", "forgetting", "task known")
    cells = [
        (
            name,
            *(
                (points if key == "forgetting" else percent)(
                    mean_of([run[name] for run in streams], key.replace(" ", "_"))
                )
                for key in shown
            ),
        )
        for name in streams[0]
    ]
    lines += [
        "",
        "The same over the whole stream, from stored means that follow the drift (linear):",
        "",
        *table(("head", *shown), cells),
    ]
    if row != "frozen-head":
        drift = {
            kind: {
                key: np.mean([run["study"]["drift"][kind][key] for run in part])
                for key in ("means", "largest_mean", "covariance")
            }
            for kind in ("stored", "sdc", "linear")
        }
        words = "; ".join(
            f"{kind}: {values['means']:.3f} (largest {values['largest_mean']:.3f}), "
            f"covariance {100 * values['covariance']:.1f}%"
            for kind, values in drift.items()
        )
        lines += ["", f"Drift of the means in within-class deviations, of the covariance: {words}."]
    novelty = [run["novelty_study"] for run in part if run.get("novelty_study")]
    if novelty:
        scores = "; ".join(f"{name} {number(mean_of(novelty, name), '.3f')}" for name in novelty[0])
        lines += ["", f"AUROC of novelty after half of the tasks: {scores}."]
    return lines


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (columns, ["---"] + ["---:"] * (len(columns) - 1), *rows)
    ]


def put_between_marks(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the marks in ``path``."""
    before, found, rest = path.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path} has no {begin} with an {end} after it")
    durable.replace(path, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


def show(console: Console, result: Result) -> None:
    """Print the tables."""
    for tasks in partitions(result):
        view = Table(title=title_of(result, tasks))
        for name in SHOWN:
            view.add_column(name, no_wrap=name == "row")
        for cells in rows_of(result, tasks, {row: row for row in ROWS}):
            view.add_row(*(cells[COLUMNS.index(name)] for name in SHOWN))
        if view.rows:
            console.print(view)
    if result.missing:
        console.print(f"Not measured yet: {'; '.join(result.missing)}")


def percent(value: float | None) -> str:
    """Return a share of 1 as "12.3%"."""
    return "" if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """Return a share of 1 as "12.3"."""
    return "" if value is None else f"{100 * value:.1f}"


def number(value: float | None, form: str) -> str:
    """Return a number, or nothing."""
    return "" if value is None else format(value, form)


def largest(part: list[dict[str, Any]], key: str) -> float | None:
    """Return the largest of a figure over runs, or None where it lacks."""
    values = [run[key] for run in part if run.get(key) is not None]
    return max(values, default=None)


# -- what this ran on -----------------------------------------------------------------------------


def facts_of(
    options: argparse.Namespace, backbone: Backbone, images: runs.ImageSet
) -> dict[str, Any]:
    """Return what a reader must know to repeat it; no path of this machine."""
    size = backbone.preprocessing
    per_class = [
        np.bincount(labels, minlength=len(images.names))
        for labels in (images.train_labels, images.test_labels)
    ]
    counts = [f"{x.min()}" if x.min() == x.max() else f"{x.min()} to {x.max()}" for x in per_class]
    names = {key: Path(getattr(options, key)).name for key in ("data", "backbone")}
    words = [
        f"{key.upper()}={' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key in ("tasks", "seeds", "epochs", "mean", "std")
        if (value := getattr(options, key)) is not None
    ]
    words = [word if " " not in word else '{}="{}"'.format(*word.split("=")) for word in words]
    if options.set:
        words.append(f'SET="{" ".join(options.set)}"')
    target = f"bench-{options.stream or 'accuracy'}"
    command = ["make", target, *(f"{key.upper()}={name}" for key, name in names.items()), *words]
    threads = torch.get_num_threads()
    machine = (
        torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else f"{processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    )
    return {
        "command": " ".join(command),
        "images": f"{names['data']}: {len(images.names)} classes, {counts[0]} training and "
        f"{counts[1]} test images a class",
        "classes": len(images.names),
        "backbone": f"{names['backbone']} at {size.height} px",
        "machine": machine,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "tasks": options.tasks,
        "results": str(Path(options.out) / "results.json"),
    }


def processor() -> str:
    """Return the processor's name, where the system says it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found.group(1) if found else ""


if __name__ == "__main__":
    main()
