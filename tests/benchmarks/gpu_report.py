"""What a GPU does: ``make gpu-report GPU=1``. Each step is kept, so that a run can be continued.

Results go to ``build/gpu-report/{step}.json`` and, all of them, to docs/benchmarks.md between the
marks of this report. A step whose file exists is not run again; remove the file to repeat it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from inflora_core.backbone import Backbone
from inflora_core.config import LearnConfig
from inflora_core.export import export_template
from inflora_core.graph import OUTPUTS, PIXELS, materialise, split
from inflora_core.learner import learn_task
from inflora_core.model import ContinualModel, LabelledImages, Learned
from inflora_core.predictor import CPU, CUDA, Predictor, RuntimeOptions, processors
from inflora_core.progress import Tracker
from inflora_core.store import initial_layer
from tests.benchmarks import accuracy as accuracy_benchmark
from tests.benchmarks import learning as learning_benchmark
from tests.benchmarks import stream
from tests.benchmarks.accuracy import STREAM_BACKBONE
from tests.benchmarks.checkout import ROOT, commit
from tests.benchmarks.learning import random_backbone, random_images
from tests.benchmarks.serving import figures, scene, steps

OUT = ROOT / "build" / "gpu-report"
BEGIN, END = "<!-- gpu-report -->", "<!-- /gpu-report -->"


def main() -> None:
    """Run the steps that have no result yet, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--architecture", default="vit_base_patch16_224")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"))
    parser.add_argument(
        "--table",
        choices=("part", "whole"),
        default="whole",
        help="of the accuracy table: one order as 5 x 10, or all",
    )
    parser.add_argument("--swaps", type=int, default=60, help="versions that change under load")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here; --device cpu runs the same steps on the processor")
    OUT.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, step in STEPS.items():
        path = OUT / f"{name}.json"
        if name not in options.steps and not path.exists():
            continue
        if not path.exists():
            path.write_text(json.dumps(step(options), indent=1))
        results[name] = json.loads(path.read_text())
        print(name, json.dumps(results[name]), flush=True)
    write_report(ROOT / "docs" / "benchmarks.md", results)
    print(json.dumps(results | {"commit": commit(), "results": str(OUT)}))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Say what this ran on."""
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "providers": ort.get_available_providers(),
    }


def learning(options: argparse.Namespace) -> dict[str, Any]:
    """Steps, whole tasks and the stream's accuracy, as ``make bench-learning`` measures them."""
    command = ["--device", options.device, "--parts", "step", "task", "accuracy"]
    command += ["--seeds", "0 1 2", "--out", str(OUT / "learning")]
    found = learning_benchmark.main(command)
    stages = {name: row.pop("stages") for name, row in found["task"].items()}
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    return plain | {
        "a step of": found["steps"],
        "a task of": found["task"],
        "seconds of": stages,
        "the stream by epochs and precision": found.get("accuracy", {}),
    }


