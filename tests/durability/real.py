"""Histories with the worker that learns. Nobody can hold it: it is killed somewhere in its work."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from hypothesis import strategies as st

from inflora_client import TaskStage, TaskState
from inflora_client.errors import StatusError
from tests.core import tiny
from tests.durability.expected import Colour, Request
from tests.durability.machine import (
    ATTEMPTS,
    FORGET,
    TEACH,
    UPDATE,
    Machine,
    in_time,
    same,
    step,
)
from tests.running_server import RunningServer, running_server
from tests.service.conftest import BLUE, GREEN, RED, WHITE

OPTIONS = ("--epochs", "2", "--batch-size", "8", "--learn-threads", "1", "--predict-threads", "1")
OPTIONS += ("--gate-accuracy", "off", "--gate-distinct", "off", "--gate-interference", "off")
OPTIONS += ("--task-attempts", str(ATTEMPTS), "--reserve-bytes", "0")
EACH = 6
"""Images of a class."""
NAMES = {RED: "red", GREEN: "green", BLUE: "blue", WHITE: "white", (255, 255, 0): "yellow"}
ROOM = 100
"""Tasks that may wait, where the command line does not say: more than ever do."""
STARTS = 10
"""How often a server is started at most, until it has the store."""
ANY = TEACH | FORGET | UPDATE
MOMENTS = st.integers(1, 12)
"""How many pieces of news the worker gives before something happens to it."""


@functools.cache
def prepared() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with a store that has a backbone, for as long as this process runs."""
    folder = tempfile.TemporaryDirectory(prefix="rules-")
    path = Path(folder.name)
    backbone = ["--backbone", str(tiny.write_backbone(path))]
    with running_server(path, [*OPTIONS, *backbone]):
        return folder


class Real(Machine):
    """Its worker teaches a tiny network, which cannot tell all colours apart."""

    gate = False
    nearest = False

    def prepare(self) -> None:
        self.expected.room = ROOM
        shutil.copytree(Path(prepared().name) / "store", self.folder / "store")

    def starting(self) -> AbstractContextManager[RunningServer]:
        return running_server(self.folder, OPTIONS, stop=False)

    def start(self) -> None:
        # A worker that is still loading torch does not notice that its server was killed, and keeps
        # the store: whoever looks after a server starts it again.
        for _ in range(STARTS - 1):
            try:
                return super().start()
            except RuntimeError as error:
                if "is in use by another server" not in str(error).splitlines()[-1]:
                    raise
        return super().start()

    def images(self, colour: Colour) -> list[bytes]:
        return [tiny.png(NAMES.get(colour, "black"), i) for i in range(EACH)]

    @step(request=ANY, moment=MOMENTS)
    def kill_worker_at_work(self, request: Request, moment: int) -> None:
        self.disturb(request, moment, self.kill_worker)

    @step(request=ANY, moment=MOMENTS)
    def kill_server_at_work(self, request: Request, moment: int) -> None:
        self.disturb(request, moment, self.kill_server_now)

    @step(request=ANY, moment=MOMENTS)
    def cancel_at_work(self, request: Request, moment: int) -> None:
        self.disturb(request, moment, self.cancel_newest)

    @step(requests=st.lists(TEACH, min_size=2, max_size=3))
    def learn_several(self, requests: list[Request]) -> None:
        for request in requests:
            self.sent(request)

    # -- how it is done -----------------------------------------------------------------------

    def disturb(self, request: Request, moment: int, what: Callable[[], None]) -> None:
        """Send a request, and do something when its worker has given so much news."""
        before = len(self.expected.tasks)
        self.sent(request)
        if len(self.expected.tasks) > before:
            self.loop.run(in_time(self.news(self.expected.tasks[-1].id, moment)))
            what()

    async def news(self, task: str, count: int) -> None:
        """Wait for so many pieces of news of a task, or its end."""
        async for seen in self.client.watch(task):
            count -= seen.stage is not TaskStage.UNSPECIFIED
            if count <= 0:
                return

    def kill_worker(self) -> None:
        os.kill(self.server.worker_pid(), signal.SIGKILL)

    def kill_server_now(self) -> None:
        self.server.process.kill()
        self.start_again(killed=True)

    def cancel_newest(self) -> None:
        """Give the newest task up, if that is still possible."""
        task = self.expected.tasks[-1]
        try:
            cancelled = self.loop.run(in_time(self.client.cancel(task.id)))
        except StatusError as error:
            same(error.reason, "WRONG_STATE")
        else:
            same(cancelled.state, TaskState.CANCELLED)
            self.expected.cancel(task.number)
