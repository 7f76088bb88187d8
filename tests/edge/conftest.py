"""A store with four versions that were really learned, and a server of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from inflora_client import Client
from inflora_core.store import Store
from tests.edge.lineage import learned
from tests.running_server import RunningServer, running_server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return learned(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def server(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(store.root, folder / "store")
    Store.existing(folder / "store").set_current(4)
    with running_server(folder) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
