"""A learner of two machines, as overlay ``multi-node`` starts it, on one.

The server's worker is the first, and the very command of the TrainJob's pods is the second. A task
is learned, what the second machine runs is killed, and another task is learned once it is back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from inflora_client import Client, TaskState
from tests.core import tiny
from tests.deploy.manifests import DEPLOY, pods
from tests.e2e.conftest import QUICK, examples
from tests.running_server import running_server


def measure(folder: Path) -> dict[str, Any]:
    """Learn with two machines; return how many tasks were, and what is wrong.

    Args:
        folder: Empty; the store and the logs stay there.
    """
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        "torchrun --nnodes=2 --node-rank=0 --nproc-per-node=1 "
        f"--master-addr=127.0.0.1 --master-port={port}"
    )
    options = (
        *(*QUICK, "--backbone", str(tiny.write_backbone(folder))),
        *("--device", "cpu", "--learn-launcher", launcher),
    )
    failed: list[str] = []
    with _second_machine(folder, port) as node, running_server(folder, options) as server:
        with Client(server.address, timeout=120) as client:
            for labels in (("red", "green"), ("blue",)):
                task = client.wait(client.learn(examples(*labels, each=6)))
                if task.state is not TaskState.PUBLISHED:
                    failed.append(f"{labels}: {task}")
                lost = _processes_of(node)
                if not lost:
                    failed.append(f"{labels}: the second machine took no part")
                for pid in lost:
                    os.kill(pid, signal.SIGKILL)
        node.terminate()
        if (status := node.wait(60)) != 128 + signal.SIGTERM:
            failed.append(f"the pod's command ends with {status}")
    return {
        "node_tasks": 2,
        "node_seconds": round(time.monotonic() - began, 1),
        "failed": failed,
    }


@contextlib.contextmanager
def _second_machine(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run what the TrainJob's pods run, with what differs outside of a cluster."""
    documents = yaml.safe_load_all((DEPLOY / "overlays/multi-node/nodes.yaml").read_text())
    ((_, pod),) = pods(list(documents))
    *shell, script = pod["spec"]["containers"][0]["command"]
    for there, here in {
        "--master-addr=inflora-rendezvous": "--master-addr=127.0.0.1",
        "--master-port=29400": f"--master-port={port}",
        "--store /store": f"--store '{folder / 'store'}'",
        "--device cuda": "--device cpu",
    }.items():
        assert there in script, there
        script = script.replace(there, here)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PET_NNODES": "1",  # as Trainer sets them in the one pod that the TrainJob has
        "PET_NODE_RANK": "0",
        "INFLORA_PROCESSORS": "1",
    }
    with (folder / "node.log").open("wb") as log:
        node = subprocess.Popen(
            [*shell, script],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield node
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def _processes_of(node: subprocess.Popen[bytes]) -> list[int]:
    """Return torchrun and the learning process that a shell has below it."""
    found: list[int] = []
    below = _children(node.pid)
    while below:
        pid = below.pop()
        with contextlib.suppress(FileNotFoundError):
            below += _children(pid)
            if b"inflora_core.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
