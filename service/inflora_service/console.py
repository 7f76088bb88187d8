"""The console: a page for people, what it asks for, and who is answered.

It may be read by whoever may call, on this machine only: the port has no TLS. Decided in
docs/decisions/0012-console.md, described in docs/console.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import grpc

from inflora_core.errors import (
    DeadlineError,
    InfloraError,
    InvalidInputError,
    LimitExceededError,
    StateError,
    UnauthenticatedError,
    UnavailableError,
)
from inflora_core.model import Stage, TaskState, now
from inflora_service import pictures, views, web
from inflora_service.access import CONSOLE, RULES, Access, Call
from inflora_service.errors import CODES, from_exception
from inflora_service.metrics import Fresh, Meter, Recorder, Sources
from inflora_service.overview import finite, overview, titled
from inflora_service.pulse import KEPT, Pulse
from inflora_service.records import Snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

PREDICT_SECONDS = 8.0
"""How long an image may wait for its answer once it is there: less than ``web.REQUEST_SECONDS``,
which are left then, however much of ``web.UPLOAD_SECONDS`` it took to come."""

LOOP_SECONDS = 5.0
"""How long the event loop may take to get round to a question."""

FRESH_SECONDS = 1.0
"""How old an answer may be: however many consoles are open, it is made once in that time."""

TOP_K = 3

MOST_TASKS = 40
"""Newest tasks in the table of accuracies, which grows with their square; a report has all."""

NEWEST_TASKS = 12
"""In the table of tasks."""

STATES = 6
"""Questions of how it is that are answered at a time; most find their answer made already."""

IMAGES = 2
"""Images that are in work at a time. Who finds no room, for either, asks again."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/console/console.css": ("console.css", "text/css; charset=utf-8"),
    "/console/console.js": ("console.js", "text/javascript; charset=utf-8"),
    "/console/icon.svg": ("icon.svg", "image/svg+xml"),
}

_LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
"""No other address of 127/8: what a mesh's proxy lets in comes from one of those."""

_IMAGE = "application/octet-stream"
"""What an image is sent as: no other page can send that without having asked."""

_STATUS = {
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}
"""Of others it is the server's fault."""

_MAY_SEE_TASKS = "/inflora.v1.LearnerService/ListTasks"

_FAR = """The console has no TLS, so it is for the server's own machine alone.
From another, have a tunnel end there:

    ssh -L 9464:localhost:9464 SERVER
    kubectl port-forward POD 9464

and open http://localhost:9464/. With the server's option --insecure, whoever reaches the port
is let in, as by the API.
"""
_NAME = """The console answers to localhost and to addresses, not to another name: a page
elsewhere could have its own name lead here. Open http://localhost:PORT/.
"""
_FOREIGN = "Another page asked for this. Open the console itself.\n"
_CERTIFICATES = (
    "this server wants a client's certificate (--tls-client-ca), which the console has no way to "
    "show: use the command line"
)


@dataclass(frozen=True)
class Rules:
    """Who is let in before anybody is asked who they are.

    Attributes:
        host: Where the port listens.
        insecure: Whether others than this machine may ask, too.
    """

    host: str
    insecure: bool

    def objection(self, environ: WSGIEnvironment) -> str:
        """Return what there is to say against a request, "" for nothing."""
        if not self.insecure:
            forwarded = "HTTP_FORWARDED" in environ or "HTTP_X_FORWARDED_FOR" in environ
            if environ["REMOTE_ADDR"] not in _LOOPBACK or forwarded:
                return _FAR
        if not self._is_ours(environ.get("HTTP_HOST", "")):
            return _NAME
        return ""

    def is_foreign(self, environ: WSGIEnvironment) -> bool:
        """Whether a question comes from a page that is not the console."""
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            return True
        origin = environ.get("HTTP_ORIGIN")
        return origin is not None and origin != f"http://{environ.get('HTTP_HOST', '')}"

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.host):
            return True
        try:
            # No name of others leads to what was asked for by its address.
            return ipaddress.ip_address(name).is_loopback or self.insecure
        except ValueError:
            return False


