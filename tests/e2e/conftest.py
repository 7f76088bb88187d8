"""Real server processes with a backbone that learns in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from inflora_client import Client, RetryPolicy
from tests.core import tiny
from tests.running_server import RunningServer, running_server

QUICK = ("--epochs", "3", "--batch-size", "8", "--learn-threads", "1", "--predict-threads", "1")
"""A few seconds for a task, on two processors that others use, too."""

SIDE = 24
"""Images are larger than the model's, so that preprocessing has something to do."""

Example = tuple[bytes, str]
Start = Callable[..., RunningServer]


def examples(*labels: str, each: int = 10, first: int = 0) -> list[Example]:
    """Return ``each`` encoded images of every class."""
    return [(tiny.png(label, first + i, SIDE), label) for label in labels for i in range(each)]


def images(*labels: str, each: int = 3) -> list[bytes]:
    """Return images of every class that no task has seen."""
    return [image for image, _ in examples(*labels, each=each, first=1000)]


def connect(server: RunningServer) -> Client:
    """Return a client that takes no failure for granted: it never asks twice."""
    return Client(server.address, retry=RetryPolicy(max_attempts=1))


@contextmanager
def serving(folder: Path, *options: str, stop: bool = True) -> Iterator[RunningServer]:
    """Run a server in ``folder``, where another one may have run before."""
    (folder / "ready").unlink(missing_ok=True)  # it holds the address of that one
    with running_server(folder, (*QUICK, *options), stop=stop) as server:
        yield server


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with random weights, as a file."""
    return tiny.write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, backbone_file: Path) -> Path:
    """A store with a backbone and no version, as a server's first start leaves it."""
    folder = tmp_path_factory.mktemp("prepared")
    with running_server(folder, ["--backbone", str(backbone_file)]) as server:
        pass
    return server.store


@pytest.fixture(scope="module")
def start(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers on stores of their own, which end with the module."""
    with ExitStack() as stack:

        def begin(*options: str) -> RunningServer:
            folder = tmp_path_factory.mktemp("server")
            shutil.copytree(prepared, folder / "store")
            return stack.enter_context(running_server(folder, [*QUICK, *options]))

        yield begin
