"""A real server process in a folder of its own, for end-to-end tests and benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunningServer:
    """A server that listens.

    Attributes:
        address: ``host:port``.
        process: The server's process; its learning worker is a child of it.
        store: The store's folder.
        log: What both processes have written so far.
    """

    address: str
    process: subprocess.Popen[bytes]
    store: Path
    log: Path

    @property
    def http(self) -> str:
        """Where it answers HTTP, ``host:port``."""
        found = re.findall(r"metrics on http://([^/\s]+)/metrics", self.log.read_text())
        return str(found[-1])

    def worker_pid(self) -> int:
        """Return the process id of the learning worker.

        Raises:
            LookupError: it is not running.
        """
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"inflora_core.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        raise LookupError("the learning worker is not running")


@contextmanager
def running_server(
    folder: Path,
    options: Sequence[str] = (),
    *,
    timeout: float = 180,
    stop: bool = True,
    prefix: Sequence[str] = (),
    module: str = "inflora_service",
) -> Iterator[RunningServer]:
    """Start ``python -m inflora_service`` on a free port and wait until it listens.

    Args:
        folder: Holds the store (``store``), and the log.
        options: More command-line options.
        timeout: Seconds until it must listen.
        stop: Whether to end it with SIGTERM and demand that it exits with 0.
        prefix: A command that executes the one that is appended to it, as ``env`` does.
        module: What to run in place of ``inflora_service``.

    Raises:
        RuntimeError: it ended before it listened; the message holds its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe, log = folder / "ready", folder / "server.log"
    pipe.unlink(missing_ok=True)  # of a server that used the folder before
    command = [*prefix, sys.executable, "-m", module, "--store", str(folder / "store")]
    command += ["--port", "0", "--http-port", "0", "--ready-file", str(pipe), *options]
    # Of a package that is not installed, the roots must be on the path of both processes.
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=os.environ
        )
    ended = threading.Event()

    def wait_for_end() -> None:
        process.wait()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        waited = 0.0
        while not pipe.exists():
            if ended.wait(0.02) or waited > timeout:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            waited += 0.02
        yield RunningServer(pipe.read_text().strip(), process, folder / "store", log)
        if stop:
            process.send_signal(signal.SIGTERM)
            if not ended.wait(60) or process.returncode != 0:
                raise RuntimeError(f"the server did not stop well:\n{log.read_text()}")
    finally:
        if process.poll() is None:
            process.kill()
        ended.wait(10)
