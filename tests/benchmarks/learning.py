"""What learning costs: ``make bench-learning`` (on the CPU; ``DEVICE=cuda``).

    python -m tests.benchmarks.learning --out build/learning

Weights and images are random: they cost what real ones do. Parts: ``step``, a training step against
the forward pass alone; ``task``, all of a task by stages, through the worker as a server runs it;
``tasks``, task 50 against task 2; ``group``, two processes against one, a processor each;
``accuracy``, final accuracy of the stream by epochs, and the seconds they take. A measurement that
is in ``results.jsonl``, made with the same code and settings, is not made again. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inflora_core import allocator
from inflora_core.adapters import adapted
from inflora_core.backbone import Backbone, build_backbone, state_of
from inflora_core.compute import Compute, Precision, halves
from inflora_core.config import LearnConfig
from inflora_core.export import export_template
from inflora_core.group import Group
from inflora_core.learner import learn_task
from inflora_core.model import BackboneConfig, LabelledImages, Stage
from inflora_core.predictor import processors
from inflora_core.progress import Tracker
from inflora_core.spool import SpoolWriter
from inflora_core.store import Store
from inflora_core.training import Images, optimizer_for, recorded
from inflora_core.worker import Worker, device_of
from tests.benchmarks import accuracy as accuracy_benchmark
from tests.benchmarks import teaching
from tests.benchmarks.checkout import ROOT, commit
from tests.benchmarks.serving.record import Record
from tests.benchmarks.serving.scene import machine

TINY, BASE = "deit_tiny_patch16_224", "vit_base_patch16_224"
PARTS = ("step", "task", "tasks", "group", "accuracy")
PUBLISHED_SECONDS = 5 * 126
"""Five tasks of the published code on two cores such as ours, which ended at PUBLISHED_ACCURACY."""
PUBLISHED_ACCURACY = 0.601

BEGIN, END = "<!-- bench-learning -->", "<!-- /bench-learning -->"

AROUND = (
    *("allocator", "backbone", "checkpoint", "export", "forms", "gate", "graph", "images"),
    *("predictor", "store", "worker"),
)
"""Modules of ``inflora_core`` that take time in a task, beside those of the method."""

Found = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Found:
    """Measure what is not measured yet; print and return what came of it."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads or processors())
    if options.member:
        return member(options)
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(
        options.out / "results.jsonl",
        {
            "code": teaching.method_digest() + code(),
            "device": options.device,
            "threads": torch.get_num_threads(),
            "machine": machine(),
        },
        {"commit": commit(), "torch": torch.__version__},
    )
    found: Found = {}
    for part in (part for part in PARTS if part in options.parts):
        print(f"== {part}", flush=True)
        found |= globals()[f"part_{part}"](options, record)
    summary = {
        "device": device_name(options),
        **found,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if options.write:
        write(summary)
    print(json.dumps(summary), flush=True)
    return summary


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = result.add_argument
    add("--out", type=Path, default=ROOT / "build" / "learning")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    add("--threads", type=int, help="of torch (default: all)")
    add("--rounds", type=int, default=9, help="of each comparison")
    add("--batch", type=int, help="of steps (default: 32, on a GPU 128)")
    add("--images", type=int, default=400, help="of the task that is measured by stages")
    add("--tasks", type=int, default=50, help="how many until the last is compared with the second")
    add("--seeds", default="0", help="orders of the classes of the stream, for its accuracy")
    add("--epochs", type=int, nargs="*", default=[1, 2, 5, 10], help="likewise")
    add("--write", action="store_true", help="put the table into docs/benchmarks.md")
    add("--member", action="store_true", help=argparse.SUPPRESS)
    return result


def code() -> str:
    """Return a hash of what this measures with, and of what it measures beside the method."""
    import inflora_core

    core = Path(inflora_core.__file__).parent
    paths = [Path(__file__), *(core / f"{name}.py" for name in AROUND)]
    return "".join(teaching.code_digest(path)[:16] for path in paths)


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return those that the device is made for."""
    return ("float32", "bfloat16") if halves("auto", device) else ("float32",)


def device_name(options: argparse.Namespace) -> str:
    """Return what computes."""
    return torch.cuda.get_device_name() if options.device == "cuda" else str(machine()["cpu"])


# -- a step ---------------------------------------------------------------------------------------


def part_step(options: argparse.Namespace, record: Record) -> Found:
    """A training step against the forward pass, which is the floor of a third of it."""
    device = device_of(options.device)
    batch = options.batch or (128 if options.device == "cuda" else 32)
    kinds = precisions(device)
    # In turns, as a processor's pace changes by more than is looked for. On a GPU, where it does
    # not, one after the other: what the first holds there would be counted as the second's.
    together = [kinds] if device.type == "cpu" else [(kind,) for kind in kinds]
    steps: Found = {}
    for architecture in (TINY, BASE):
        rounds = options.rounds if architecture == TINY else max(options.rounds // 3, 3)
        for some in together:
            key = {"part": "step", "architecture": architecture, "precisions": list(some)}
            steps |= record.take(
                key | {"batch": batch, "rounds": rounds},
                partial(timed_steps, architecture, device, some, batch, rounds),
            )
    # What the hardware is for: the small model on processors, the large one on a GPU.
    name = f"{TINY if device.type == 'cpu' else BASE}, "
    plain, fastest = steps[name + "float32"], steps.get(name + "bfloat16")
    return {
        "step_over_forward": plain["step_over_forward"],
        "images_per_second": (fastest or plain)["images_per_second"],
        "bfloat16_over_float32": (
            fastest.get("over_float32", fastest["images_per_second"] / plain["images_per_second"])
            if fastest
            else None
        ),
        "steps": steps,
    }


@allocator.kept()
def timed_steps(
    architecture: str,
    device: torch.device,
    kinds: Sequence[Precision],
    batch: int,
    rounds: int,
) -> Found:
    """Time a step, timm's forward pass and ours, each precision in turn; medians of ratios."""
    allocator.share()
    with ExitStack() as stack:
        timed = {
            kind: stack.enter_context(
                step(architecture, Compute(device, halves(kind, device)), batch)
            )
            for kind in kinds
        }
        for _ in range(rounds):
            for one in timed.values():
                one.time()
    found = {f"{architecture}, {kind}": one.found() for kind, one in timed.items()}
    if len(timed) > 1:
        plain, half = (timed[kind].times["step"] for kind in ("float32", "bfloat16"))
        found[f"{architecture}, bfloat16"]["over_float32"] = ratio(plain, half)
    return found


@dataclass
class Step:
    """What is timed: ``forward``, ``own_forward`` and ``step``.

    Attributes:
        runs: How to do each of them.
        compute: With what.
        batch: Images of each.
        flops: Of a step.
        peak_gigabytes: Of memory, after two steps.
        times: Seconds that each took, by rounds.
    """

    runs: dict[str, Callable[[], None]]
    compute: Compute
    batch: int
    flops: int
    peak_gigabytes: float
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def time(self) -> None:
        """Do each once."""
        for name, run in self.runs.items():
            self.times[name].append(seconds_of(run, self.compute.device))

    def found(self) -> Found:
        """Return what came of it."""
        seconds = median(self.times["step"])
        found: Found = {
            "step_over_forward": ratio(self.times["step"], self.times["forward"]),
            "step_over_own_forward": ratio(self.times["step"], self.times["own_forward"]),
            "images_per_second": self.batch / seconds,
            "forward_images_per_second": self.batch / median(self.times["forward"]),
            "gigaflops": self.flops / seconds / 1e9,
            "batch": self.batch,
        }
        if self.compute.device.type == "cuda":  # elsewhere precisions share what is measured
            found["peak_gigabytes"] = self.peak_gigabytes
            found["share_of_peak"] = found["gigaflops"] / matrix_peak(self.compute)
        return found


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios of times, each pair taken in the same round."""
    return median(one / other for one, other in zip(times, others, strict=True))


@contextmanager
def step(architecture: str, compute: Compute, batch: int) -> Iterator[Step]:
    """Yield a step that is warm, with timm's forward pass and ours."""
    backbone = random_backbone(architecture, compute.device)
    data = random_images(backbone, batch, 10)
    images = Images.placed(data.images, data.labels, compute.device)
    head = nn.Linear(backbone.config.embedding_size, 10).to(compute.device)
    config = LearnConfig(batch_size=batch)
    reductions = {
        name: torch.linalg.qr(torch.randn(backbone.qkv(name).in_features, config.rank))[0].mT  # type: ignore[arg-type]
        for name in backbone.config.layers
    }
    nothing = torch.zeros(batch, dtype=torch.bool, device=compute.device)
    with adapted(backbone.layers, reductions) as branches:
        expansions = [branch.expansion for branch in branches.values()]
        free = list(head.parameters())
        optimizer = optimizer_for(expansions, free, config)
        # Plain weights, as if branches were merged: that is what predicting costs.
        frozen = {name: branch.qkv for name, branch in branches.items()}

        def passing(features: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
            def run() -> None:
                with merged(backbone, frozen), torch.inference_mode(), compute.autocast():
                    head(features(images.loaded()))

            return run

        def trainer(compute: Compute) -> Callable[[], None]:
            differentiate = recorded(backbone, head, [*expansions, *free], config, compute)

            def train() -> None:
                differentiate((images, nothing))
                optimizer.step()

            return train

        runs = {
            "forward": passing(lambda pixels: backbone.module(backbone.normalise(pixels))),
            "own_forward": passing(backbone.features),
            "step": trainer(compute),
        }
        runs["forward"]()
        runs["own_forward"]()
        reset_peak(compute.device)
        for _ in range(2):  # a GPU's step is recorded in the second
            runs["step"]()
        peak = peak_gigabytes(compute.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what other threads do is not counted
        with FlopCounterMode(display=False) as counter:
            trainer(replace(compute, record=False))()
        torch.set_num_threads(threads)
        yield Step(runs, compute, batch, counter.get_total_flops(), peak)


@contextmanager
def merged(backbone: Backbone, frozen: dict[str, nn.Module]) -> Iterator[None]:
    """Take the branches away for a while."""
    branches = {name: backbone.qkv(name) for name in frozen}
    try:
        for name, layer in frozen.items():
            backbone.layers[name].qkv = layer
        yield
    finally:
        for name, branch in branches.items():
            backbone.layers[name].qkv = branch


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """Return how long ``run`` takes, what it leaves to the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak(compute: Compute) -> float:
    """Return the GFLOP/s of one large matrix product, which no model exceeds."""
    kind = torch.bfloat16 if compute.half else torch.float32
    n = 8192
    left, right = (torch.randn(n, n, device=compute.device, dtype=kind) for _ in range(2))
    times = [seconds_of(lambda: torch.mm(left, right), compute.device) for _ in range(12)]
    return 2 * n**3 / median(times[2:]) / 1e9


# -- a task ---------------------------------------------------------------------------------------


def part_task(options: argparse.Namespace, record: Record) -> Found:
    """All of a task, stage by stage, after one that made everything warm."""
    on_cpu = options.device == "cpu"
    rounds = 3 if on_cpu else 1
    plan = {} if on_cpu else {BASE: {"images": 5000, "epochs": 20, "batch_size": 128}}
    plan[TINY] = {"images": options.images, "epochs": 5, "batch_size": 32}
    kinds = precisions(device_of(options.device))
    result = {}
    for architecture, sizes in plan.items():
        # A GPU's float32 takes minutes, and tells nothing that the step does not.
        for precision in kinds if on_cpu else kinds[-1:]:
            result[f"{architecture}, {precision}"] = record.take(
                {"part": "task", "architecture": architecture, "precision": precision}
                | {"rounds": rounds, **sizes},
                partial(task, options, architecture, precision, rounds, **sizes),
            )
    first = next(iter(result.values()))
    return {"non_step_share": first["non_step_share"], "task": result}


def task(
    options: argparse.Namespace,
    architecture: str,
    precision: Precision,
    rounds: int,
    images: int,
    epochs: int,
    batch_size: int,
) -> Found:
    """Return medians of a task's stages."""
    runs = []
    with tempfile.TemporaryDirectory() as name:
        school = School(Path(name), architecture, options, precision)
        school.learn(images=32, epochs=1)
        for _ in range(rounds):
            runs.append(school.learn(images, epochs, batch_size=batch_size))
    stages = {stage: median(run["stages"][stage] for run in runs) for stage in runs[0]["stages"]}
    total = median(run["seconds"] for run in runs)
    return {
        "seconds": total,
        "non_step_share": median(
            1 - run["stages"][str(Stage.TRAINING)] / run["seconds"] for run in runs
        ),
        "training_images_per_second": epochs * images * 0.9 / stages[str(Stage.TRAINING)],
        "stages": stages,
        "peak_gigabytes": max(run["peak_gigabytes"] for run in runs),
        "images": images,
        "epochs": epochs,
        "batch_size": batch_size,
    }


class School:
    """A worker with a store of its own, as a server has it.

    Args:
        folder: For the store, and for images.
        architecture: Of the backbone.
        options: Device and threads.
        precision: Of training.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str,
        options: argparse.Namespace,
        precision: Precision = "auto",
    ) -> None:
        allocator.share()
        self._folder = folder
        device = device_of(options.device)
        backbone = random_backbone(architecture, torch.device("cpu"))
        self._size = backbone.preprocessing.height, backbone.preprocessing.width
        self.store = Store.open(folder / "store")
        self.store.set_backbone(backbone.config, state_of(backbone), export_template(backbone))
        compute = Compute(device, halves(precision, device))
        self.worker = Worker(self.store, compute, torch.get_num_threads())
        self._device = device
        self._tasks = 0

    def learn(self, images: int, epochs: int, **settings: Any) -> Found:
        """Learn ``images`` of ten new classes on top of the newest version."""
        self._tasks += 1
        spool = self._folder / f"spool-{self._tasks}"
        first = self._tasks * 10_000
        with SpoolWriter(spool) as writer, ThreadPoolExecutor(processors()) as pool:
            pictures = pool.map(partial(random_jpeg, self._size), range(first, first + images))
            for i, picture in enumerate(pictures):
                writer.add(picture, f"{self._tasks}-{i % 10}")
            writer.finish()
        numbers = self.store.numbers()
        reset_peak(self._device)
        tracker = Tracker()
        start = time.perf_counter()
        config = LearnConfig(epochs=epochs, **settings)
        self.worker.learn(
            f"task-{self._tasks}", spool, config, numbers[-1] if numbers else None, tracker
        )
        tracker.finish()
        return {
            "seconds": time.perf_counter() - start,
            "stages": {str(stage): value for stage, value in tracker.seconds.items()},
            "peak_gigabytes": peak_gigabytes(self._device),
        }


# -- the fiftieth task ----------------------------------------------------------------------------


def part_tasks(options: argparse.Namespace, record: Record) -> Found:
    """Whether a task costs what the tasks before it did."""
    found = record.take(
        {"part": "tasks", "tasks": options.tasks, "architecture": TINY},
        lambda: tasks(options, TINY),
    )
    return {
        "task50_over_task2": found["time_ratio"],
        "task50_over_task2_memory": found["memory_ratio"],
        "tasks": found,
    }


def tasks(options: argparse.Namespace, architecture: str) -> Found:
    """Time the last of many small tasks beside the second task of other stores.

    In turns, since the machine's pace changes by more than is looked for.
    """
    pairs = 6
    with tempfile.TemporaryDirectory() as name:
        long = School(Path(name) / "long", architecture, options)
        stream = [long.learn(64, 1) for _ in range(options.tasks - pairs)]
        early: list[Found] = []
        late: list[Found] = []
        for pair in range(pairs):
            # Task 2 of a store of its own each time: the first makes everything warm.
            short = School(Path(name) / f"short-{pair}", architecture, options)
            short.learn(64, 1)
            early.append(short.learn(64, 1))
            late.append(long.learn(64, 1))
    return {
        "time_ratio": median(b["seconds"] / a["seconds"] for a, b in zip(early, late, strict=True)),
        # To its own second task, in this process: what it has kept since must show. The pairs come
        # after that: the other stores' workers take memory, too.
        "memory_ratio": median(run["peak_gigabytes"] for run in stream[-pairs:])
        / stream[1]["peak_gigabytes"],
        "ratios_by_stage": {
            stage: median(
                b["stages"][stage] / a["stages"][stage] for a, b in zip(early, late, strict=True)
            )
            for stage in early[0]["stages"]
        },
        "early_seconds": [run["seconds"] for run in early],
        "late_seconds": [run["seconds"] for run in late],
        "stream_seconds": [run["seconds"] for run in stream],
        "stream_gigabytes": [run["peak_gigabytes"] for run in stream],
    }


# -- several processes ----------------------------------------------------------------------------


def part_group(options: argparse.Namespace, record: Record) -> Found:
    """Two processes on a processor each, against one on one."""
    if options.device == "cuda":
        size = torch.cuda.device_count()
        if size < 2:
            return {"group_speedup": None}
    else:
        size = 2
    found = record.take({"part": "group", "size": size}, lambda: group(options, size))
    return {"group_speedup": found["speedup"], "group": found}


def group(options: argparse.Namespace, size: int) -> Found:
    """Time the training of one task in alternation; medians of ratios."""
    ratios, alone, together = [], [], []
    for _ in range(3):
        alone.append(run_members(options, 1))
        together.append(run_members(options, size))
        ratios.append(alone[-1] / together[-1])
    return {"speedup": median(ratios), "alone_seconds": alone, "together_seconds": together}


def run_members(options: argparse.Namespace, size: int) -> float:
    """Return the seconds that ``size`` processes train for."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "-m", "tests.benchmarks.learning", "--member"]
    command += ["--device", options.device, "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


def member(options: argparse.Namespace) -> Found:
    """Be one process of a group, on a processor of its own."""
    device = device_of(options.device)
    if device.type == "cpu":
        mine = sorted(os.sched_getaffinity(0))[int(os.environ["LOCAL_RANK"])]
        os.sched_setaffinity(0, {mine})
        torch.set_num_threads(1)
    compute = Compute(device, halves("auto", device), Group.of_environment(device))
    backbone = random_backbone(TINY, device)
    data = random_images(backbone, 160, 10)
    tracker = Tracker()
    before, config = teaching.untaught(backbone), LearnConfig(epochs=1)
    learn_task(before, backbone, data, "task", config, tracker, compute=compute)
    found = {"seconds": tracker.seconds[Stage.TRAINING]}
    if compute.group.leads:
        print(json.dumps(found), flush=True)
    return found


# -- accuracy -------------------------------------------------------------------------------------


def part_accuracy(options: argparse.Namespace, record: Record) -> Found:
    """Final accuracy of the stream against the seconds spent, by epochs."""
    if not accuracy_benchmark.STREAM.exists():
        print("skipped: no stream beside the checkout")
        return {}
    table = {
        f"{epochs}, {precision}": record.take(
            {"part": "accuracy", "epochs": epochs, "seeds": options.seeds, "precision": precision},
            partial(accuracy, options, epochs, precision),
        )
        for epochs in options.epochs
        for precision in precisions(device_of(options.device))
    }
    met = [row for row in table.values() if row["final_accuracy"] >= PUBLISHED_ACCURACY]
    return {
        "seconds_to_published_accuracy": min((row["seconds"] for row in met), default=None),
        "share_of_published_time": (
            min(row["seconds"] for row in met) / PUBLISHED_SECONDS if met else None
        ),
        "accuracy": table,
    }


def accuracy(options: argparse.Namespace, epochs: int, precision: str) -> Found:
    """Learn the stream as five tasks."""
    command = ["--rows", "default", "--tasks", "5", "--seeds", options.seeds, "--no-docs"]
    command += ["--no-study", "--epochs", str(epochs), "--device", options.device]
    command += ["--precision", precision]
    command += ["--threads", str(torch.get_num_threads()), "--out", str(options.out / "accuracy")]
    accuracy_benchmark.main(command)
    whole = json.loads((options.out / "accuracy" / "results.json").read_text())
    return {
        "final_accuracy": float(np.mean([run["final"] for run in whole["runs"]])),
        "final_accuracies": [run["final"] for run in whole["runs"]],
        "seconds": float(np.mean([run["seconds"] for run in whole["runs"]])),
        "orders": len(whole["runs"]),
    }


# -- what all parts need --------------------------------------------------------------------------


def random_backbone(architecture: str, device: torch.device) -> Backbone:
    """Return an architecture with random weights."""
    torch.manual_seed(0)
    weights = timm.create_model(architecture, num_classes=0).state_dict()
    backbone = build_backbone(BackboneConfig(architecture, {}, {}), weights)
    backbone.module.to(device)
    return backbone


def random_images(backbone: Backbone, count: int, classes: int) -> LabelledImages:
    """Return ``count`` images of noise at model size."""
    generator = np.random.default_rng(0)
    size = backbone.preprocessing.height, backbone.preprocessing.width
    images = generator.integers(0, 256, (count, *size, 3), np.uint8)
    return LabelledImages(images, np.arange(count) % classes, tuple(map(str, range(classes))))


def random_jpeg(size: tuple[int, int], seed: int) -> bytes:
    """Return a picture of soft noise, as compressible as a photo."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((size[1] * 5 // 4, size[0] * 5 // 4)).save(file, "JPEG", quality=90)
    return file.getvalue()


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_gigabytes(device: torch.device) -> float:
    """Return the largest memory since ``reset_peak``: of the GPU, or of this process."""
    if device.type == "cuda":
        # What a recorded step works with is reserved, and not allocated while it is played back.
        return torch.cuda.max_memory_reserved() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def write(summary: Found) -> None:
    """Put the figures between the marks in docs/benchmarks.md."""
    path = ROOT / "docs" / "benchmarks.md"
    text = path.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{shown(summary)}\n{END}{tail}")


def shown(summary: Found) -> str:
    """Return the figures as tables."""
    lines = [
        f"On: {summary['device']}, {summary['threads']} threads, torch {summary['torch']}.",
        "",
    ]
    if "steps" in summary:
        columns = list(next(iter(summary["steps"].values())))
        lines += table_of("a step of", columns, summary["steps"])
    if "task" in summary:
        lines += table_of(
            "a task of",
            [
                *("images", "epochs", "batch_size", "seconds", "training_images_per_second"),
                *("non_step_share", "peak_gigabytes"),
            ],
            summary["task"],
        )
        stages = {name: row["stages"] for name, row in summary["task"].items()}
        lines += table_of("seconds of", list(next(iter(stages.values()))), stages)
    plain = {
        name: summary[name]
        for name in ("task50_over_task2", "task50_over_task2_memory", "group_speedup")
        if summary.get(name) is not None
    }
    if plain:
        lines += table_of("", list(plain), {"": plain})
    if "accuracy" in summary:
        lines += table_of(
            "epochs, precision", ["final_accuracy", "seconds", "orders"], summary["accuracy"]
        )
    return "\n".join(lines)


def table_of(title: str, columns: list[str], rows: dict[str, Found]) -> list[str]:
    """Return a table's lines."""
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def cell(value: Any) -> str:
    """Return a figure with three digits that say something."""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else (
        f"{value:.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


if __name__ == "__main__":
    main()
