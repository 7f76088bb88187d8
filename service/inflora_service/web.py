"""HTTP beside gRPC: what operators, their tools and the console read. A table of routes.

The event loop accepts connections; a few threads do the rest, so that nothing that is asked here
holds up a call. Why it is not a web framework: docs/decisions/0009-http-beside-grpc.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from inflora_core.errors import UnavailableError

log = logging.getLogger(__name__)

THREADS = 12
"""Requests at a time; more wait. More than those that may take their time, together."""

REQUEST_SECONDS = 10.0
"""How long a client may take with its request, and with what it is answered."""

UPLOAD_SECONDS = 120.0
"""How much longer one may take that sends something; silence ends it after ``REQUEST_SECONDS``."""

DROP_SECONDS = 2.0
"""How long what was not wanted is still read, so that its sender reads why."""

DROP_BYTES = 32 * 2**20
"""How much of it."""

MOST_CONNECTIONS = 64
"""At a time; more are closed: each holds a descriptor, which calls need, too."""

SCRAPES = 2
"""Threads that metrics may take: what they look at may hang, and probes are answered then, too."""

Page = Callable[[Mapping[str, str]], tuple[HTTPStatus, str]]
"""Takes the query's parameters, the first of each name; returns status and text."""


def text(page: Page) -> WSGIApplication:
    """Return what answers with a page of plain text."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        status, content = page({name: values[0] for name, values in query.items()})
        return say(start_response, status, content)

    return answer


class WebServer:
    """Answers from its construction, in a running event loop, until it is closed there.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes any free one.
        routes: What answers GET, by path.
        posts: What answers POST, by path.

    Attributes:
        address: Where it listens, ``host:port``.

    Raises:
        UnavailableError: the address cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        routes: Mapping[str, WSGIApplication],
        posts: Mapping[str, WSGIApplication] | None = None,
    ) -> None:
        try:
            family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, where, _by_route({"GET": routes, "POST": posts or {}}))
        except OSError as error:
            raise UnavailableError(
                f"cannot listen on {host}:{port} for HTTP: {error.strerror}", field="http_port"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._server.fileno(), self._server.accept)

    def close(self) -> None:
        """Accept nothing more; what was begun with is answered."""
        self._loop.remove_reader(self._server.fileno())
        self._server.server_close()


