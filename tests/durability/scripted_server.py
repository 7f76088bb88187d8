"""A real server process whose learning worker follows the script of a test.

As ``python -m inflora_service``, with ``--script`` for the socket that the worker asks on what to
do; see ``tests.service.scripted_worker``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from inflora_core.config import Limits
from inflora_service import learner_process
from inflora_service.server import Settings, serve

WORKER = Path(__file__).parents[1] / "service" / "scripted_worker.py"


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--task-attempts", type=int, required=True)
    parser.add_argument("--queued-tasks", type=int, required=True)
    parser.add_argument("--http-port", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    learner_process.RESTART_DELAYS = (0.0,)  # workers die of a test's script, not of the machine

    def announce(address: str) -> None:
        draft = options.ready_file.with_suffix(".draft")
        draft.write_text(address)
        os.replace(draft, options.ready_file)

    settings = Settings(
        store=options.store,
        port=options.port,
        http_port=options.http_port,
        limits=Limits(
            task_attempts=options.task_attempts,
            queued_tasks=options.queued_tasks,
            reserve_bytes=0,
        ),
        predict_threads=1,
        worker=(sys.executable, str(WORKER), "--script", str(options.script)),
    )
    asyncio.run(serve(settings, announce))


if __name__ == "__main__":
    main()
