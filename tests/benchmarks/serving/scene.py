"""What all contenders are given: the model as one file and in two parts, and images."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from inflora_client import Client
from inflora_core import durable
from inflora_core.graph import split
from inflora_core.predictor import processors
from tests.benchmarks import data as streams
from tests.benchmarks import teaching
from tests.benchmarks.accuracy import STREAM, STREAM_BACKBONE
from tests.benchmarks.checkout import ROOT, commit
from tests.running_server import RunningServer, running_server

IMAGES = 64
"""Different images that are sent: more than anything would keep at hand by chance."""

SIDES = (500, 375)
"""Of the images, as those of ImageNet are on average."""

CLASSES, EACH = 10, 6
"""Of each of the two tasks: it does not matter what is learned, but that it is a real version."""


@dataclass(frozen=True)
class Scene:
    """The folder that everything is in.

    Attributes:
        out: Where results go.
        threads: That every contender may use to run the model.
    """

    out: Path
    threads: int

    @property
    def folder(self) -> Path:
        """Model and images."""
        return self.out / "scene"

    @property
    def model(self) -> Path:
        """The ONNX file of version 1."""
        return self.folder / "model.onnx"

    def images(self) -> list[bytes]:
        """Return the images, in their order."""
        return [path.read_bytes() for path in sorted((self.folder / "images").glob("*.jpg"))]

    @contextmanager
    def server(self, *options: str, module: str = "inflora_service") -> Iterator[RunningServer]:
        """Run our server on a copy of the store, with the threads that every contender has."""
        folder = self.out / "server"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(self.folder / "store", folder / "store")
        flags = ["--predict-threads", str(self.threads), "--log-level", "warning"]
        # In a session of its own, as every contender is: Linux shares processors between sessions.
        apart = ("setsid",)
        with running_server(folder, [*flags, *options], prefix=apart, module=module) as server:
            settle(server)
            yield server


def settle(server: RunningServer, patience: float = 120.0) -> None:
    """Wait until the learning worker has started, which takes processors for some seconds.

    A server that has just started answers already; it is measured as it is the rest of the time.
    """
    end, before = time.monotonic() + patience, -1.0
    while time.monotonic() < end:
        with suppress(LookupError):  # it is not there yet
            spent = processor_seconds(server.worker_pid())
            if spent == before and spent > 1:  # it imports torch, which takes more than that
                return
            before = spent
        time.sleep(1.0)
    raise RuntimeError("the learning worker does not come to rest")


def processor_seconds(pid: int) -> float:
    """Return how long a process has had a processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def prepare(scene: Scene) -> None:
    """Make the model and the images, unless they are there."""
    done = scene.folder / "scene.json"
    if done.exists():
        return
    for path in (STREAM, STREAM_BACKBONE):
        if not Path(path).exists():
            raise SystemExit(f"{path} is not there: the model and the images are made of it")
    print("making the model: two small tasks with DeiT-tiny", flush=True)
    shutil.rmtree(scene.folder, ignore_errors=True)
    (scene.folder / "images").mkdir(parents=True)
    tasks = streams.load(str(STREAM), None, None, 0)
    tests = [content for task in tasks for content, _ in task.test]
    for number, content in enumerate(tests[:: len(tests) // IMAGES][:IMAGES]):
        (scene.folder / "images" / f"{number:02}.jpg").write_bytes(enlarged(content))
    flags = ["--backbone", str(STREAM_BACKBONE), "--architecture", "deit_tiny_patch16_224"]
    flags += ["--epochs", "1", "--gate-accuracy", "off", "--gate-distinct", "off"]
    with (
        running_server(scene.folder, flags, timeout=600) as server,
        Client(server.address) as client,
    ):
        for task in tasks[:2]:
            client.wait(client.learn(few(task)))
        client.promote(1)
        client.download(1, to=scene.model)
    for name, part in zip(("preprocess", "classify"), split(scene.model.read_bytes()), strict=True):
        (scene.folder / f"{name}.onnx").write_bytes(part)
    durable.replace(done, json.dumps({"commit": commit()}).encode())


def few(task: streams.TaskData, first: int = 0) -> list[streams.Example]:
    """Return some examples of some classes of a task, the ``first`` of each left out."""
    return [
        example
        for label in task.labels[:CLASSES]
        for example in [x for x in task.train if x[1] == label][first : first + EACH]
    ]


def enlarged(content: bytes) -> bytes:
    """Return a small image as a JPEG of the size of a photo: decoding must cost what it does."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.resize(SIDES, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def code(folders: Sequence[str] = ("inflora_core", "service", "proto")) -> str:
    """Return a hash of the code that is measured, and of what measures it."""
    measures = ("tests/benchmarks/serving", "clients/inflora_client")
    files = sorted(path for name in (*folders, *measures) for path in (ROOT / name).rglob("*.py"))
    digests = "".join(map(teaching.code_digest, files))
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Say what this runs on, and with what."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.processor(),
        "processors": processors(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("onnxruntime", "grpcio", "numpy", "pillow")},
    }