def runs(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a run by how it is made, and how far its answers are from the CPU's."""
    return {
        architecture: runs_of(random_backbone(architecture, torch.device(options.device)), options)
        for architecture in ("deit_tiny_patch16_224", options.architecture)
    }


def runs_of(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one architecture; whatever is slow once is over before it is timed."""
    learned = teach(
        backbone, random_images(backbone, 64, classes=4), LearnConfig(epochs=1), Tracker()
    )
    backbone.module.cpu()
    onnx = materialise(export_template(backbone), learned.model, 1)
    images = random_images(backbone, 64, classes=4).images
    exact = Predictor.load(onnx, RuntimeOptions(provider="cpu"))
    pixels = np.concatenate([exact.preprocess(image) for image in images])
    expected = exact.classify(pixels[:8])
    provider = CUDA if options.device == "cuda" else CPU
    settings = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    plain = ort.InferenceSession(split(onnx)[1], providers=settings)
    ways: dict[str, Callable[[Any], Any]] = {
        "session.run": lambda batch: plain.run(OUTPUTS, {PIXELS: batch})
    }
    name = "cuda" if provider == CUDA else "cpu"
    for way, more in {
        "bound": {"record": False},
        "recorded": {},
        "recorded, float16": {"precision": "float16"},
    }.items():
        predictor = Predictor.load(onnx, RuntimeOptions(provider=name, **more))  # type: ignore[arg-type]
        ways[way] = lambda batch, predictor=predictor: predictor.classify(batch)._arrays
    found: dict[str, Any] = {"provider": plain.get_providers()[0]}
    for way, run in ways.items():
        logits, _, embedding, _ = run(pixels[:8])
        found[way] = {
            "logits_differ_by": float(np.abs(logits - expected.logits).max()),
            "embedding_cosine": float(
                torch.nn.functional.cosine_similarity(
                    torch.from_numpy(embedding), torch.from_numpy(expected.embedding)
                ).min()
            ),
        }
    for size in (1, 8, 64):
        for run in ways.values():
            run(pixels[:size])
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(30 if options.device == "cuda" else 3):
            for way, run in ways.items():
                start = time.perf_counter()
                run(pixels[:size])
                times[way].append(time.perf_counter() - start)
        for way, seconds in times.items():
            found[way][f"milliseconds_of_{size}"] = round(1e3 * float(np.median(seconds)), 3)
    return found


SERVERS = {
    "cpu": ("--provider", "cpu"),
    "cuda": ("--provider", "cuda"),
    "cuda, float16": ("--provider", "cuda", "--predict-precision", "float16"),
}


def server(options: argparse.Namespace) -> dict[str, Any]:
    """The whole server: answers a second, and versions that change under load."""
    if not Path(STREAM_BACKBONE).exists():
        return {"skipped": f"no {Path(STREAM_BACKBONE).name} beside the checkout"}
    stage = scene.Scene(OUT / "server", processors())
    stage.out.mkdir(parents=True, exist_ok=True)
    scene.prepare(stage)
    lengths = steps.Lengths(seconds=3.0, warm_up=1.5, swaps=options.swaps, cancelled=0)
    found: dict[str, Any] = {}
    for name, flags in SERVERS.items():
        if options.device != "cuda" and "cuda" in name:
            continue
        loads = steps.ours(stage, lengths, (1, 16, 64), flags)
        found[name] = {
            clients: {
                "images_per_second": loads[clients]["throughput"],
                "p50_ms": 1e3 * loads[clients]["latency"]["p50"],
                "p99_ms": 1e3 * loads[clients]["latency"]["p99"],
                "errors": sum(loads[clients]["errors"].values()),
            }
            for clients in ("1", "16", "64")
        }
        print(name, found[name], flush=True)
    flags = SERVERS["cuda" if options.device == "cuda" else "cpu"]
    found["swaps"] = figures.of_swaps(steps.swaps(stage, lengths, flags=flags))
    return found


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the stream, where its data is; both presets."""
    data = Path(options.data)
    weights = data / "deit_tiny_patch16_224.fp16.safetensors"
    if not weights.exists():
        return {"skipped": f"no {weights.name} beside the checkout"}
    common = ["--data", str(data / "cifar100_stream50.npz"), "--backbone", str(weights)]
    published = ["--preset", "published", "--epochs", "5", "--set", "batch_size=32"]
    published += ["--set", "learning_rate=2e-3", "--mean", "0.45", "--std", "0.225"]
    results = {}
    for name, more in (("default", []), ("published", published)):
        out = OUT / f"stream-{name}"
        stream.main([*common, *more, "--out", str(out)])
        results[name] = stream.summarise(json.loads((out / "results.json").read_text()))
    return results


def table(options: argparse.Namespace) -> dict[str, Any]:
    """The accuracy table, where its data is; a run that is killed goes on where it was.

    Runs are kept where ``make bench-accuracy`` keeps them, and the table goes to the same marks.
    """
    data = Path(options.data)
    if not (data / "cifar100_stream50.npz").exists():
        return {"skipped": "no cifar100_stream50.npz beside the checkout"}
    command = ["--data", str(data / "cifar100_stream50.npz"), "--device", options.device]
    command += ["--backbone", str(data / "deit_tiny_patch16_224.fp16.safetensors")]
    if options.table == "part":
        command += ["--tasks", "5", "--seeds", "0"]
    summary = accuracy_benchmark.main(command)
    # A path of this machine has no place in the report.
    return {key: value for key, value in summary.items() if key != "results"}


def teach(
    backbone: Backbone, data: LabelledImages, config: LearnConfig, tracker: Tracker
) -> Learned:
    """Learn ``data`` as the first task."""
    layers = {
        name: initial_layer(backbone.qkv(name).get_parameter("weight").cpu().numpy())
        for name in backbone.config.layers
    }
    before = ContinualModel.untaught(layers, backbone.config.embedding_size)
    learned = learn_task(before, backbone, data, "task", config, tracker)
    tracker.finish()
    return learned


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the marks in ``path``."""
    text = path.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    blocks = "\n".join(f"\n### {name}\n\n{_shown(result)}" for name, result in results.items())
    path.write_text(f"{head}{BEGIN}\n{blocks}\n\n{END}{tail}")


def _shown(result: dict[str, Any], title: str = "") -> str:
    """Return plain figures as one table, and dictionaries of them as one with a row for each."""
    plain = {name: value for name, value in result.items() if not isinstance(value, dict)}
    rows = {name: value for name, value in result.items() if isinstance(value, dict)}
    deep = {
        name: row for name, row in rows.items() if any(isinstance(x, dict) for x in row.values())
    }
    parts = [_table({title: plain})] if plain else []
    for columns in dict.fromkeys(tuple(row) for name, row in rows.items() if name not in deep):
        parts.append(_table({name: row for name, row in rows.items() if tuple(row) == columns}))
    parts += [f"{name}:\n\n{_shown(row)}" for name, row in deep.items()]
    return "\n".join(parts)


def _table(rows: dict[str, dict[str, Any]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_cell(row[column]) for column in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) and value < 0.99 else str(_rounded(value))


def _rounded(value: Any) -> Any:
    return round(value, 6 if value < 1.01 else 2) if isinstance(value, float) else value


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "environment": environment,
    "learning": learning,
    "runs": runs,
    "server": server,
    "accuracy": accuracy,
    "table": table,
}

if __name__ == "__main__":
    main()
