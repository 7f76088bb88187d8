"""The measurements. Each returns plain data, which ``figures`` makes figures of.

All load comes from this process, over loopback, without retries, and ends by itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from inflora_client import (
    Client,
    FailedPreconditionError,
    ResourceExhaustedError,
    RetryPolicy,
    TaskStage,
)
from inflora_client import _bench as bench
from inflora_client._calls import Question
from inflora_client._names import Names
from inflora_core.config import Limits
from inflora_core.images import decode
from inflora_core.predictor import Predictor, RuntimeOptions
from tests.benchmarks import data as streams
from tests.benchmarks.accuracy import STREAM
from tests.benchmarks.checkout import ROOT
from tests.benchmarks.serving import counting_server, peers
from tests.benchmarks.serving.scene import EACH, Scene, few
from tests.running_server import RunningServer

QUESTION = Question(Names("models/default"), 1, None, None, return_embedding=False)
CAPACITY = 64
"""Images that may wait in a server whose slots are counted."""


@dataclass(frozen=True)
class Lengths:
    """How long things are measured.

    Attributes:
        seconds: Of one load.
        warm_up: Before each.
        swaps: How often versions are swapped.
        cancelled: Calls with random deadlines and cancellations.
        soak: Seconds of load with everything at once.
    """

    seconds: float
    warm_up: float
    swaps: int
    cancelled: int
    soak: float = 900.0

    @property
    def calm(self) -> float:
        """Seconds of a load of which only the slowest calls count: it takes more of them."""
        return 3 * self.seconds


LOOPS = ("bare", "own")
"""Loops in one process: with the file as it is, and with what our server makes of it."""

SLICES = 4
"""Pieces that a load is cut into where two are compared closely: machines that are shared are a
fifth faster or slower from one minute to the next."""


def beside_bare(scene: Scene, lengths: Lengths, concurrency: Sequence[int]) -> dict[str, Any]:
    """Let the bare loops and our server take turns, a slice of each load at a time."""
    short = dataclasses.replace(lengths, seconds=lengths.seconds / SLICES)
    slices = []
    with scene.server() as server:
        calls = bench.PredictCalls(server.address, QUESTION, scene.images())
        for _ in range(SLICES):
            loops = {name: {"1": bare(scene, short, plain=name == "bare")} for name in LOOPS}
            slices.append(loops | {"ours": asyncio.run(sweep(calls, concurrency, short))})
    return {"slices": slices}


def bare(scene: Scene, lengths: Lengths, *, plain: bool) -> dict[str, Any]:
    """Run the bare loop, with the file as it is or with what our server makes of it."""
    part = scene.folder / "classify.onnx" if plain else ""
    arguments = [scene.model, part, scene.folder / "images", lengths.seconds, lengths.warm_up]
    command = [sys.executable, "-m", "tests.benchmarks.serving.bare"]
    result = subprocess.run(
        [*command, *map(str, arguments), str(scene.threads)],
        capture_output=True, text=True, check=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    return without_curve(json.loads(result.stdout))


def ours(
    scene: Scene,
    lengths: Lengths,
    concurrency: Sequence[int],
    flags: Sequence[str] = (),
    pace: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Measure our server, started for it with ``flags``, at some numbers of clients.

    Args:
        scene: Model, images and store.
        lengths: How long.
        concurrency: Numbers of clients.
        flags: For the server.
        pace: As for ``sweep``.
    """
    with scene.server(*flags) as server:
        images = scene.images()
        with connected(server) as client:
            labels = [client.predict([x], 1).predictions[0].scores[0].label for x in images]
        calls = bench.PredictCalls(server.address, QUESTION, images)
        loads = asyncio.run(sweep(calls, concurrency, lengths, pace))
    return loads | {"labels": labels}


