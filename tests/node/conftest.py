"""The client for Node as it is built, and a server that learns the digits of `make demo`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflora_client import Client
from tests.benchmarks import data
from tests.lacking import skip_or_fail
from tests.running_server import RunningServer, running_server

PROGRAM = Path(__file__).parents[2] / "clients" / "node" / "dist" / "main.js"

TASKS = data.load("digits", 5, 12, 0)
"""Two classes each."""

QUICK = ("--epochs", "2", "--learn-threads", "1", "--predict-threads", "1")


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    missing = None
    if shutil.which("node") is None:
        missing = "there is no node here"
    elif not PROGRAM.is_file():
        missing = "the client for Node is not built: make node"
    skip_or_fail(missing, "NODE_REQUIRED")


@pytest.fixture(scope="session")
def server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server"), QUICK) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