class Console:
    """Answers the console's questions, in the threads of ``web``.

    Args:
        access: Decides who may ask.
        recorder: Counts questions as calls.
        pulse: Says what the server is asked.
        rules: Who is let in at all.
        release: Of this software.
    """

    def __init__(
        self, access: Access, recorder: Recorder, pulse: Pulse, rules: Rules, release: str
    ) -> None:
        self._access = access
        self._recorder = recorder
        self._rules = rules
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._pulse = pulse
        self._shown: _Shown | None = None

    def routes(self) -> dict[str, WSGIApplication]:
        """Return what answers GET."""
        folder = resources.files("inflora_service") / "page"
        files = {
            path: (folder.joinpath(name).read_bytes(), kind)
            for path, (name, kind) in _FILES.items()
        }
        files["/console/pictures.css"] = pictures.stylesheet().encode(), "text/css; charset=utf-8"
        return {
            **{path: partial(self._file, *file) for path, file in files.items()},
            "/console/state": web.few(self._asked(self._state), STATES),
        }

    def posts(self) -> dict[str, WSGIApplication]:
        """Return what answers POST."""
        return {"/console/predict": web.few(self._asked(self._predict), IMAGES)}

    def watch(self, sources: Sources, *, predicts: bool) -> None:
        """Show a server that can be looked at from now on.

        Args:
            sources: Where its state is.
            predicts: Whether it answers predictions.
        """
        self._shown = _Shown(sources, self._pulse, self._release, predicts)
        self._pulse.start()

    def stop(self) -> None:
        """Look no more; to be called in the event loop."""
        self._pulse.stop()

    def _file(
        self, content: bytes, kind: str, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        if objection := self._rules.objection(environ):
            return _refuse(start_response, objection)
        return web.respond(start_response, HTTPStatus.OK, content, kind, *_HEADERS)

    def _asked(self, answer: Callable[[WSGIEnvironment, Call], bytes]) -> WSGIApplication:
        """Return what lets a question in, answers it, and counts it as a call."""

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if objection := self._rules.objection(environ):
                return _refuse(start_response, objection)
            if self._rules.is_foreign(environ):
                return _refuse(start_response, _FOREIGN)
            try:
                return _json(start_response, HTTPStatus.OK, self._counted(answer, environ))
            except InfloraError as error:
                return _fail(start_response, error)

        return app

    def _counted(
        self, answer: Callable[[WSGIEnvironment, Call], bytes], environ: WSGIEnvironment
    ) -> bytes:
        path = environ["PATH_INFO"]
        admitted = self._on_loop(lambda: self._admit(path, environ))
        code, content = "OK", b""
        try:
            content = answer(environ, admitted.call)
            return content
        except Exception as error:
            known = from_exception(error)
            code = CODES[type(known)].name
            raise known from error
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(admitted.end, self._access, code, len(content))

    def _admit(self, path: str, environ: WSGIEnvironment) -> _Admitted:
        meter = self._recorder.meter("console", path.rpartition("/")[2])
        began = meter.begin()
        try:
            if self._access.asks_certificates:
                raise UnauthenticatedError(_CERTIFICATES)
            token = environ.get("HTTP_AUTHORIZATION")
            metadata = (("authorization", token),) if token is not None else ()
            call = self._access.admit(path, CONSOLE[path], metadata)
        except InfloraError as error:
            self._access.refused(path, error)
            meter.end(began, CODES[type(error)].name)
            raise
        return _Admitted(call, meter, began)

    def _on_loop(self, do: Callable[[], T]) -> T:
        """Return what something returns that is only for the event loop's thread.

        Raises:
            UnavailableError: the loop does not get round to it; it is not done then.
        """
        done: Future[T] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(do())
                except Exception as error:
                    done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError as error:
            raise UnavailableError("the server has stopped") from error
        try:
            return done.result(LOOP_SECONDS)
        except TimeoutError as error:
            if done.cancel():
                raise UnavailableError("the server is stopping, or stuck: retry later") from error
            return done.result()  # it began at the last moment, and takes none

    def _state(self, environ: WSGIEnvironment, call: Call) -> bytes:
        seen = parse_qs(environ.get("QUERY_STRING", "")).get("seen", [""])[0]
        return self._ready().state(seen, may_see_tasks=_may_see_tasks(call))

    def _predict(self, environ: WSGIEnvironment, call: Call) -> bytes:
        shown = self._ready()
        if not shown.predicts:
            raise StateError("this server learns only: ask one that predicts")
        image = _image(environ, shown.sources.limits.image_bytes)
        if call.account is not None:
            self._on_loop(partial(call.account.take, len(image)))
        turn = asyncio.run_coroutine_threadsafe(
            shown.sources.host.predict(
                [image], top_k=TOP_K, deadline=time.monotonic() + PREDICT_SECONDS
            ),
            self._loop,
        )
        try:
            answer = turn.result(PREDICT_SECONDS)
        except TimeoutError as error:
            turn.cancel()
            raise DeadlineError(f"there was no answer within {PREDICT_SECONDS:g} s") from error
        return _dumped(
            {
                "version": answer.version,
                "scores": [
                    {"label": label, "probability": share} for label, share in answer.scores[0]
                ],
                "novelty": answer.novelty[0],
            }
        )

    def _ready(self) -> _Shown:
        if self._shown is None:
            raise UnavailableError("the server is starting: retry soon")
        return self._shown


@dataclass(frozen=True)
class _Admitted:
    """A question that was let in, and counts as a call until ``end``."""

    call: Call
    meter: Meter
    began: float

    def end(self, access: Access, code: str, size: int) -> None:
        if self.call.account is not None:
            self.call.account.charge(size)
        access.end(self.call)
        self.meter.end(self.began, code)


@dataclass(frozen=True)
class _Story:
    """What the server has learned, as parts of the page, and its name; or why it is unknown."""

    digest: str
    parts: Mapping[str, Any]
    trouble: str = ""


class _Shown:
    """What there is to see of a server. For any thread.

    Args:
        sources: Where its state is.
        pulse: Says what it is asked.
        release: Of this software.
        predicts: Whether it answers predictions.
    """

    def __init__(self, sources: Sources, pulse: Pulse, release: str, predicts: bool) -> None:
        self.sources = sources
        self.predicts = predicts
        self._pulse = pulse
        self._release = release
        self._told: tuple[object, _Story] | None = None
        self._story = Fresh(self._tell, FRESH_SECONDS)
        self._load = Fresh(self._look, FRESH_SECONDS)
        self._tasks = Fresh(self._list, FRESH_SECONDS)

    def state(self, seen: str, *, may_see_tasks: bool) -> bytes:
        """Return what the page is to show.

        Args:
            seen: Digest of what it shows of the past already.
            may_see_tasks: Whether who asks may be told what tasks are called.
        """
        story = self._story.value()
        tasks = self._tasks.value() if may_see_tasks else self._progress()
        return _dumped(
            {
                "server": self._server(),
                "story": None if story.trouble or story.digest == seen else story.parts,
                "digest": story.digest,
                "trouble": story.trouble or tasks["trouble"],
                "load": self._load.value(),
                "tasks": tasks,
            }
        )

    def _server(self) -> dict[str, Any]:
        host, following = self.sources.host, self.sources.following()
        answering = host.answering_now
        return {
            "release": self._release,
            "predicts": self.predicts,
            "learns": self.sources.tasks is not None,
            "version": answering.version.number if answering else None,
            "classes": len(answering.version.classes) if answering else 0,
            "provider": answering.predictor.provider if answering else "",
            "stands_in": host.stand_in is not None,
            "following": None
            if following is None
            else {"version": following.version, "lag": round(following.lag_seconds, 1)},
            "image_bytes": self.sources.limits.image_bytes,
        }

    def _tell(self) -> _Story:
        """Return the story, told again only where it has gone on."""
        try:
            return self._newest()
        except (InfloraError, OSError) as error:
            # The rest is wanted all the more.
            return _Story("", {}, from_exception(error).message)

    def _newest(self) -> _Story:
        store, host = self.sources.store, self.sources.host
        answering, stands_in = host.answering_now, host.stand_in is not None
        number = answering.version.number if answering else None
        state = (
            *(number, stands_in, self.sources.evaluations.revision),
            *(tuple(store.numbers()), store.marked(), store.forgotten_list()),
        )
        if self._told is None or self._told[0] != state:
            found = overview(
                store, self.sources.lineage, self.sources.evaluations, number, stands_in=stands_in
            )
            parts = {
                "tiles": views.tiles_html(views.tiles(found)),
                "views": {each.name: each.content for each in views.views(found, MOST_TASKS)},
            }
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            self._told = state, _Story(digest, parts)
        return self._told[1]

    def _look(self) -> dict[str, Any]:
        moments, host = self._pulse.moments(), self.sources.host
        last = moments[-1]
        return {
            "calls": last.calls,
            "images": last.images,
            "failed": last.failed,
            "p50": last.p50,
            "p99": last.p99,
            "waiting": host.waiting_images,
            "waiting_limit": self.sources.limits.predict_waiting_images,
            "picture": pictures.latency(moments, KEPT).inline(),
        }

    def _list(self) -> dict[str, Any]:
        """Return what there is to know of tasks."""
        tasks, records = self.sources.tasks, self.sources.records
        told: dict[str, Any] = {
            "told": True,
            "running": None,
            "queued": 0,
            "table": "",
            "trouble": "",
        }
        if tasks is None or records is None:
            return told
        running = tasks.running
        told["running"] = _running(running) if running else None
        try:
            newest = [snapshot.task for _, snapshot in records.page(None, NEWEST_TASKS)]
            told["queued"] = records.counts().get(TaskState.QUEUED, 0)
            told["table"] = views.tasks_table(newest) if newest else ""
        except (InfloraError, OSError) as error:
            # As above.
            told["trouble"] = from_exception(error).message
        return told

    def _progress(self) -> dict[str, Any]:
        """Return what metrics tell anybody."""
        tasks = self.sources.tasks
        progress = tasks.progress if tasks is not None else None
        fraction = progress.fraction if progress else None
        running = None if fraction is None else {"fraction": fraction}
        return {"told": False, "running": running, "trouble": ""}


def _running(snapshot: Snapshot) -> dict[str, Any]:
    task, progress = snapshot.task, snapshot.progress
    shown: dict[str, Any] = {
        "name": task.display_name or task.id,
        "what": titled(task.labels),
        "images": sum(task.example_counts),
        "stages": [stage.value.lower() for stage in Stage],
        "stage": progress.stage.value.lower() if progress else "",
        "epoch": progress.epoch if progress else 0,
        "epochs": progress.epochs if progress else 0,
        "loss": progress.loss if progress else None,
        "fraction": progress.fraction if progress else 0.0,
        "left": None,
    }
    if task.start_time is not None and progress is not None and progress.fraction > 0:
        gone = (now() - task.start_time).total_seconds()
        shown["left"] = views.duration(gone * (1 - progress.fraction) / progress.fraction)
    return shown


def _may_see_tasks(call: Call) -> bool:
    role = RULES[_MAY_SEE_TASKS]
    return call.principal is not None and (role is None or call.principal.may(role))


def _image(environ: WSGIEnvironment, most: int) -> bytes:
    """Return what was sent, once it is known to be no more than one image.

    Raises:
        InvalidInputError: it does not say how long it is, or is of another type.
        LimitExceededError: it is too large.
    """
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != _IMAGE:
        raise InvalidInputError(f"send the image's bytes as {_IMAGE}", field="Content-Type")
    try:
        size = int(environ.get("CONTENT_LENGTH") or "")
    except ValueError as error:
        raise InvalidInputError("say how many bytes it has", field="Content-Length") from error
    if size < 0 or size > most:
        raise LimitExceededError(f"an image has at most {most} bytes", field="image")
    image: bytes = environ["wsgi.input"].read(size)
    if len(image) < size:
        raise InvalidInputError("it ended before all of it had come", field="image")
    return image


def _dumped(content: object) -> bytes:
    plain = finite(content)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _json(
    start_response: StartResponse, status: HTTPStatus, content: bytes, *headers: tuple[str, str]
) -> Iterable[bytes]:
    return web.respond(start_response, status, content, "application/json", *_HEADERS, *headers)


def _fail(start_response: StartResponse, error: InfloraError) -> Iterable[bytes]:
    status = _STATUS.get(CODES[type(error)], HTTPStatus.INTERNAL_SERVER_ERROR)
    if isinstance(error, LimitExceededError) and error.field:
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE  # it would be the next time, too
    headers: list[tuple[str, str]] = []
    if status is HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", "Bearer"))
    if error.retry_seconds is not None:
        headers.append(("Retry-After", str(max(1, round(error.retry_seconds)))))
    content = {
        "reason": error.reason,
        "message": error.message,
        "field": error.field,
        "retry_seconds": error.retry_seconds,
    }
    return _json(start_response, status, _dumped(content), *headers)


def _refuse(start_response: StartResponse, why: str) -> Iterable[bytes]:
    return web.say(start_response, HTTPStatus.FORBIDDEN, why, *_HEADERS)
