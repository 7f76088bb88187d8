"""The one place that constructs everything, starts it, and stops it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Literal

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import make_wsgi_app

from inflora.oip.v2 import open_inference_pb2, open_inference_pb2_grpc
from inflora.v1 import (
    evaluator_service_pb2,
    evaluator_service_pb2_grpc,
    learner_service_pb2,
    learner_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    predictor_service_pb2,
    predictor_service_pb2_grpc,
)
from inflora_core import tracing
from inflora_core.audit import AuditLog, History
from inflora_core.config import Gate, LearnConfig, Limits, Retention
from inflora_core.errors import (
    DamagedError,
    FencedError,
    InfloraError,
    InvalidInputError,
    UnavailableError,
)
from inflora_core.logs import Format
from inflora_core.mirror import FETCHING, claim
from inflora_core.predictor import RuntimeOptions
from inflora_core.replica import Replica, is_replica
from inflora_core.shared import SharedStore
from inflora_core.store import Store
from inflora_core.tracing import Tracing
from inflora_service import backbone_source, metrics, web
from inflora_service.access import AccessInterceptor
from inflora_service.auditing import AuditTrail
from inflora_service.backbone_source import BackboneSource
from inflora_service.codec import receive_bytes
from inflora_service.console import Console, Rules
from inflora_service.errors import ErrorInterceptor
from inflora_service.evaluating import Evaluator
from inflora_service.evaluations import Evaluations
from inflora_service.evaluator_servicer import EvaluatorServicer
from inflora_service.examples import Examples, KeepExamples
from inflora_service.following import Follower, FollowingHost
from inflora_service.health import Health
from inflora_service.health_port import health_server
from inflora_service.learner_process import LearnerProcess
from inflora_service.learner_servicer import LearnerServicer
from inflora_service.lineage import Lineage
from inflora_service.model_servicer import Changes, ModelServicer
from inflora_service.observing import ObservingInterceptor
from inflora_service.oip_servicer import OipServicer
from inflora_service.predictor_servicer import PredictorServicer
from inflora_service.promoting import ModelHost
from inflora_service.publishing import Publisher
from inflora_service.pulse import Pulse
from inflora_service.records import TaskRecords
from inflora_service.reloading import keep_fresh
from inflora_service.resuming import Uploads
from inflora_service.security import Security, SecuritySettings
from inflora_service.serving import Host
from inflora_service.space import Space
from inflora_service.store_lock import StoreLock
from inflora_service.tasks import TaskQueue

log = logging.getLogger(__name__)

SERVER = ""
LEARNER = learner_service_pb2.DESCRIPTOR.services_by_name["LearnerService"].full_name
PREDICTOR = predictor_service_pb2.DESCRIPTOR.services_by_name["PredictorService"].full_name
EVALUATOR = evaluator_service_pb2.DESCRIPTOR.services_by_name["EvaluatorService"].full_name
MODEL = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
OIP = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for contract in (
        evaluator_service_pb2,
        learner_service_pb2,
        model_service_pb2,
        open_inference_pb2,
        predictor_service_pb2,
    )
    for service in contract.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
"""All methods of our contracts, as gRPC calls them."""

HTTP_PORT = 9464
"""Where metrics are to be found if nothing else is asked for: OpenTelemetry's port for them."""

ALIVE_SECONDS = 5.0
"""How long the event loop may take to answer a probe."""

CURRENT = f"{MODEL}/current"
"""Names under which health is asked for; ``SERVER`` is the server as a whole. ``CURRENT`` alone is
not serving while another version answers in place of the current one."""


