"""Load for a server, and what it makes of it: arrivals, percentiles, and the loops that call.

Nothing here knows what a call is: ``drive`` takes a function. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from inflora_client._access import Access
from inflora_client._calls import Question
from inflora_client._channel import PREDICT, RetryPolicy, Stubs, channel_options

MAX_SECONDS = 3600.0
MAX_CALLS = 1_000_000
MAX_CONCURRENCY = 1024
MAX_RATE = 10_000.0
"""No load lasts longer than this, or is heavier."""

_OPEN_CALLS = 4096
"""Calls of an open loop that are under way at a time. Those that are due beyond that are sent
later, and their latency counts from when they were due all the same."""

CURVE = (0, 100, 250, 500, 750, 900, 950, 980, 990, 995, 998, 999, 1000)
"""Thousandths of the calls at which latencies are drawn."""

_LATE = "DEADLINE_EXCEEDED"

Call = Callable[[int, float], Awaitable[str]]
"""Makes the n-th call, which has so many seconds; returns what answered it.

Raises ``CallFailedError`` if it is not answered.
"""


class CallFailedError(Exception):
    """A call was not answered.

    Args:
        code: Why, the name of a gRPC status.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Closed:
    """So many clients, each of which asks again once it has its answer.

    While a server stalls they do not ask, so a stall hardly shows: that is what ``Open`` is for.

    Attributes:
        clients: At least 1.
    """

    clients: int


