"""``inflora_edge`` in an environment of its own: what it needs, and whether it answers alike."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inflora_client import Client
from inflora_core.compute import Compute
from inflora_core.config import LearnConfig
from inflora_core.progress import Tracker
from inflora_core.spool import SpoolWriter
from inflora_core.store import Store
from inflora_core.worker import Worker
from tests.benchmarks import data
from tests.benchmarks.accuracy import STREAM, STREAM_BACKBONE
from tests.benchmarks.checkout import ROOT
from tests.running_server import running_server

IMAGES = 500
EACH = 20
"""Images of a class to learn."""

SCRIPT = """
import json, re, sys
from pathlib import Path
from inflora_edge import Device, Server
address, folder, images = sys.argv[1:]
with Device(Server(address), Path(folder), threads=1) as device:
    device.update()
    labels = [device.model.predict(path).label for path in sorted(Path(images).iterdir())]
# Not ru_maxrss, which begins with that of the process that started this one.
most = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps({"labels": labels, "mebibytes": most / 1024}))
"""


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Install it into an empty environment, and compare it with the server; see the module."""
    if not STREAM.exists() or not STREAM_BACKBONE.exists():
        return {"alone_skipped": f"no {STREAM.name} beside the checkout"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "venv")
        images = taught(folder)
        with running_server(folder) as server:
            done = subprocess.run(
                [python, "-I", "-c", SCRIPT, server.address, folder / "device", images],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            mine = json.loads(done.stdout.splitlines()[-1])
            with Client(server.address) as client:
                theirs = [
                    client.predict([path], 1).predictions[0].scores[0].label
                    for path in sorted(images.iterdir())
                ]
        agreed = sum(a == b for a, b in zip(mine["labels"], theirs, strict=True))
        return {
            "alone_images": len(theirs),
            "alone_agreed": agreed,
            "alone_mebibytes": round(mine["mebibytes"], 1),
            "alone_packages": packages(python),
        }


def environment(folder: Path) -> Path:
    """Make an environment with ``inflora_edge`` and what that says it needs; return its Python."""
    uv = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    # The versions that all tests run with.
    pins = [
        f"{name}=={importlib.metadata.version(name)}"
        for name in ("grpcio", "numpy", "onnxruntime", "pillow")
    ]
    source = folder / "source"  # building leaves nothing behind in the checkout
    shutil.copytree(ROOT / "clients" / "inflora_edge", source)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, source, *pins], check=True)
    return python


def packages(python: Path) -> list[str]:
    """Return what is installed there."""
    code = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def taught(folder: Path) -> Path:
    """Teach a DeiT-tiny ten classes, in ``folder/store``; return a folder of other images."""
    tasks = data.load(str(STREAM), None, EACH, 0)
    spool, images = folder / "spool", folder / "images"
    images.mkdir()
    write(spool, tasks[0].train)
    # Of classes that it does not know, too: labels have to be the same, whether right or not.
    others = [image for task in tasks for image, _ in task.test]
    for number, image in enumerate(others[:: max(len(others) // IMAGES, 1)][:IMAGES]):
        (images / f"{number:04}.png").write_bytes(image)
    store = Store.open(folder / "store")
    worker = Worker(store, Compute(), 2)
    worker.prepare(str(STREAM_BACKBONE), None)
    version = worker.learn("first", spool, LearnConfig(epochs=1), None, Tracker())
    store.set_current(version)
    return images


def write(spool: Path, examples: Iterable[data.Example]) -> None:
    """Write examples as the worker reads them."""
    with SpoolWriter(spool) as writer:
        for image, label in examples:
            writer.add(image, label)
        writer.finish()
