"""The supervisor of the learning worker, by itself."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from inflora_core.config import Gate, LearnConfig
from inflora_core.errors import CancelledError
from inflora_service import learner_process
from inflora_service.learner_process import LearnerProcess

ENDS_AT_ONCE = (sys.executable, "-S", "-E", "-c", "print('{}')")
ENDS_NEVER = (
    *(sys.executable, "-S", "-E", "-c"),
    """import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"event": "ready"}', flush=True)
time.sleep(1000)""",
)
ENDS_AFTER_TWO_COMMANDS = (
    *(sys.executable, "-S", "-E", "-c"),
    """import sys
print('{"event": "ready"}', flush=True)
sys.stdin.readline(), sys.stdin.readline()""",
)


async def test_stopping_while_workers_die_is_no_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever step the supervisor is, ``stop`` comes back and leaves no worker."""
    monkeypatch.setattr(learner_process, "RESTART_DELAYS", (0.0,))
    for steps in range(30):
        learner = LearnerProcess(ENDS_AT_ONCE)
        learner.start()
        for _ in range(5 * steps):
            await asyncio.sleep(0.001)
        pid = learner.pid
        await learner.stop()
        assert learner.pid is None
        if pid is not None:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_a_worker_that_does_not_end_by_itself_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learner_process, "STOP_SECONDS", 0.05)
    learner = LearnerProcess(ENDS_NEVER)
    learner.start()
    await learner.wait_ready()
    pid = learner.pid
    assert pid is not None
    await learner.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_cancelled_job_is_not_given_to_the_next_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker dies of job and cancellation, before it said anything of either."""
    monkeypatch.setattr(learner_process, "RESTART_DELAYS", (0.0,))
    learner = LearnerProcess(ENDS_AFTER_TWO_COMMANDS)
    learner.start()
    try:
        await learner.wait_ready()
        job = learner.learn("task", Path("spool"), LearnConfig(), Gate(), None, lambda _: None)
        learning = asyncio.create_task(job)
        await asyncio.sleep(0)  # the job is sent
        learner.cancel("task")
        async with asyncio.timeout(30):
            with pytest.raises(CancelledError):
                await learning
    finally:
        await learner.stop()