@dataclass(frozen=True, slots=True)
class Open:
    """Calls that come when they come, however long others take.

    Attributes:
        rate: Calls a second.
        poisson: Whether they come at random, as those of many people do, or evenly.
        seed: Of the randomness.
    """

    rate: float
    poisson: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a load ends.

    Attributes:
        seconds: No call is begun later than this.
        calls: Most calls.
        warm_up: Seconds of the same load before, which do not count.
        deadline: Seconds that a call has, from when it was due.
    """

    seconds: float
    calls: int = MAX_CALLS
    warm_up: float = 0.0
    deadline: float = 60.0


@dataclass(slots=True)
class Tally:
    """What became of the calls of one load.

    Attributes:
        latencies: Seconds of those that were answered, in the order of their ends.
        errors: Calls that were not answered, by gRPC status.
        versions: Calls that were answered, by what answered.
        lateness: The longest that a call was sent after it was due, in seconds.
        seconds: From the first call's beginning to the last one's end.
    """

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    lateness: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies of the calls that were answered, in seconds.

    Attributes:
        mean: Their mean.
        p50: Half of them took no longer.
        p90: 90% of them.
        p99: 99% of them.
        p999: 99.9% of them.
        max: All of them.
    """

    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load came to.

    Attributes:
        loop: ``closed`` or ``open``.
        concurrency: Clients of a closed loop.
        rate: Calls a second of an open loop.
        seconds: From the first call's beginning to the last one's end.
        calls: Calls in all.
        answered: Those that were answered.
        failed: Those that were not.
        throughput: Answered calls a second.
        images_per_second: Answered images a second.
        latency: Of the answered calls, from when each was due; None if there were none.
        errors: Failed calls by gRPC status.
        versions: Answered calls by the version that answered.
        lateness: The longest that a call was sent after it was due: what is large beside the
            latencies was too much for this machine, or for the bound on open calls.
        curve: Latencies at shares of the answered calls, (share, seconds).
    """

    loop: str
    concurrency: int | None
    rate: float | None
    seconds: float
    calls: int
    answered: int
    failed: int
    throughput: float
    images_per_second: float
    latency: Latency | None
    errors: dict[str, int]
    versions: dict[str, int]
    lateness: float
    curve: list[tuple[float, float]]


def percentile(ordered: Sequence[float], thousandths: int) -> float:
    """Return the least value that so many thousandths of all values do not exceed.

    It is one of the values: nothing is made up between the two slowest calls.

    Args:
        ordered: At least one value, in ascending order.
        thousandths: 0 to 1000.
    """
    rank = -(-len(ordered) * thousandths // 1000)
    return ordered[max(rank, 1) - 1]


def summarise(latencies: Sequence[float]) -> Latency | None:
    """Return the figures of some latencies, in any order; None without any."""
    if not latencies:
        return None
    ordered = sorted(latencies)
    return Latency(
        sum(ordered) / len(ordered), *(percentile(ordered, t) for t in (500, 900, 990, 999, 1000))
    )


def report(load: Closed | Open, tally: Tally, images: int) -> LoadReport:
    """Return what a load came to.

    Args:
        load: The load.
        tally: What became of its calls.
        images: Images of each call.
    """
    answered, failed = len(tally.latencies), tally.errors.total()
    throughput = answered / tally.seconds if tally.seconds > 0 else 0.0
    ordered = sorted(tally.latencies)
    return LoadReport(
        loop="closed" if isinstance(load, Closed) else "open",
        concurrency=load.clients if isinstance(load, Closed) else None,
        rate=load.rate if isinstance(load, Open) else None,
        seconds=tally.seconds,
        calls=answered + failed,
        answered=answered,
        failed=failed,
        throughput=throughput,
        images_per_second=throughput * images,
        latency=summarise(ordered),
        errors=dict(tally.errors.most_common()),
        versions=dict(tally.versions.most_common()),
        lateness=tally.lateness,
        curve=[(t / 1000, percentile(ordered, t)) for t in CURVE] if ordered else [],
    )


def arrivals(load: Open, seconds: float, calls: int = MAX_CALLS) -> Iterator[float]:
    """Yield when calls are due, in seconds from the beginning, in ascending order.

    Args:
        load: How they come.
        seconds: None is due later.
        calls: Most of them.
    """
    chance = random.Random(load.seed)
    due = chance.expovariate(load.rate) if load.poisson else 0.0
    for number in range(1, calls + 1):
        if due >= seconds:
            return
        yield due
        due = due + chance.expovariate(load.rate) if load.poisson else number / load.rate


async def drive(call: Call, load: Closed | Open, bounds: Bounds) -> Tally:
    """Put a load on a server, and return what became of it."""
    if bounds.warm_up > 0:
        await _drive(call, load, Bounds(bounds.warm_up, deadline=bounds.deadline))
    return await _drive(call, load, bounds)


async def _drive(call: Call, load: Closed | Open, bounds: Bounds) -> Tally:
    loop, tally = asyncio.get_running_loop(), Tally()
    start = loop.time()

    async def make(number: int, due: float) -> None:
        now = loop.time()
        tally.lateness = max(tally.lateness, now - due)
        left = due + bounds.deadline - now
        if left <= 0:
            tally.errors[_LATE] += 1
            return
        try:
            version = await call(number, left)
        except CallFailedError as error:
            tally.errors[error.code] += 1
        else:
            tally.latencies.append(loop.time() - due)
            tally.versions[version] += 1

    if isinstance(load, Closed):
        await _closed(make, load.clients, start + bounds.seconds, bounds.calls)
    else:
        await _open(make, start, arrivals(load, bounds.seconds, bounds.calls))
    tally.seconds = loop.time() - start
    return tally


async def _closed(
    make: Callable[[int, float], Awaitable[None]], clients: int, end: float, calls: int
) -> None:
    loop = asyncio.get_running_loop()
    numbers = iter(range(calls))

    async def ask() -> None:
        while (now := loop.time()) < end and (number := next(numbers, None)) is not None:
            await make(number, now)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())


async def _open(
    make: Callable[[int, float], Awaitable[None]], start: float, offsets: Iterator[float]
) -> None:
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(_OPEN_CALLS)

    async def ask(number: int, due: float) -> None:
        try:
            await make(number, due)
        finally:
            places.release()

    async with asyncio.TaskGroup() as group:
        for number, offset in enumerate(offsets):
            due = start + offset
            # Also where it is late: the others have to get on.
            await asyncio.sleep(max(0.0, due - loop.time()))
            await places.acquire()
            group.create_task(ask(number, due))


class PredictCalls:
    """Calls of ``Predict`` over one channel, without retries: a failure must not hide as a delay.

    Used as an asynchronous context manager.

    Args:
        target: Address of the server.
        question: What is asked of the images.
        images: At least one encoded image; calls take them in turn.
        batch: Images of each call.
        access: Who calls.
    """

    def __init__(
        self,
        target: str,
        question: Question,
        images: Sequence[bytes],
        batch: int = 1,
        access: Access | None = None,
    ) -> None:
        self._access = access or Access()
        self._target = target
        self._question = question
        self._images = images
        self._batch = batch

    async def __aenter__(self) -> Call:
        options = channel_options(RetryPolicy(max_attempts=1), self._target)
        self._channel: grpc.aio.Channel = self._access.open(grpc.aio, self._target, options)
        self._predict = Stubs(self._channel, self._access.metadata())[PREDICT]
        return self._call

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()

    async def _call(self, number: int, seconds: float) -> str:
        first, count = number * self._batch, len(self._images)
        request = self._question.request(
            self._images[i % count] for i in range(first, first + self._batch)
        )
        try:
            response = await self._predict(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise CallFailedError(error.code().name) from error
        version: str = response.version
        return version.rpartition("/")[2]