def peer(
    which: peers.Peer,
    layout: str,
    scene: Scene,
    lengths: Lengths,
    concurrency: Sequence[int],
    pace: Callable[[], float],
) -> dict[str, Any]:
    """Measure a peer likewise; what it cannot do is said under ``error``."""
    try:
        with peers.running_peer(which, layout, scene) as port:
            images = scene.images()
            labels = peers.answers(which, port, images)
            loads = asyncio.run(sweep(which.connect(port, images), concurrency, lengths, pace))
    except (peers.PeerError, bench.CallFailedError) as error:
        return {"error": str(error)}
    return loads | {"labels": labels}


async def sweep(
    calls: Any,
    concurrency: Sequence[int],
    lengths: Lengths,
    pace: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Put closed loops on whatever is called; return their reports by the number of clients.

    Args:
        calls: Makes a call, in a context.
        concurrency: Numbers of clients.
        lengths: How long.
        pace: Tells how fast the machine is; its mean before and after a load is ``pace`` of the
            load's report.
    """
    found = {}
    bounds = bench.Bounds(lengths.seconds, warm_up=lengths.warm_up)
    async with calls as call:
        before = pace and pace()
        for clients in concurrency:
            load = bench.Closed(clients)
            report = bench.report(load, await bench.drive(call, load, bounds), 1)
            found[str(clients)] = without_curve(dataclasses.asdict(report))
            if pace and before:
                after = pace()
                found[str(clients)]["pace"] = (before + after) / 2
                before = after
    return found


def pace_of(scene: Scene) -> Callable[[], float]:
    """Return what tells how fast the machine is by now: images a second of the bare loop."""
    predictor = Predictor.load(scene.model, RuntimeOptions(scene.threads, "cpu"))
    images, limits = scene.images(), Limits()

    def pace() -> float:
        seconds = []
        for image in images[:_PACE_RUNS]:
            began = time.perf_counter()
            predictor.predict([decode(image, limits)])
            seconds.append(time.perf_counter() - began)
        return 1 / median(seconds)

    return pace


_PACE_RUNS = 20


def without_curve(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without what only pictures need."""
    return {name: value for name, value in report.items() if name not in ("curve", "versions")}


@dataclass
class Steady:
    """Clients that call all along, and what came of it while.

    Attributes:
        latencies: Of answered calls, since the last ``cut``.
        errors: Of the others, likewise.
    """

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def cut(self) -> dict[str, Any]:
        """Return what came since the last time."""
        found = {
            "latency": dataclasses.asdict(latency)
            if (latency := bench.summarise(self.latencies))
            else None,
            "answered": len(self.latencies),
            "errors": dict(self.errors),
        }
        self.latencies, self.errors = [], Counter()
        return found

    async def ask(self, call: bench.Call, clients: int, stop: asyncio.Event) -> None:
        """Keep ``clients`` calls under way until told to stop."""
        loop = asyncio.get_running_loop()

        async def client(first: int) -> None:
            number = first
            while not stop.is_set():
                began = loop.time()
                try:
                    await call(number, 60.0)
                except bench.CallFailedError as error:
                    self.errors[error.code] += 1
                else:
                    self.latencies.append(loop.time() - began)
                number += clients

        async with asyncio.TaskGroup() as group:
            for first in range(clients):
                group.create_task(client(first))


def swaps(
    scene: Scene, lengths: Lengths, clients: int = 8, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Swap two versions again and again under constant load; measure without before and after."""
    with scene.server(*flags) as server, connected(server) as client:
        memory = []

        def swap(number: int) -> None:
            client.promote(1 + (number + 1) % 2)  # version 1 is current
            memory.append(resident(server.process.pid))

        async def measured() -> dict[str, Any]:
            steady, stop = Steady(), asyncio.Event()
            calls = bench.PredictCalls(server.address, QUESTION, scene.images())
            async with calls as call, asyncio.TaskGroup() as group:
                group.create_task(steady.ask(call, clients, stop))
                try:
                    await asyncio.sleep(lengths.warm_up)
                    steady.cut()
                    await asyncio.sleep(lengths.calm)
                    before = steady.cut()
                    for number in range(lengths.swaps):
                        await asyncio.to_thread(swap, number)
                    during = steady.cut()
                    await asyncio.sleep(lengths.calm)
                    after = steady.cut()
                finally:
                    stop.set()
            return {"before": before, "during": during, "after": after}

        found = asyncio.run(measured())
    return found | {"swaps": lengths.swaps, "resident_bytes": memory}


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has, without what it shares with files."""
    sizes = [
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith(("RssAnon", "RssShmem"))
    ]
    if not sizes:
        raise LookupError(f"process {pid} has no memory")
    return sum(sizes)


def learning(scene: Scene, lengths: Lengths) -> dict[str, Any]:
    """Predict at half the highest load, while nothing else is done and while a task is learned."""
    images = scene.images()
    tasks = streams.load(str(STREAM), None, None, 0)
    with scene.server("--set", "epochs=1000") as server, connected(server) as client:

        async def load(what: bench.Closed | bench.Open) -> dict[str, Any]:
            calls = bench.PredictCalls(server.address, QUESTION, images)
            async with calls as call:
                bounds = bench.Bounds(lengths.calm, warm_up=lengths.warm_up)
                report = bench.report(what, await bench.drive(call, what, bounds), 1)
            return without_curve(dataclasses.asdict(report))

        most = asyncio.run(load(bench.Closed(16)))
        half = bench.Open(most["throughput"] / 2)
        before = exact(client, images)
        idle = asyncio.run(load(half))
        # It would be learned for hours; its images are others than those of the versions.
        task = client.learn(few(tasks[2], EACH))
        for now in client.watch(task):
            if now.stage is TaskStage.TRAINING or now.ended:
                break
        learning = asyncio.run(load(half))
        during = exact(client, images)
        still = client.task(task).stage is TaskStage.TRAINING
        client.cancel(task)
        for _ in client.watch(task):
            pass
        after = exact(client, images)
    return {
        "rate": half.rate,
        "idle": idle,
        "learning": learning,
        "learned_all_along": still,
        "identical": before == during == after,
    }


def soak(scene: Scene, lengths: Lengths) -> dict[str, Any]:
    """Predict at 70% of the highest load while tasks are learned and versions swapped."""
    images = scene.images()
    tasks = streams.load(str(STREAM), None, None, 0)
    flags = ("--gate-accuracy", "off", "--gate-distinct", "off", "--set", "epochs=2")
    memory: list[dict[str, float]] = []
    turns: Counter[str] = Counter()
    with scene.server(*flags) as server, connected(server) as client:
        began, over = time.monotonic(), threading.Event()

        async def load(what: bench.Closed | bench.Open, seconds: float) -> dict[str, Any]:
            calls = bench.PredictCalls(server.address, QUESTION, images)
            async with calls as call:
                bounds = bench.Bounds(seconds, warm_up=lengths.warm_up)
                report = bench.report(what, await bench.drive(call, what, bounds), 1)
            return without_curve(dataclasses.asdict(report))

        def look() -> None:
            worker = server.worker_pid()
            while not over.wait(2.0):
                memory.append(
                    {
                        "at": time.monotonic() - began,
                        "server": resident(server.process.pid),
                        "worker": resident(worker),
                    }
                )

        def teach_and_swap() -> None:
            """Teach task after task, in the end other images of known classes; go to and fro."""
            client.pin(1)
            for number in itertools.count():
                again, which = divmod(number, len(tasks))
                task = client.learn(few(tasks[which], EACH * (again % 5)))
                for now in client.watch(task):
                    if over.is_set() and not now.ended:
                        with suppress(FailedPreconditionError):  # it is being published by now
                            client.cancel(task)
                turns[now.state.name] += 1
                if over.is_set():
                    return
                newest = client.version().name
                for version in (1, newest):
                    client.promote(version)
                    turns["promoted"] += 1

        most = asyncio.run(load(bench.Closed(16), lengths.calm))
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(look), pool.submit(teach_and_swap)]
            try:
                found = asyncio.run(load(bench.Open(0.7 * most["throughput"]), lengths.soak))
            finally:
                over.set()
            for job in jobs:
                job.result()
    return {"load": found, "turns": dict(turns), "memory": memory, "seconds": lengths.soak}


def exact(client: Client, images: Sequence[bytes]) -> list[list[tuple[str, float]]]:
    """Return all probabilities of version 1 for each image, asked one by one."""
    return [
        [(score.label, score.probability) for score in prediction.scores]
        for image in images
        for prediction in client.predict([image], 1000, 1).predictions
    ]


def cancelling(scene: Scene, lengths: Lengths, clients: int = 64) -> dict[str, Any]:
    """Call with random deadlines and give up at random; then see that no place is lost."""
    images = scene.images()
    flags = ("--predict-waiting-images", str(CAPACITY))
    module = "tests.benchmarks.serving.counting_server"
    with scene.server(*flags, module=module) as server:
        ends = asyncio.run(give_up(server, images, lengths.cancelled, clients))
        with connected(server) as client:
            # Alone, a call may be of any size, unless images of another one are still counted.
            free = next((n for n in range(CAPACITY, 0, -1) if takes(client, images, n)), 0)
            held = told(server)
            calls = bench.PredictCalls(server.address, QUESTION, images)
            normal = asyncio.run(sweep(calls, [16], lengths))
    return {
        "ends": ends,
        "free": free,
        "held": held,
        "normal": normal["16"],
        "leaked_slots": max(CAPACITY - free, held["images"], held["calls"], int(not held["idle"])),
    }


async def give_up(
    server: RunningServer, images: Sequence[bytes], count: int, clients: int
) -> dict[str, int]:
    """Make calls most of which are given up; return how often each end came."""
    chance = random.Random(5)
    ends: Counter[str] = Counter()

    def soon_or_late() -> float:
        return 10 ** chance.uniform(-3.0, 0.7)  # 1 ms to 5 s

    async def call(ask: bench.Call, number: int) -> None:
        patience = soon_or_late() if chance.random() < 0.5 else None
        try:
            await asyncio.wait_for(ask(number, soon_or_late()), patience)
        except TimeoutError:
            ends["given up"] += 1
        except bench.CallFailedError as error:
            ends[error.code] += 1
        else:
            ends["answered"] += 1

    async def client(calls: Sequence[bench.Call], numbers: Iterator[int]) -> None:
        for number in numbers:
            await call(chance.choice(calls), number)

    numbers = iter(range(count))
    sizes = [bench.PredictCalls(server.address, QUESTION, images, batch) for batch in (1, 2, 5)]
    async with sizes[0] as one, sizes[1] as two, sizes[2] as five, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client([one, two, five], numbers))
    return dict(ends)


def takes(client: Client, images: Sequence[bytes], count: int) -> bool:
    """Whether a call with so many images is taken."""
    try:
        client.predict([images[i % len(images)] for i in range(count)], 1)
    except ResourceExhaustedError:
        return False
    return True


def told(server: RunningServer) -> dict[str, Any]:
    """Return what a ``counting_server`` says that it holds, once it holds nothing or for long."""
    path = server.store.parent / counting_server.HELD
    end = time.monotonic() + 20
    while True:
        path.unlink(missing_ok=True)
        server.process.send_signal(signal.SIGUSR1)
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        held: dict[str, Any] = json.loads(path.read_text())
        if held["idle"] or time.monotonic() > end:
            return held


@contextmanager
def connected(server: RunningServer) -> Iterator[Client]:
    """Connect a client that asks nothing twice."""
    with Client(server.address, retry=RetryPolicy(max_attempts=1), timeout=300.0) as client:
        yield client