class _Server(WSGIServer):
    """Gives connections to a few threads; Python's own starts one for each, however many come."""

    request_queue_size = 64

    def __init__(
        self, family: socket.AddressFamily, where: tuple[Any, ...], app: WSGIApplication
    ) -> None:
        self.address_family = family
        self._threads = ThreadPoolExecutor(THREADS, "http")
        self._loop = asyncio.get_running_loop()
        self._open: dict[socket.socket, asyncio.TimerHandle] = {}
        super().__init__(where, _Requests)
        self.set_app(app)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        # Not WSGIServer's: that asks a name server what this machine is called, perhaps for long.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def accept(self) -> None:
        """Take a connection that is there."""
        try:
            connection, address = self.get_request()
        except OSError as error:  # it is gone again, or there are too many open files
            log.debug("an HTTP connection cannot be accepted: %s", error)
            return
        if len(self._open) >= MOST_CONNECTIONS:
            connection.close()
            return
        self._open[connection] = self._loop.call_later(REQUEST_SECONDS, _hang_up, connection)
        serving = self._threads.submit(self._serve, connection, address)
        serving.add_done_callback(partial(_close_unserved, connection))

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            self.finish_request(connection, address)
        except OSError as error:
            log.debug("an HTTP client is gone: %s", error)
        except Exception:
            log.exception("an HTTP request failed")
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._forget, connection)
            self.shutdown_request(connection)

    def prolong(self, connection: socket.socket) -> None:
        """Give a client time to send something; for any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._prolong, connection)

    def _prolong(self, connection: socket.socket) -> None:
        if timer := self._open.get(connection):
            timer.cancel()
            seconds = UPLOAD_SECONDS + REQUEST_SECONDS
            self._open[connection] = self._loop.call_later(seconds, _hang_up, connection)

    def _forget(self, connection: socket.socket) -> None:
        if timer := self._open.pop(connection, None):
            timer.cancel()

    def server_close(self) -> None:
        super().server_close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        # Who says nothing would keep a thread, and with it the process.
        for connection, timer in self._open.items():
            timer.cancel()
            _hang_up(connection, socket.SHUT_RD)
        self._open.clear()


class _Requests(WSGIRequestHandler):
    """Reads requests, and does not log them."""

    timeout = REQUEST_SECONDS
    server: _Server
    _sends = False

    def parse_request(self) -> bool:
        understood = super().parse_request()
        self._sends = understood and self.command == "POST"
        if self._sends:
            self.server.prolong(self.connection)
        return understood

    def finish(self) -> None:
        super().finish()
        if self._sends:
            _drop_rest(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        pass  # probes and scrapes come every few seconds


def _drop_rest(connection: socket.socket) -> None:
    """Read what still comes: to close before that would take the answer away from its reader."""
    left, end = DROP_BYTES, time.monotonic() + DROP_SECONDS
    with contextlib.suppress(OSError):  # it is gone, or slow
        connection.shutdown(socket.SHUT_WR)
        while left > 0 and (seconds := end - time.monotonic()) > 0:
            connection.settimeout(seconds)
            dropped = len(connection.recv(2**16))
            if not dropped:
                return
            left -= dropped


def _close_unserved(connection: socket.socket, serving: Future[None]) -> None:
    """Close a connection that no thread has got round to when the server ends."""
    if serving.cancelled():
        connection.close()


def _hang_up(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):  # it is closed
        connection.shutdown(how)


def few(app: WSGIApplication, most: int = SCRAPES) -> WSGIApplication:
    """Return what answers as ``app`` does, so many at a time, and others that they are too many."""
    room = threading.BoundedSemaphore(most)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not room.acquire(blocking=False):
            return say(start_response, HTTPStatus.SERVICE_UNAVAILABLE, "too many at a time\n")
        try:
            return list(app(environ, start_response))
        finally:
            room.release()

    return answer


def _by_route(routes: Mapping[str, Mapping[str, WSGIApplication]]) -> WSGIApplication:
    """Return what answers by method and path."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            # Else the server's header is of Python, with its version.
            return start_response(status, [*headers, ("Server", "inflora")], *error)

        path = environ["PATH_INFO"]
        answers = {method: paths[path] for method, paths in routes.items() if path in paths}
        method = environ["REQUEST_METHOD"]
        if not answers and method == "GET":
            there = "".join(f"{path}\n" for path in sorted(routes["GET"]))
            return say(start, HTTPStatus.NOT_FOUND, f"there are:\n{there}")
        if method not in answers:
            allowed = ", ".join(answers) or "GET"
            wrong = f"only {allowed}\n"
            return say(start, HTTPStatus.METHOD_NOT_ALLOWED, wrong, ("Allow", allowed))
        try:
            return answers[method](environ, start)
        except Exception:
            log.exception("%s cannot be answered", path)
            return say(start, HTTPStatus.INTERNAL_SERVER_ERROR, "see the server's log\n")

    return answer


def say(
    start_response: StartResponse, status: HTTPStatus, content: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    """Answer with plain text."""
    return respond(start_response, status, content.encode(), "text/plain; charset=utf-8", *headers)


def respond(
    start_response: StartResponse,
    status: HTTPStatus,
    content: bytes,
    kind: str,
    *headers: tuple[str, str],
) -> Iterable[bytes]:
    """Answer with anything.

    Args:
        start_response: Takes status and headers.
        status: What became of the request.
        content: What it is answered with.
        kind: Its media type.
        headers: More of them.
    """
    start_response(
        f"{status.value} {status.phrase}",
        [("Content-Type", kind), ("X-Content-Type-Options", "nosniff"), *headers],
    )
    return [content]


def is_taken(error: UnavailableError) -> bool:
    """Whether somebody else listens there already."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
