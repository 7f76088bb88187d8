"""A server that learns the digits of `make demo`, and the page beside a device's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflora_client import Client
from inflora_edge import Device, Server
from tests.benchmarks import data
from tests.chromium import PROGRAM, Page, chromium
from tests.lacking import skip_or_fail
from tests.running_server import RunningServer, running_server
from tests.web.site import DIST, Site, served

TASKS = data.load("digits", 5, 30, 0)
"""Two classes each."""

LEARNED = 2
"""Of them before any test begins, one version for each."""

QUICK = ("--epochs", "3", "--learn-threads", "1", "--predict-threads", "1")


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    missing = None
    if PROGRAM is None:
        missing = "there is no chromium here: install Debian's"
    elif not (DIST / "index.html").is_file():
        missing = "the page is not built: make web" + (
            "" if shutil.which("npm") else " (which needs node and npm)"
        )
    skip_or_fail(missing, "WEB_REQUIRED")


@pytest.fixture(scope="session")
def server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server"), QUICK) as running:
        with Client(running.address) as client:
            for task in TASKS[:LEARNED]:
                client.wait(client.learn(task.train))
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def site(tools: None, tmp_path: Path) -> Iterator[Site]:
    with served(tmp_path / "site") as site:
        yield site


@pytest.fixture
def device(server: RunningServer, site: Site) -> Iterator[Device]:
    """What `inflora-edge follow` runs, in the folder that the page reads."""
    with Device(Server(server.address), site.models, threads=1) as device:
        yield device


@pytest.fixture
def page(site: Site, tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "browser") as page:
        yield page
