"""An S3 server in a process of its own, which can be stopped in its tracks.

    python -m tests.deploy.s3_server

Prints its address, and serves until its standard input ends.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.core.object_store import make_bucket, s3_endpoint, s3_environment


@dataclass(frozen=True)
class S3:
    """A running server.

    Attributes:
        process: Its process.
        url: A bucket in it, and a prefix.
    """

    process: subprocess.Popen[str]
    url: str

    def take_away(self) -> None:
        """Have it answer nobody, as a network that swallows everything."""
        self.process.send_signal(signal.SIGSTOP)

    def bring_back(self) -> None:
        """Have it answer again."""
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running_s3() -> Iterator[S3]:
    """Run one, and have this process's environment name it."""
    command = [sys.executable, "-m", "tests.deploy.s3_server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            endpoint = process.stdout.readline().strip()
            before = dict(os.environ)
            os.environ.update(s3_environment(endpoint))
            try:
                yield S3(process, make_bucket(endpoint))
            finally:
                os.environ.clear()
                os.environ.update(before)
        finally:
            process.send_signal(signal.SIGCONT)
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it has a line for every request
    with s3_endpoint() as address:
        print(address, flush=True)
        sys.stdin.read()
