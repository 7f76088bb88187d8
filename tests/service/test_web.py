"""HTTP beside gRPC: metrics and probes, a port that is taken, and clients that take their time."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import pytest

from inflora.v1 import predictor_service_pb2 as pb
from inflora_core.errors import UnavailableError
from inflora_service import server, web
from inflora_service.server import Settings
from tests.service.conftest import RED, Running, png
from tests.service.scraping import Scrape, get
from tests.service.test_bad_input import publish


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


async def page(running: Running, path: str, **more: Any) -> tuple[int, str]:
    return await asyncio.to_thread(get, running.server.http_address, path, **more)


async def test_probes_say_what_grpc_health_says(
    start: Callable[..., Any], settings: Settings
) -> None:
    running = await start()
    predictor = "/readyz?service=inflora.v1.PredictorService"
    assert await page(running, "/healthz") == (200, "alive\n")
    assert await page(running, "/readyz") == (200, "SERVING\n")
    assert await page(running, predictor) == (503, "NOT_SERVING\n")
    assert await page(running, "/readyz?service=nobody") == (404, "SERVICE_UNKNOWN\n")
    publish(settings.store, red=RED)
    await running.server.host.promote(1, "a test")
    assert await page(running, predictor) == (200, "SERVING\n")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nothing", "GET", 404),
        ("/metrics/", "GET", 404),
        ("/../../etc/passwd", "GET", 404),
        ("/metrics", "POST", 405),
        ("/metrics", "DELETE", 405),
    ],
)
async def test_what_there_is_not(running: Running, path: str, method: str, status: int) -> None:
    found, content = await page(running, path, method=method)
    assert (found, "inflora_" in content) == (status, False)


async def test_a_page_that_fails_is_one_error(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(query: object) -> Any:
        raise RuntimeError("the page is out of sorts")

    other = web.WebServer("127.0.0.1", 0, {"/broken": web.text(broken)})
    try:
        found = await asyncio.to_thread(get, other.address, "/broken")
    finally:
        other.close()
    assert found == (500, "see the server's log\n")
    assert "out of sorts" in caplog.text


async def test_a_port_that_is_asked_for_and_taken(start: Callable[..., Any], taken: int) -> None:
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{taken} for HTTP") as caught:
        await start(http_port=taken)
    assert caught.value.field == "http_port"


async def test_a_usual_port_that_is_taken(
    start: Callable[..., Any],
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(server, "HTTP_PORT", taken)
    running = await start(http_port="auto")
    assert running.server.http_address == ""
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "--http-port" in warning
    assert (await running.serving()) == "SERVING"


async def test_an_address_that_is_not_of_this_machine(start: Callable[..., Any]) -> None:
    with pytest.raises(UnavailableError, match=r"192\.0\.2\.1:"):
        await start(http_host="192.0.2.1", http_port="auto")


async def test_without_http(start: Callable[..., Any]) -> None:
    assert (await start(http_port="off")).server.http_address == ""


async def test_on_ipv6(start: Callable[..., Any]) -> None:
    running = await start(http_host="::1")
    assert running.server.http_address.startswith("[::1]:")
    assert await page(running, "/healthz") == (200, "alive\n")


async def test_clients_that_say_nothing_hold_up_neither_calls_nor_scrapes(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running = await start()
    host, _, port = running.server.http_address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(web.THREADS - 1)]
    try:
        for each in silent:
            each.sendall(b"GET /met")
        await running.predictor.Predict(pb.PredictRequest(images=[png()]))
        seen = await asyncio.to_thread(Scrape.of, running.server.http_address)
        assert seen.value("inflora_images_total", purpose="predict") == 1
    finally:
        for each in silent:
            each.close()


async def test_clients_that_dawdle_are_hung_up_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their bytes comes in time, and their requests never do."""
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.2)
    host, _, port = running.server.http_address.rpartition(":")
    slow = [await asyncio.open_connection(host, int(port)) for _ in range(web.THREADS)]
    for _, writer in slow:
        writer.write(b"GET /hea")
    assert await page(running, "/healthz") == (200, "alive\n")
    for reader, writer in slow:
        await asyncio.wait_for(reader.read(), 30)
        writer.close()


async def test_connections_are_not_taken_without_end(running: Running) -> None:
    host, _, port = running.server.http_address.rpartition(":")
    there = [await asyncio.open_connection(host, int(port)) for _ in range(web.MOST_CONNECTIONS)]
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await asyncio.wait_for(reader.read(), 30) == b""
    for _, each in [*there, (reader, writer)]:
        each.close()


async def test_who_waits_as_the_server_ends_is_hung_up_on() -> None:
    """No thread has begun with most of them."""
    server = web.WebServer("127.0.0.1", 0, {})
    host, _, port = server.address.rpartition(":")
    there = [await asyncio.open_connection(host, int(port)) for _ in range(web.MOST_CONNECTIONS)]
    one_too_many, writer = await asyncio.open_connection(host, int(port))
    assert await asyncio.wait_for(one_too_many.read(), 30) == b""  # so the others are accepted
    waiting = list(server._server._open)[web.THREADS :]
    server.close()
    assert {each.fileno() for each in waiting} == {-1}
    for _, each in [*there, (one_too_many, writer)]:
        each.close()


async def test_scrapes_that_hang_leave_threads_to_probes(running: Running) -> None:
    hang = threading.Event()

    def hanging(query: object) -> Any:
        hang.wait(60)
        return HTTPStatus.OK, "at last\n"

    other = web.WebServer("127.0.0.1", 0, {"/hanging": web.few(web.text(hanging))})
    try:
        hung = [
            asyncio.create_task(asyncio.to_thread(get, other.address, "/hanging"))
            for _ in range(web.THREADS + 1)
        ]
        answers = asyncio.as_completed(hung)
        # All of these, before anything is let go: else the last would find room.
        turned_away = [(await next(answers))[0] for _ in range(len(hung) - web.SCRAPES)]
        assert set(turned_away) == {503}
        hang.set()
        assert {(await answer)[0] for answer in answers} == {200}
    finally:
        hang.set()
        other.close()


async def test_it_says_nothing_of_what_it_is_made_of(running: Running) -> None:
    host, _, port = running.server.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = (await reader.read()).decode().lower()
    writer.close()
    assert "200 ok" in answer
    assert not [word for word in ("python", "wsgi") if word in answer]
