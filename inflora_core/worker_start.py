"""Starts the learning worker, and ties its life to that of the server that starts it.

    python -m inflora_core.worker_start --store DIR ...       as ``inflora_core.worker``
    python -m inflora_core.worker_start --launcher 'torchrun --nproc-per-node 4 ...' --store DIR ...
                                                              several of them, by way of a launcher

The worker notices the end of its input only once torch is imported, which takes seconds. Until then
the worker of a server that was killed would hold the store, and the next server be refused.
"""

from __future__ import annotations

import ctypes
import os
import select
import shlex
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``."""


def end_with_parent() -> None:
    """Have the system kill this process as soon as its parent ends; on Linux only.

    Elsewhere the worker still ends when its input does.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before that: then nobody writes to the other end any more.
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)
    if any(event & select.POLLHUP for _, event in poll.poll(0)):
        sys.exit(0)


def launch(launcher: str, arguments: list[str]) -> NoReturn:
    """Become ``launcher``, which starts this module in several processes.

    It ends with this process's parent, too, and they with it: the system keeps that in mind.
    """
    command = shlex.split(launcher)
    if command[:1] == ["torchrun"]:  # that of this very environment, which need not be on PATH
        command[:1] = [sys.executable, "-m", "torch.distributed.run"]
    os.execvp(command[0], [*command, "-m", "inflora_core.worker_start", *arguments])


if __name__ == "__main__":
    end_with_parent()
    if sys.argv[1:2] == ["--launcher"]:
        launch(sys.argv[2], sys.argv[3:])
    from inflora_core.worker import main

    main()
