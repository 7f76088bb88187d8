"""Other model servers with the same file: installed apart from ours, started, and asked.

A peer is set up as its documentation advises, and in two layouts, because they differ in what is
good for which load: ``split`` has a copy of the model for each thread, ``whole`` one copy with all
threads. Where a peer is compared with, its better layout counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from inflora_client import _bench as bench
from tests.benchmarks.checkout import ROOT
from tests.benchmarks.serving.callers import Http, OpenInference
from tests.benchmarks.serving.scene import Scene

LAYOUTS = ("split", "whole")

START_SECONDS = 180.0

Connect = Callable[[int, Sequence[bytes]], AbstractAsyncContextManager[bench.Call]]


class PeerError(Exception):
    """A peer cannot be installed or started here, or gives no answer."""


@dataclass(frozen=True)
class Peer:
    """How to install, start and ask a peer.

    Attributes:
        name: What it is called.
        requirement: What to install, exactly.
        beside: What it needs beside that, and does not say.
        command: What starts it, after the environment's ``bin/``.
        connect: Asks it at a port, with images.
        settings: How it is set up, for the table.
    """

    name: str
    requirement: str
    beside: tuple[str, ...]
    command: tuple[str, ...]
    connect: Connect
    settings: str


PEERS = (
    Peer(
        "LitServe",
        "litserve==0.2.19",
        ("python-multipart",),  # for uploads
        ("python", "litserve_server.py"),
        lambda port, images: Http(port, "/predict", images, field="request"),
        "HTTP, an upload; `workers_per_device` = copies, no batching (its default)",
    ),
    Peer(
        "MLServer",
        "mlserver==1.7.1",
        ("uvloop==0.21.0",),  # its workers do not start with newer ones
        ("mlserver", "start", "."),
        lambda port, images: OpenInference(port, [1], images),
        "gRPC; a custom runtime, `parallel_workers` = copies, no batching (its default)",
    ),
    Peer(
        "BentoML",
        "bentoml==1.4.40",
        (),
        ("bentoml", "serve", "bentoml_server:Classify"),
        lambda port, images: Http(port, "/classify", images),
        "HTTP, the image as the body; `workers` = copies, no batching (its default)",
    ),
    Peer(
        "PyTriton",
        "nvidia-pytriton==0.7.0",
        (),
        ("python", "pytriton_server.py"),
        lambda port, images: OpenInference(port, [1, 1], images),
        "gRPC; `infer_func` = a callable for each copy, dynamic batches of up to 4 (its default)",
    ),
)


def install(peer: Peer, out: Path) -> Path:
    """Return the folder of a peer's own environment, made now if there is none.

    Raises:
        PeerError: it cannot be installed; the message says what uv says.
    """
    folder = out / f"env-{peer.name.lower()}"
    # The same runtime and the same decoder as ours: what differs is the server.
    same = [f"{name}=={version(name)}" for name in ("onnxruntime", "pillow")]
    wanted = [peer.requirement, *peer.beside, *same]
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == "\n".join(wanted):
        return folder
    uv = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *wanted],
    ):
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=600, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"{peer.name} cannot be installed: {error}") from error
        if result.returncode:
            raise PeerError(f"{peer.name} cannot be installed: {result.stderr.strip()[-600:]}")
    stamp.write_text("\n".join(wanted))
    return folder


@contextmanager
def running_peer(peer: Peer, layout: str, scene: Scene) -> Iterator[int]:
    """Start a peer, wait until it answers, and yield its port; nothing of it runs afterwards.

    Raises:
        PeerError: it cannot be installed, or does not answer.
    """
    environment = install(peer, scene.out)
    workers = scene.threads if layout == "split" else 1
    port, *more = free_ports(3)
    folder = scene.out / f"peer-{peer.name.lower()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(__file__).parent / "contenders", folder)
    _configure_mlserver(folder, workers, port, more)
    command = [str(environment / "bin" / peer.command[0]), *peer.command[1:]]
    if peer.name == "BentoML":
        command += ["--host", "127.0.0.1", "--port", str(port), "--working-dir", str(folder)]
    variables = os.environ | {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        # Triton takes any libpython that the system finds, and it must be this interpreter's.
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
        "HOME": str(folder),  # what it keeps for itself goes with it
        "BENTOML_DO_NOT_TRACK": "True",
        "BENCH_MODEL": str(scene.folder.resolve()),
        "BENCH_WORKERS": str(workers),
        "BENCH_THREADS": str(scene.threads // workers),
        "BENCH_PORT": str(port),
        "BENCH_MORE_PORTS": ",".join(map(str, more)),
    }
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group of its own, which is ended as a whole
        )
        stack.callback(_end, process)
        _wait(peer, process, port, scene, folder / "log")
        yield port


def answers(peer: Peer, port: int, images: Sequence[bytes]) -> list[str]:
    """Return a peer's label for each image."""

    async def ask() -> list[str]:
        async with peer.connect(port, images) as call:
            return [await call(number, 30.0) for number in range(len(images))]

    return asyncio.run(ask())


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _configure_mlserver(folder: Path, workers: int, port: int, more: Sequence[int]) -> None:
    settings = {
        "host": "127.0.0.1",
        "grpc_port": port,
        "http_port": more[0],
        "metrics_endpoint": None,
        "parallel_workers": workers,
        "debug": False,
    }
    model = {"name": "classify", "implementation": "mlserver_runtime.Classify"}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))


def _wait(peer: Peer, process: subprocess.Popen[bytes], port: int, scene: Scene, log: Path) -> None:
    image, end = scene.images()[:1], time.monotonic() + START_SECONDS
    last: object = "nothing"
    while time.monotonic() < end and process.poll() is None:
        try:
            answers(peer, port, image)
        except (bench.CallFailedError, LookupError, ValueError) as error:
            last = error
            time.sleep(0.25)
        else:
            return
    state = f"ended with {process.returncode}" if process.returncode is not None else "runs"
    tail = log.read_text(errors="replace")[-1500:]
    raise PeerError(f"{peer.name} does not answer ({last}; it {state}): {tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 15.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + patience
        while time.monotonic() < end and _has_members(process):
            time.sleep(0.05)
    process.wait()


def _has_members(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # a child that has ended is a member until it is waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
