"""Groups of processes, for tests."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(size: int, module: str, *arguments: str) -> None:
    """Run a module in ``size`` processes; raise what they wrote if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
