"""Histories with a worker that follows a script: it can be held, and killed there."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from hypothesis import strategies as st
from hypothesis.stateful import precondition

from inflora_core.store import Store
from tests.durability.expected import BLACK, LEARNING, Colour, Request, Teach
from tests.durability.machine import (
    ATTEMPTS,
    FORGET,
    LABELS,
    PATIENCE,
    ROOM,
    TEACH,
    UPDATE,
    VERSIONS,
    Machine,
    in_time,
    step,
)
from tests.running_server import RunningServer, running_server
from tests.service.conftest import Script, png
from tests.service.mean_colour import make_backbone

POINTS = st.sampled_from(LEARNING)


class Scripted(Machine):
    """Its worker learns the mean colour of each class, with the one image that there is of it."""

    def prepare(self) -> None:
        make_backbone(Store.open(self.folder / "store"))
        self.script = Script(self.folder / "script")
        listening = self.loop.run(self.script.serve())
        self.stack.callback(lambda: self.loop.run(self.close(listening)))

    async def close(self, listening: asyncio.Server) -> None:
        listening.close()
        # The worker, which ends with its server, is heard out.
        if talking := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(talking, timeout=PATIENCE)

    def starting(self) -> AbstractContextManager[RunningServer]:
        options = ["--script", str(self.script.path)]
        options += ["--task-attempts", str(ATTEMPTS), "--queued-tasks", str(ROOM)]
        return running_server(
            self.folder, options, stop=False, module="tests.durability.scripted_server"
        )

    def start(self) -> None:
        self.script.hold("START")
        super().start()
        self.worker_started()

    def worker_started(self) -> None:
        self.loop.run(in_time(self.script.let_pass("START")))

    def images(self, colour: Colour) -> list[bytes]:
        return [png(colour)]

    def settle(self) -> None:
        super().settle()
        if self.expected.paused is not None:
            self.loop.run(in_time(self.paused(self.expected.paused)))

    async def paused(self, point: str) -> None:
        """Wait until the worker is held at a point, or its task ends, which it should not."""
        assert self.expected.running is not None
        waiting = [
            asyncio.ensure_future(self.script.reached(point)),
            asyncio.ensure_future(self.ended(self.expected.running)),
        ]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    # -- requests -----------------------------------------------------------------------------

    @step(point=POINTS, requests=st.lists(TEACH, min_size=2, max_size=4))
    def learn_several(self, point: str, requests: list[Teach]) -> None:
        if self.expected.hold is None:
            self.hold_at(point)
        for request in requests:
            self.sent(request)
            self.settle()

    @step(label=LABELS)
    def learn_badly(self, label: str) -> None:
        self.sent(Teach(((label, BLACK),)))

    # -- the worker ---------------------------------------------------------------------------

    @precondition(lambda self: self.expected.hold is None)
    @step(point=POINTS)
    def hold(self, point: str) -> None:
        self.hold_at(point)

    @precondition(lambda self: self.expected.hold is None)
    @step(point=POINTS, request=TEACH | FORGET | UPDATE)
    def hold_at_work(self, point: str, request: Request) -> None:
        self.hold_at(point)
        self.sent(request)

    @precondition(lambda self: self.expected.hold is None and self.expected.versions)
    @step(point=POINTS, request=TEACH | FORGET | UPDATE, version=VERSIONS, again=st.booleans())
    def promote_at_work(self, point: str, request: Request, version: int, again: bool) -> None:
        self.hold_at(point)
        self.sent(request)
        self.settle()
        self.make_current(version, force=False)
        if again and self.expected.paused is not None:
            self.kill_held_worker(again)

    @precondition(lambda self: self.expected.paused)
    @step(hold=POINTS)
    def go_on(self, hold: str) -> None:
        self.let_go(hold)

    @precondition(lambda self: self.expected.paused)
    @step()
    def go_on_freely(self) -> None:
        self.let_go(None)

    @precondition(lambda self: self.expected.paused)
    @step(again=st.booleans())
    def kill_worker(self, again: bool) -> None:
        self.kill_held_worker(again)

    @precondition(lambda self: self.expected.hold is None)
    @step(point=st.sampled_from(LEARNING[:-1]), request=TEACH | UPDATE)
    def have_set_aside(self, point: str, request: Request) -> None:
        self.hold_at(point)
        self.sent(request)
        self.settle()
        self.kill_until_set_aside()

    @precondition(lambda self: self.expected.paused not in (None, "LEARNED"))
    @step()
    def kill_workers(self) -> None:
        self.kill_until_set_aside()

    @precondition(lambda self: self.expected.breaks is None and not self.expected.paused)
    @step(point=st.sampled_from(LEARNING[:-1]), how=st.sampled_from(["fail", "exit"]))
    def break_next(self, point: str, how: str) -> None:
        self.expected.breaks = point, how
        fault = {"reason": "PARITY", "message": "they differ", "field": "", "status": 3}
        self.script.then(point, do=how, **fault)

    @precondition(lambda self: not self.expected.paused)
    @step()
    def kill_idle_worker(self) -> None:
        self.script.hold("START")
        with suppress(ProcessLookupError):  # of one that just died, the next is on its way
            self.script.kill(signal.SIGKILL)
        self.worker_started()

    # -- how it is done -----------------------------------------------------------------------

    @contextmanager
    def releasing(self) -> Iterator[None]:
        paused = self.expected.paused
        before = self.script.waiting_at(paused)
        with super().releasing():
            yield
        if paused is not None and self.expected.paused is None:
            self.script.leave(paused, before)

    def hold_at(self, point: str) -> None:
        self.expected.hold = point
        self.script.hold(point)

    def let_go(self, hold: str | None) -> None:
        assert self.expected.paused is not None
        self.script.release(self.expected.paused)
        if hold is not None:
            self.script.hold(hold)
        self.expected.go_on(hold)

    def kill_until_set_aside(self) -> None:
        """Kill one worker after the other, all of them where the first is held, if it is."""
        task = self.expected.running
        while task is not None and not task.ended:
            self.kill_held_worker(again=True)
            self.settle()

    def kill_held_worker(self, again: bool) -> None:
        """Kill the worker where it is held; whether the next one is held there, too."""
        assert self.expected.paused is not None
        if not again:
            self.script.pass_from_now_on(self.expected.paused)
            self.expected.hold = None
        self.script.kill(signal.SIGKILL)
        self.expected.crash()