@dataclass(frozen=True)
class Settings:
    """What a server can be told.

    Attributes:
        store: Folder of the store, made if there is none.
        backbone: What a new store is made with: ``bundled``, a name on a model hub, or a file. None
            means ``bundled`` for a new store, and whatever it has for an existing one.
        architecture: timm's name of the architecture, where the backbone does not say.
        host: Address to listen on.
        port: Port to listen on; 0 takes any free one.
        http_host: Address on which metrics and probes are answered by HTTP.
        http_port: Port for that; 0 takes any free one. ``auto`` takes ``HTTP_PORT``, and goes on
            without where it is taken; ``off`` answers none.
        console: Whether the console is there, too.
        log_format: Of the learning worker's log; the server's own is set up by who starts it.
        health_port: Port on which health alone is answered, in the clear; None for no such port, 0
            for any free one.
        max_connection_age_seconds: After this long, about, a connection takes no new calls, and its
            client connects again; calls that run go on. 0: never.
        learn: Settings of tasks that ask for none.
        limits: What is refused.
        gate: What versions are held back for.
        canary_images: Images of each new class to keep, to see what later tasks cost it; with 0
            there are none, and those that were kept are deleted.
        retention: Which versions are kept.
        provider: What onnxruntime predicts with.
        predict_threads: Threads of predictions; 0: one for each processor.
        predict_runs: Runs of the model on the CPU that share them; 0: one for each thread.
        predict_precision: Of the backbone on a GPU; see ``RuntimeOptions``.
        learn_threads: Threads of the learning worker; 0: all processors but one.
        learn_memory_bytes: Memory that the learning worker may take; 0: any.
        learn_nice: How far other processes come before the learning worker, 0 (not at all) to 19.
        device: What the learning worker learns on: ``auto``, ``cpu`` or ``cuda``.
        learn_precision: What it multiplies matrices in while training: ``auto``, ``float32`` or
            ``bfloat16``.
        learn_deterministic: Whether a GPU gives the same bits twice, at a price in speed.
        learn_launcher: What starts several workers that learn together; one, if empty.
        keep_examples: How long examples are kept once their task has ended.
        drain_seconds: How long running calls may take when the server stops.
        role: ``all`` learns and predicts; ``learner`` leaves predicting to others, ``predictor``
            follows a shared store, and learns nothing.
        shared: URL of a store that a learner publishes to and predictors follow; "" for none.
        take_over: Whether a learner takes the place of the one that publishes there.
        poll_seconds: From one look of a predictor at the shared store to the next.
        cache_bytes: What a predictor keeps of the shared store's files; 0: all that it fetched.
        worker: How to start the learning worker; more arguments are appended.
        security: Who may call, and whether others can listen in.
    """

    store: Path
    backbone: str | None = None
    architecture: str | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    http_host: str = "127.0.0.1"
    http_port: int | Literal["auto", "off"] = "auto"
    console: bool = True
    log_format: Format = "text"
    health_port: int | None = None
    max_connection_age_seconds: float = 0.0
    learn: LearnConfig = field(default_factory=LearnConfig)
    limits: Limits = field(default_factory=Limits)
    gate: Gate = field(default_factory=Gate)
    canary_images: int = 0
    retention: Retention = field(default_factory=Retention)
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    predict_threads: int = 0
    predict_runs: int = 0
    predict_precision: Literal["float32", "float16"] = "float32"
    learn_threads: int = 0
    learn_memory_bytes: int = 0
    learn_nice: int = 10
    device: str = "auto"
    learn_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    learn_deterministic: bool = False
    learn_launcher: str = ""
    keep_examples: KeepExamples = "never"
    drain_seconds: float = 30.0
    role: Literal["all", "learner", "predictor"] = "all"
    shared: str = ""
    take_over: bool = False
    poll_seconds: float = 5.0
    cache_bytes: int = 0
    worker: tuple[str, ...] = (sys.executable, "-m", "inflora_core.worker_start")
    security: SecuritySettings = field(default_factory=SecuritySettings)


