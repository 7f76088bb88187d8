"""Prometheus metrics: what they are, what counts events, and what reads the state at a scrape.

``METRICS`` is the one list of them; docs/observability.md has it as a table, and a test compares
both with what a server exports. No label has values from outside: methods are those of our
contracts, everything else is one of a few words, or a task's position.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from itertools import accumulate
from typing import Generic, Literal, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from inflora_core.config import Limits
from inflora_core.errors import DamagedError, NotFoundError
from inflora_core.model import Stage, Task, TaskState
from inflora_core.store import Store
from inflora_service.evaluations import Evaluations
from inflora_service.learner_process import LearnerProcess
from inflora_service.lineage import Lineage
from inflora_service.records import TaskRecords
from inflora_service.serving import Host
from inflora_service.space import KINDS, Space
from inflora_service.tasks import TaskQueue

log = logging.getLogger(__name__)

T = TypeVar("T")

OTHER = "other"
"""Stands for every method that is none of ours, whatever it is called."""

POSITIONS = 100
"""Newest tasks whose accuracy is exported."""

DISK_SECONDS = 15.0
"""How old the sizes of what is on the disk may be: a scrape does not walk through the store."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_BATCHES = tuple(float(2**power) for power in range(9))


@dataclass(frozen=True)
class Metric:
    """One metric, as Prometheus sees it.

    Attributes:
        kind: Its type.
        name: As exported; of a histogram or summary, without ``_bucket``, ``_sum`` and ``_count``.
        help: What it is.
        labels: Their names.
        buckets: Upper bounds, of a histogram.
    """

    kind: Literal["counter", "gauge", "histogram", "summary"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_counter, _gauge = partial(Metric, "counter"), partial(Metric, "gauge")
_histogram, _summary = partial(Metric, "histogram"), partial(Metric, "summary")

CALLS = _counter(
    "inflora_rpc_calls_total",
    "Calls that have ended, by gRPC status code.",
    ("service", "method", "code"),
)
DURATION = _histogram(
    "inflora_rpc_duration_seconds",
    "From the arrival of a call to its end.",
    ("service", "method"),
    _FAST,
)
IN_FLIGHT = _gauge("inflora_rpc_in_flight", "Calls that have not ended yet.", ("service", "method"))

IMAGES = _counter("inflora_images_total", "Images that the model has classified.", ("purpose",))
BATCH = _histogram(
    "inflora_predict_batch_images", "Images of one run of the model.", buckets=_BATCHES
)
RUN = _histogram("inflora_predict_run_seconds", "One run of the model.", buckets=_FAST[:-1])
WAITING = _gauge("inflora_predict_waiting_images", "Images of predictions that have no answer yet.")
WAITING_LIMIT = _gauge(
    "inflora_predict_waiting_images_limit",
    "Most that may wait; more are refused (--predict-waiting-images).",
)

ANSWERING = _gauge("inflora_answering", "1 if a version answers calls that name none, else 0.")
VERSION = _gauge("inflora_version", "Number of the version that answers; 0 if none does.")
STAND_IN = _gauge(
    "inflora_stand_in", "1 if it answers in place of a damaged current version, else 0."
)
CLASSES = _gauge("inflora_classes", "Classes that it knows.")
PROVIDER = _gauge(
    "inflora_provider_info",
    "1 for the execution provider of onnxruntime that runs it.",
    ("provider",),
)
SWAP = _histogram(
    "inflora_swap_seconds",
    "Making a version current, loading it included.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
VERSIONS = _gauge("inflora_versions_kept", "Versions in the store whose data are kept.")

TASKS = _gauge("inflora_tasks", "Tasks in the records, by state.", ("state",))
TASKS_LIMIT = _gauge(
    "inflora_tasks_queued_limit", "Most tasks that may be QUEUED; more are refused."
)
TASKS_ENDED = _counter(
    "inflora_tasks_ended_total", "Tasks that have ended since the start.", ("state",)
)
PROGRESS = _gauge(
    "inflora_task_progress_ratio", "How much is done of the task that is LEARNING, if one is."
)
STAGE = _summary(
    "inflora_task_stage_seconds", "Stages of tasks that were learned since the start.", ("stage",)
)

ACCURACY = _gauge(
    "inflora_task_accuracy_ratio",
    "Right answers to images of a task, all classes competing. By its position among the tasks "
    "that the version has learned (the newest 100), and by what was measured: images held out "
    "when it was learned, or those of the last Evaluate of the version that answered.",
    ("position", "source"),
)
LEAK = _gauge(
    "inflora_leak_ratio", "Largest leak of a layer, of the last task that the version has learned."
)
INTERFERENCE = _gauge("inflora_interference_ratio", "Likewise the largest interference.")
CAPACITY = _gauge(
    "inflora_capacity_ratio",
    "Free directions after that task: of the layer with the least, and of all layers together.",
    ("layers",),
)

STORE = _gauge("inflora_store_bytes", "What the store takes on the disk.", ("kind",))
DISK_FREE = _gauge("inflora_disk_free_bytes", "Free on the store's filesystem.")
DISK_NEEDED = _gauge(
    "inflora_disk_needed_bytes",
    "What has to be free for the next task to be accepted: --reserve-bytes, or a version.",
)

WORKER_UP = _gauge(
    "inflora_worker_up", "1 if the learning worker has started and takes tasks, else 0."
)
WORKER_ENDS = _counter(
    "inflora_worker_restarts_total", "Learning workers that ended and were replaced."
)

FOLLOW_VERSION = _gauge(
    "inflora_follow_version", "The version that is current in the shared store that is followed."
)
FOLLOW_LAG = _gauge(
    "inflora_follow_lag_seconds", "For how long another one has been answering; 0 if it is that."
)

FAULTS = _counter(
    "inflora_scrape_faults_total", "Parts of the state that could not be read; the log says why."
)
BUILD = _gauge(
    "inflora_build_info", "1, with what is running.", ("version", "python", "onnxruntime")
)

METRICS = (
    *(CALLS, DURATION, IN_FLIGHT),
    *(IMAGES, BATCH, RUN, WAITING, WAITING_LIMIT),
    *(ANSWERING, VERSION, STAND_IN, CLASSES, PROVIDER, SWAP, VERSIONS),
    *(TASKS, TASKS_LIMIT, TASKS_ENDED, PROGRESS, STAGE),
    *(ACCURACY, LEAK, INTERFERENCE, CAPACITY),
    *(STORE, DISK_FREE, DISK_NEEDED),
    *(WORKER_UP, WORKER_ENDS),
    *(FOLLOW_VERSION, FOLLOW_LAG),
    *(FAULTS, BUILD),
)
"""All of ours, in the order of the documentation."""

WORKER_PROCESS = "inflora_worker"
"""Beginning of the names of what is known of the worker's process."""


class Recorder(Collector):
    """Counts what happens.

    What every call comes by is plain numbers here, which become metrics at a scrape: counters of
    prometheus_client, with a lock each, made a call on the smallest model 7% longer, most of it in
    the thread that runs the model, while the event loop waited for the interpreter.

    Args:
        registry: What the counts are exported by.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._meters: dict[tuple[str, str], Meter] = {}
        self._predicted = self._evaluated = 0
        self._batch, self._run = Distribution(BATCH.buckets), Distribution(RUN.buckets)
        self._swap = Histogram(SWAP.name, SWAP.help, buckets=SWAP.buckets, registry=registry)
        ended = _new_counter(TASKS_ENDED, registry)
        self._ended = {state: ended.labels(state.value) for state in TaskState if state.ended}
        # Not of the last one, publishing: reports are written as it begins.
        stage = Summary(STAGE.name, STAGE.help, STAGE.labels, registry=registry)
        self._stages: dict[Stage, Summary] = {
            each: stage.labels(each.value) for each in Stage if each is not Stage.PUBLISHING
        }
        self._restarts = _new_counter(WORKER_ENDS, registry)
        registry.register(self)

    def meter(self, service: str, method: str) -> Meter:
        """Return what measures the calls of a method."""
        return self._meters.setdefault((service, method), Meter())

    def ran(self, predicted: int, evaluated: int, seconds: float) -> None:
        """Count a run of the model. One thread at a time may call it.

        Args:
            predicted: Its images of predictions.
            evaluated: Its images of evaluations.
            seconds: How long it took.
        """
        self._predicted += predicted
        self._evaluated += evaluated
        self._batch.add(predicted + evaluated)
        self._run.add(seconds)

    def swapped(self, seconds: float) -> None:
        """Count a version that was made current."""
        self._swap.observe(seconds)

    def ended(self, task: Task) -> None:
        """Count a task that has ended."""
        self._ended[task.state].inc()
        if task.report is not None:
            for stage, seconds in task.report.stage_seconds.items():
                self._stages[stage].observe(seconds)

    def worker_ended(self) -> None:
        """Count a worker that ended by itself."""
        self._restarts.inc()

    def answered(self, methods: Iterable[tuple[str, str]]) -> list[float]:
        """Return how many calls of some methods took up to each of ``DURATION``'s bounds, and all.

        Of those that ended well: a refusal takes no time. Methods that were never called are no
        series because of it.
        """
        total = [0.0] * (len(DURATION.buckets) + 1)
        for method in methods:
            if (meter := self._meters.get(method)) is not None:
                counts, _ = meter.answered.read()
                total = [a + b for a, (_, b) in zip(total, counts, strict=True)]
        return total

    def failed(self, methods: Iterable[tuple[str, str]]) -> int:
        """Return how many calls of some methods were refused, failed or given up."""
        meters = (self._meters.get(method) for method in methods)
        return sum(meter.failed.count for meter in meters if meter is not None)

    @property
    def predicted_images(self) -> int:
        """Images of predictions that the model has classified."""
        return self._predicted

    def collect(self) -> Iterator[Family]:
        """Yield the metrics of calls and of runs."""
        calls = CounterMetricFamily(CALLS.name, CALLS.help, labels=CALLS.labels)
        duration = HistogramMetricFamily(DURATION.name, DURATION.help, labels=DURATION.labels)
        in_flight = _family(IN_FLIGHT)
        images = CounterMetricFamily(IMAGES.name, IMAGES.help, labels=IMAGES.labels)
        batch = HistogramMetricFamily(BATCH.name, BATCH.help, labels=BATCH.labels)
        run = HistogramMetricFamily(RUN.name, RUN.help, labels=RUN.labels)
        for method, meter in list(self._meters.items()):
            for code, count in list(meter.codes.items()):
                calls.add_metric((*method, code), count)
            duration.add_metric(method, *meter.answered.read(meter.failed))
            in_flight.add_metric(method, meter.in_flight)
        images.add_metric(("predict",), self._predicted)
        images.add_metric(("evaluate",), self._evaluated)
        batch.add_metric((), *self._batch.read())
        run.add_metric((), *self._run.read())
        yield from (calls, duration, in_flight, images, batch, run)


class Distribution:
    """A histogram. One thread at a time adds to it, any may read it.

    Args:
        bounds: Upper bounds of its buckets.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self._counts)

    def read(self, other: Distribution | None = None) -> tuple[list[tuple[str, float]], float]:
        """Return how many values are up to each bound, as Prometheus writes it, and their sum.

        Args:
            other: One with the same bounds, whose values are added.
        """
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        parts = [self] if other is None else [self, other]
        counts = map(sum, zip(*(part._counts for part in parts), strict=True))
        total = sum(part._sum for part in parts)
        return list(zip(bounds, accumulate(counts), strict=True)), total


class Meter:
    """Measures the calls of one method, in the thread of the event loop.

    Attributes:
        in_flight: Those that have not ended.
        answered: How long those took that ended with OK, in seconds.
        failed: Likewise the others.
        codes: How many have ended with each status code.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.answered = Distribution(DURATION.buckets)
        self.failed = Distribution(DURATION.buckets)
        self.codes = {"OK": 0}

    def begin(self) -> float:
        """Note that a call begins; return what ``end`` wants to know."""
        self.in_flight += 1
        return time.perf_counter()

    def end(self, began: float, code: str) -> None:
        """Note that a call has ended, with the name of its status code."""
        taken = self.answered if code == "OK" else self.failed
        taken.add(time.perf_counter() - began)
        self.in_flight -= 1
        self.codes[code] = self.codes.get(code, 0) + 1


@dataclass(frozen=True)
class Following:
    """How a server that follows a shared store keeps up.

    Attributes:
        version: The version that is current there.
        lag_seconds: For how long another one has been answering here; 0 if it is that.
    """

    version: int
    lag_seconds: float


@dataclass(frozen=True)
class Sources:
    """Where the state is read. What a server does not have is None, and not exported.

    Attributes:
        store: The versions.
        space: The disk.
        limits: What is refused.
        host: What answers.
        lineage: Which version came of which.
        evaluations: What evaluations have found.
        tasks: The queue.
        records: The tasks.
        learner: The learning worker.
        following: Returns how the server follows another, None if it does not.
    """

    store: Store
    space: Space
    limits: Limits
    host: Host
    lineage: Lineage
    evaluations: Evaluations
    tasks: TaskQueue | None = None
    records: TaskRecords | None = None
    learner: LearnerProcess | None = None
    following: Callable[[], Following | None] = lambda: None


class State(Collector):
    """Reads the state of a server whenever it is asked, in the thread of whoever asks.

    Nothing is waited for but the disk, and for a moment the lock that predictions take, too.

    Args:
        sources: Where the state is.
        registry: What the count of faults is exported by.
    """

    def __init__(self, sources: Sources, registry: CollectorRegistry) -> None:
        self._sources = sources
        self._faults = _new_counter(FAULTS, registry)
        self._disk = Fresh(lambda: (sources.space.used(), len(sources.store.kept())), DISK_SECONDS)
        self._build = (release(), platform.python_version(), _onnxruntime())

    def describe(self) -> Iterator[Family]:
        """Yield the metrics without values: they are known before anything can be read."""
        for metric in _READ:
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        """Yield the metrics; those that cannot be read, without values."""
        families = {metric.name: _family(metric) for metric in _READ}
        for read in (
            self._serving,
            self._tasks,
            self._learned,
            self._on_disk,
            self._worker,
            self._followed,
        ):
            try:
                for metric, labels, value in read():
                    families[metric.name].add_metric(labels, value)
            except Exception:
                # Whatever it is: the rest is wanted all the more.
                self._faults.inc()
                log.exception("a part of the metrics cannot be read")
        families[BUILD.name].add_metric(self._build, 1)
        yield from families.values()

    def _serving(self) -> Iterator[_Sample]:
        host = self._sources.host
        answering = host.answering_now
        yield WAITING, (), host.waiting_images
        yield WAITING_LIMIT, (), self._sources.limits.predict_waiting_images
        yield ANSWERING, (), answering is not None
        yield VERSION, (), answering.version.number if answering else 0
        yield STAND_IN, (), host.stand_in is not None
        if answering is not None:
            yield CLASSES, (), len(answering.version.classes)
            yield PROVIDER, (answering.predictor.provider,), 1

    def _tasks(self) -> Iterator[_Sample]:
        records, tasks = self._sources.records, self._sources.tasks
        if records is not None:
            yield TASKS_LIMIT, (), self._sources.limits.queued_tasks
            counts = records.counts()
            for state in TaskState:
                yield TASKS, (state.value,), counts.get(state, 0)
        if tasks is not None and (progress := tasks.progress) is not None:
            yield PROGRESS, (), progress.fraction

    def _learned(self) -> Iterator[_Sample]:
        answering = self._sources.host.answering_now
        if answering is None:
            return
        report, learned = answering.version.report, []
        try:
            steps = self._sources.lineage.of(answering.version.number)
            learned = [(each, each.report) for each in steps if each.report is not None]
            report = learned[-1][1] if learned else None
        except (DamagedError, NotFoundError) as error:
            # Without what came before, positions would be other tasks'.
            log.warning(
                "what version %d has learned is not told: %s", answering.version.number, error
            )
        if report is not None:
            yield LEAK, (), report.leak
            yield INTERFERENCE, (), report.interference
            yield CAPACITY, ("mean",), report.capacity
            free = [layer.free_after / layer.dimension for layer in report.layers]
            yield CAPACITY, ("least",), min(free, default=0.0)
        evaluated = self._sources.evaluations.newest()
        numbered = list(enumerate(learned, 1))
        for position, (step, lesson) in numbered[-POSITIONS:]:
            if step.forgotten:
                continue
            if lesson.held_out_accuracy is not None:
                yield ACCURACY, (str(position), "learned"), lesson.held_out_accuracy
            if step.task in evaluated:
                yield ACCURACY, (str(position), "evaluated"), evaluated[step.task]

    def _on_disk(self) -> Iterator[_Sample]:
        space = self._sources.space
        yield DISK_FREE, (), space.free()
        yield DISK_NEEDED, (), space.needed()
        used, kept = self._disk.value()
        for kind in KINDS:
            yield STORE, (kind,), used[kind]
        yield VERSIONS, (), kept

    def _worker(self) -> Iterator[_Sample]:
        if self._sources.learner is not None:
            yield WORKER_UP, (), self._sources.learner.ready

    def _followed(self) -> Iterator[_Sample]:
        following = self._sources.following()
        if following is not None:
            yield FOLLOW_VERSION, (), following.version
            yield FOLLOW_LAG, (), following.lag_seconds


_Sample = tuple[Metric, Sequence[str], float]


class Fresh(Generic[T]):
    """A value that takes time to find out, and may be some seconds old. Safe for many threads.

    Args:
        find: Finds it out.
        seconds: How old it may be.
    """

    def __init__(self, find: Callable[[], T], seconds: float) -> None:
        self._find = find
        self._seconds = seconds
        self._found: tuple[float, T] | None = None
        self._finding = threading.Lock()

    def value(self) -> T:
        """Return it."""
        with self._finding:
            if self._found is None or time.monotonic() - self._found[0] > self._seconds:
                found = self._find()
                self._found = time.monotonic(), found
            return self._found[1]


_READ = tuple(
    metric
    for metric in METRICS
    if metric
    not in (
        *(CALLS, DURATION, IN_FLIGHT, IMAGES, BATCH, RUN, SWAP),
        *(TASKS_ENDED, STAGE, WORKER_ENDS, FAULTS),
    )
)
"""What is read at a scrape, not counted as it happens."""


def new_registry() -> CollectorRegistry:
    """Return a registry for one server; it has that of the process, too."""
    # When each series began would be a series of its own, beside every counter and histogram.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def watch(registry: CollectorRegistry, sources: Sources) -> None:
    """Have the state of a server exported."""
    registry.register(State(sources, registry))
    if (learner := sources.learner) is not None:
        ProcessCollector(WORKER_PROCESS, lambda: learner.pid or "none", registry=registry)


def _new_counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _family(metric: Metric) -> GaugeMetricFamily:
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)


def release() -> str:
    """Return which release of this software is running."""
    try:
        return installed("inflora-server")
    except PackageNotFoundError:
        return "unknown"  # it runs from its sources


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