class Server:
    """A server, from ``start`` to ``stop``.

    Attributes:
        address: Where it listens, ``host:port``. Set by ``start``.
        http_address: Where it answers HTTP; "" if it does not. Set by ``start``.
        health_address: Where health alone is answered, None if nowhere. Set by ``start``.
        host: Its loaded versions. Set by ``start``.
        tasks: Its queue; a predictor has none. Set by ``start``.
        publisher: Publishes to the shared store, if there is one.
        follower: Follows it, in a predictor.
    """

    address: str
    http_address: str
    health_address: str | None
    host: Host
    tasks: TaskQueue
    publisher: Publisher | None = None
    follower: Follower | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._health = Health()
        self._registry = metrics.new_registry()
        self._undo = AsyncExitStack()
        self._lost: FencedError | None = None
        self._over = asyncio.Event()
        self._console: Console | None = None

    async def start(self) -> None:
        """Take the store and the port, and serve. Nothing stays behind if that fails.

        Raises:
            UnavailableError: the port, the store or the execution provider cannot be had.
            StoreFormatError: a newer release wrote the store.
            DamagedError: the store's backbone or its records are damaged, or lost while versions or
                tasks are there.
            InvalidInputError: certificates or tokens cannot be used, or anybody could call.
            InfloraError: for a new store, why there can be none with that backbone.
        """
        async with AsyncExitStack() as undo:
            # First of all: what may not be started so must not leave a store behind.
            await self._secure(undo)
            await self._answer_probes(undo)
            if self._settings.role == "predictor":
                await self._start_following(undo)
            else:
                await self._start(undo)
            self._security.announce()
            self._undo = undo.pop_all()

    async def wait_over(self) -> None:
        """Wait until it has to be stopped: for good, unless it publishes to a shared store.

        Raises:
            FencedError: another learner publishes there.
        """
        await self._over.wait()
        assert self._lost is not None, "nothing else ends it"
        raise self._lost

    async def stop(self) -> None:
        """Refuse what is new, finish what runs, and leave the store to the next server."""
        await self._undo.aclose()

    async def _start(self, undo: AsyncExitStack) -> None:
        # What is registered last is undone first.
        settings = self._settings
        if is_replica(settings.store):
            raise InvalidInputError(
                f"{settings.store} is a copy of a shared store, which --role predictor keeps",
                field="store",
            )
        if (settings.store / FETCHING).exists() and not settings.shared:
            raise InvalidInputError(
                f"{settings.store} has only a part of what it took over: start with --shared",
                field="store",
            )
        store = await asyncio.to_thread(Store.open, settings.store)
        lock = await asyncio.to_thread(StoreLock, store.root)
        undo.callback(lock.release)
        publisher = self.publisher = await self._claim(store)
        recorder, server, address = await self._listen(undo)
        records = await asyncio.to_thread(TaskRecords, store.root)
        undo.callback(records.close)
        audit = AuditTrail(await asyncio.to_thread(AuditLog, store.root), store, records)
        undo.callback(audit.note_head)

        host = ModelHost(
            store,
            self._runtime_options(),
            settings.limits,
            audit,
            on_serving=lambda: self._set_answering(True),
            on_sound=lambda sound: self._health.set(CURRENT, sound),
            on_changed=publisher.notify if publisher else lambda: None,
            on_swap=recorder.swapped,
            on_run=recorder.ran,
        )
        undo.callback(host.close)
        evaluations = await asyncio.to_thread(Evaluations, records)
        evaluator = Evaluator(host, settings.limits, evaluations.add)
        undo.callback(evaluator.close)
        learner = LearnerProcess(
            self._worker_command(),
            keep_open=[lock.descriptor],
            on_health=lambda healthy: self._health.set(LEARNER, healthy),
            on_end=recorder.worker_ended,
        )
        examples = Examples(store.root, settings.keep_examples)
        space = Space(store, settings.limits)
        uploads = Uploads(examples, space, settings.limits)
        tasks = TaskQueue(
            *(store, records, host, audit, learner, settings.learn, settings.limits),
            *(settings.gate, settings.canary_images, settings.retention),
            *(examples, uploads, space),
            self._security.access.queued_tasks,
            on_ended=recorder.ended,
        )
        self._watch(
            metrics.Sources(
                *(store, space, settings.limits, host, Lineage(store), evaluations),
                *(tasks, records, learner),
            ),
            undo,
        )
        self.host, self.tasks = host, tasks
        if publisher:
            undo.push_async_callback(publisher.stop)  # last: it may wait for what it puts
        undo.push_async_callback(uploads.close)
        undo.push_async_callback(server.stop, settings.drain_seconds)
        undo.push_async_callback(learner.stop)

        new = not store.has_backbone()
        if new:
            await asyncio.to_thread(_refuse_remains, store, audit.history, records)
            learner.start()
            await self._make_backbone(store, learner)
        else:
            await asyncio.to_thread(self._check_backbone, store, audit.history)
        await audit.begin()
        self._health.set(LEARNER, True)
        self._set_answering(False)
        await host.start()
        await tasks.start()
        undo.push_async_callback(tasks.stop)
        self._register(server, store, host, evaluator, Changes(host, tasks))
        await server.start()
        if publisher:
            publisher.start()
        for service in (SERVER, MODEL):  # not before: the health port is there from the beginning
            self._health.set(service, True)
        if not new:
            learner.start()  # only now: its imports keep a processor busy for seconds
        undo.callback(self._health.end)
        self.address = address
        log.info("listening on %s", address)
        await asyncio.to_thread(_warn_of_bundled, store.root)

    async def _start_following(self, undo: AsyncExitStack) -> None:
        settings = self._settings
        if not settings.shared:
            raise InvalidInputError(
                "a predictor follows a shared store: say which one with --shared", field="shared"
            )
        shared = SharedStore.open(settings.shared)
        replica = await asyncio.to_thread(Replica.of, shared, settings.store, settings.cache_bytes)
        lock = await asyncio.to_thread(StoreLock, replica.root)
        undo.callback(lock.release)
        await asyncio.to_thread(replica.tidy)
        recorder, server, address = await self._listen(undo)
        host = FollowingHost(
            replica,
            self._runtime_options(),
            settings.limits,
            on_serving=lambda: self._set_answering(True),
            on_swap=recorder.swapped,
            on_run=recorder.ran,
        )
        undo.callback(host.close)
        evaluations = Evaluations()
        evaluator = Evaluator(host, settings.limits, evaluations.add)
        undo.callback(evaluator.close)
        self.host = host
        follower = self.follower = Follower(
            replica,
            host,
            settings.poll_seconds,
            on_sound=lambda sound: self._health.set(CURRENT, sound),
        )
        space = Space(replica, settings.limits)
        sources = metrics.Sources(
            *(replica, space, settings.limits, host, Lineage(replica), evaluations),
            following=lambda: metrics.Following(follower.version, follower.lag_seconds),
        )
        self._watch(sources, undo)
        undo.push_async_callback(follower.stop)  # after the drain: it may wait for what it fetches
        undo.push_async_callback(server.stop, settings.drain_seconds)
        self._set_answering(False)
        await follower.start()
        self._register(server, replica, host, evaluator, None)
        await server.start()
        for service in (SERVER, MODEL):  # not before: as above
            self._health.set(service, True)
        undo.callback(self._health.end)
        self.address = address
        log.info("listening on %s; following %s", address, settings.shared)

    async def _claim(self, store: Store) -> Publisher | None:
        """Become the learner that publishes to the shared store, if there is one."""
        settings = self._settings
        if not settings.shared:
            return None
        shared = SharedStore.open(settings.shared)
        mirror = await asyncio.to_thread(claim, store, shared, take_over=settings.take_over)
        log.info("publishing to %s as learner %s", settings.shared, mirror.seen.root.writer)
        return Publisher(mirror, self._give_way)

    def _give_way(self, error: FencedError) -> None:
        log.critical("%s", error)
        self._lost = error
        self._over.set()

    def _runtime_options(self) -> RuntimeOptions:
        settings = self._settings
        return RuntimeOptions(
            threads=settings.predict_threads,
            provider=settings.provider,
            runs=settings.predict_runs,
            precision=settings.predict_precision,
        )

    async def _secure(self, undo: AsyncExitStack) -> None:
        """Read certificates and tokens, and go on doing so when they change."""
        settings = self._settings
        self._security = await asyncio.to_thread(
            Security, settings.security, settings.host, settings.limits.max_calls
        )
        if watched := self._security.watched:
            seconds = settings.security.reload_seconds
            fresh = asyncio.create_task(keep_fresh(watched, seconds), name="keep-fresh")
            undo.callback(fresh.cancel)

    async def _listen(self, undo: AsyncExitStack) -> tuple[metrics.Recorder, grpc.aio.Server, str]:
        """Take the ports; what is asked by HTTP is answered from now on."""
        traces = await asyncio.to_thread(tracing.begin, "server")
        if traces is not None:
            undo.push_async_callback(asyncio.to_thread, traces.close)
        recorder = metrics.Recorder(self._registry)
        server, address = self._bind(recorder, traces)
        self.http_address = self._answer_http(recorder, undo)
        return recorder, server, address

    def _watch(self, sources: metrics.Sources, undo: AsyncExitStack) -> None:
        """Have metrics and console show the server's state from now on."""
        metrics.watch(self._registry, sources)
        if self._console is not None:
            self._console.watch(sources, predicts=self._settings.role != "learner")
            undo.callback(self._console.stop)

    def _bind(
        self, recorder: metrics.Recorder, traces: Tracing | None
    ) -> tuple[grpc.aio.Server, str]:
        settings = self._settings
        _check_address(settings.host, settings.port)
        options: list[tuple[str, object]] = [
            # Two servers on one port would share its connections at random.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", receive_bytes(settings.limits)),
        ]
        if age := settings.max_connection_age_seconds:
            # No grace is set, so there is no end to it: a stream that outlives the connection's age
            # goes on, and only what its client calls next takes another connection.
            options.append(("grpc.max_connection_age_ms", max(1, round(age * 1000))))
        server = grpc.aio.server(
            # The first goes around all others.
            interceptors=[
                ObservingInterceptor(recorder, METHODS),
                *([traces.interceptor(METHODS)] if traces is not None else ()),
                ErrorInterceptor(),
                AccessInterceptor(self._security.access),
            ],
            options=options,
        )
        certificates = self._security.certificates
        credentials = certificates.credentials() if certificates else None
        return server, _listen(server, settings.host, settings.port, "port", credentials)

    def _answer_http(self, recorder: metrics.Recorder, undo: AsyncExitStack) -> str:
        """Answer metrics and probes, and the console's questions; return where.

        Raises:
            UnavailableError: the port that was asked for cannot be had.
        """
        settings, asked = self._settings, self._settings.http_port
        if asked == "off":
            return ""
        routes = {
            "/metrics": web.few(make_wsgi_app(self._registry)),
            "/healthz": web.text(partial(_is_alive, asyncio.get_running_loop())),
            "/readyz": web.text(self._is_ready),
        }
        posts = {}
        console = self._new_console(recorder) if settings.console else None
        if console is not None:
            routes |= console.routes()
            posts = console.posts()
        try:
            server = web.WebServer(
                settings.http_host, HTTP_PORT if asked == "auto" else asked, routes, posts
            )
        except UnavailableError as error:
            if asked != "auto" or not web.is_taken(error):
                raise
            log.warning("there are no metrics: %s; --http-port takes another", error.message)
            return ""
        undo.callback(server.close)
        log.info("metrics on http://%s/metrics", server.address)
        if console is not None:
            log.info("console on http://%s/", server.address)
        self._console = console
        return server.address

    def _new_console(self, recorder: metrics.Recorder) -> Console:
        settings = self._settings
        rules = Rules(settings.http_host, settings.security.insecure)
        pulse = Pulse(recorder)
        return Console(self._security.access, recorder, pulse, rules, metrics.release())

    def _is_ready(self, query: Mapping[str, str]) -> tuple[HTTPStatus, str]:
        """Say of a service what gRPC health says of it."""
        service = query.get("service", SERVER)
        serving = self._health.of(service)
        if serving is None and service != SERVER:
            return HTTPStatus.NOT_FOUND, "SERVICE_UNKNOWN\n"
        if not serving:
            return HTTPStatus.SERVICE_UNAVAILABLE, "NOT_SERVING\n"
        return HTTPStatus.OK, "SERVING\n"

    async def _answer_probes(self, undo: AsyncExitStack) -> None:
        """Tell of health on a port of its own, if there is one, until all else has ended."""
        settings = self._settings
        self.health_address = None
        if settings.health_port is None:
            return
        self._health.set(SERVER, False)  # not yet
        _check_address(settings.host, settings.health_port)
        server = health_server(self._health)
        self.health_address = _listen(server, settings.host, settings.health_port, "health-port")
        undo.push_async_callback(server.stop, None)
        await server.start()
        log.info("health alone is on %s, in the clear", self.health_address)

    def _worker_command(self) -> tuple[str, ...]:
        settings = self._settings
        return (
            *settings.worker,
            *(("--launcher", settings.learn_launcher) if settings.learn_launcher else ()),
            *("--store", str(settings.store)),
            *("--device", settings.device),
            *("--precision", settings.learn_precision),
            *(("--deterministic",) if settings.learn_deterministic else ()),
            *("--threads", str(settings.learn_threads)),
            *("--memory-bytes", str(settings.learn_memory_bytes)),
            *("--nice", str(settings.learn_nice)),
            *(("--log-format", "json") if settings.log_format == "json" else ()),
        )

    async def _make_backbone(self, store: Store, learner: LearnerProcess) -> None:
        asked = await asyncio.to_thread(self._asked_backbone)
        log.info("making a store with the backbone %s in %s", asked.source, store.root)
        # Before there is one: a store that has a backbone knows of which it is, whatever happens.
        await asyncio.to_thread(backbone_source.remember, store.root, asked)
        await learner.prepare(asked.source, asked.architecture)

    def _check_backbone(self, store: Store, history: History) -> None:
        """See that the store's backbone is sound, and the one asked for if one is.

        And the list of forgotten classes, without which nothing could be loaded: what the audit log
        says was forgotten stays so, should the list have been lost. A purge may have passed over a
        version whose manifest is sound again: it is finished. Canary images go that nobody asks for
        any more, and files that were half replaced. What the log says was pinned or retired is so,
        too.
        """
        store.backbone()
        store.forget(history.forgotten)
        _mark_again(store, history)
        try:
            store.purge(history.purged)
            store.clear_canaries(all_of_them=not self._settings.canary_images)
            for path in store.half_replaced():
                path.unlink()
        except OSError as error:
            log.warning("what was left behind stays until the next start: %s", error)
        if self._settings.backbone is not None:
            backbone_source.check(store.root, self._asked_backbone())

    def _asked_backbone(self) -> BackboneSource:
        source = self._settings.backbone or backbone_source.DEFAULT
        return BackboneSource.of(source, self._settings.architecture)

    def _register(
        self,
        server: grpc.aio.Server,
        store: Store,
        host: Host,
        evaluator: Evaluator,
        changes: Changes | None,
    ) -> None:
        limits, ours = self._settings.limits, [MODEL]
        tasks = changes.tasks if changes else None
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(store, host, changes), server
        )
        if tasks is not None:
            ours.append(LEARNER)
            learner_service_pb2_grpc.add_LearnerServiceServicer_to_server(
                LearnerServicer(tasks, self._settings.learn, limits), server
            )
        if self._settings.role != "learner":
            ours += [PREDICTOR, EVALUATOR, OIP]
            predictor_service_pb2_grpc.add_PredictorServiceServicer_to_server(
                PredictorServicer(host, tasks, limits), server
            )
            evaluator_service_pb2_grpc.add_EvaluatorServiceServicer_to_server(
                EvaluatorServicer(evaluator, limits), server
            )
            open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
                OipServicer(store, host, limits), server
            )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*ours, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    def _set_answering(self, answering: bool) -> None:
        """Say whether there is a version that can answer; a learner does not answer."""
        for service in (PREDICTOR, EVALUATOR, OIP) if self._settings.role != "learner" else ():
            self._health.set(service, answering)


def _is_alive(loop: asyncio.AbstractEventLoop, query: Mapping[str, str]) -> tuple[HTTPStatus, str]:
    """Say whether the event loop gets round to what it is given. Blocks until it does."""
    turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)
    try:
        turn.result(ALIVE_SECONDS)
    except TimeoutError:
        turn.cancel()
        return HTTPStatus.SERVICE_UNAVAILABLE, "the event loop is stuck\n"
    return HTTPStatus.OK, "alive\n"


def _mark_again(store: Store, history: History) -> None:
    """Pin and retire versions whose marks are lost, and finish retirements."""
    known, (pinned, retired) = set(store.numbers()), store.marked()
    # One that is whole was restored from a backup, and stays.
    lost = {number for number in (history.retired - retired) & known if store.is_stripped(number)}
    unfinished = {*store.half_retired(), *lost}
    for mark, numbers in (
        (store.pin, history.pinned - history.retired - pinned),
        (store.retire, unfinished),
    ):
        for number in sorted(numbers & known):
            try:
                mark(number)
            except (InfloraError, OSError) as error:
                log.warning("version %d is not as the audit log says: %s", number, error)


def _refuse_remains(store: Store, history: History, records: TaskRecords) -> None:
    """Refuse to make a backbone for what is left of a store: its versions have another.

    Raises:
        DamagedError: something was learned in it before.
    """
    if store.numbers() or records.states() or history.accepted or history.parents:
        raise DamagedError(
            f"the store {store.root} has a past, but no backbone: it is damaged; see what "
            "inflora doctor says of it"
        )


def _listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    field: str,
    credentials: grpc.ServerCredentials | None = None,
) -> str:
    """Have a server listen, in the clear without credentials, and return where, ``host:port``.

    Raises:
        UnavailableError: it cannot.
    """
    host = f"[{host}]" if ":" in host else host
    try:
        if credentials is None:
            return f"{host}:{server.add_insecure_port(f'{host}:{port}')}"
        return f"{host}:{server.add_secure_port(f'{host}:{port}', credentials)}"
    except RuntimeError as error:
        raise UnavailableError(f"cannot listen on {host}:{port}: {error}", field=field) from error


def _check_address(host: str, port: int) -> None:
    """Bind to the address for a moment: grpc would not say why it cannot.

    Raises:
        UnavailableError: it cannot be listened on.
    """
    faults = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                except OSError as error:
                    faults.append(error)
                else:
                    return  # one is enough, for grpc as well
    except OSError as error:
        faults.append(error)
    raise UnavailableError(f"cannot listen on {host}:{port}: {faults[0].strerror}", field="port")


def _warn_of_bundled(store: Path) -> None:
    made_from = backbone_source.read(store)
    if made_from and made_from.source == backbone_source.DEFAULT:
        log.warning(
            "the backbone of this store is the bundled one, which sees 32 x 32 pixels and is for "
            "trying out; for real work make a store with another: inflora serve --store shop "
            "--backbone vit_base_patch16_224.augreg_in21k (timm's hub), or a weights file"
        )


async def serve(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; the same signal again ends it at once.

    Args:
        settings: What to serve.
        on_ready: Called with the address once the server listens.

    Raises:
        InfloraError: the server cannot start; see ``Server.start``.
    """
    main = asyncio.current_task()
    assert main is not None, "a coroutine runs in a task"
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    server = Server(settings)
    try:
        await server.start()
        on_ready(server.address)
        await server.wait_over()
    except asyncio.CancelledError:
        main.uncancel()
        log.info("stopping; running calls have %g seconds", settings.drain_seconds)
    finally:
        await server.stop()
    log.info("stopped")
