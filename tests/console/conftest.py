"""A server that has learned most of the digits of `make demo`, and a browser for its console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from inflora_client import Client
from tests.benchmarks import data
from tests.chromium import PROGRAM, Page, chromium
from tests.console import figures
from tests.lacking import skip_or_fail
from tests.running_server import RunningServer, running_server

TASKS = data.load("digits", 5, 30, 0)
"""Two classes each."""

LEARNED = 4
"""Of them before any test begins; then a class is renamed, and named again as it was."""

QUICK = ("--epochs", "3", "--learn-threads", "1", "--predict-threads", "1")
CANARIES = ("--canary-images", "12")

AXE = Path(__file__).parents[2] / "clients" / "web" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    missing = None
    if PROGRAM is None:
        missing = "there is no chromium here: install Debian's"
    elif not AXE.is_file():
        missing = "axe-core is not here: make web" + (
            "" if shutil.which("npm") else " (which needs node and npm)"
        )
    skip_or_fail(missing, "CONSOLE_REQUIRED")


@pytest.fixture(scope="session")
def server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server"), (*QUICK, *CANARIES)) as running:
        with Client(running.address) as client:
            for number in range(LEARNED):
                task = TASKS[number]
                client.wait(client.learn(task.train, display_name=" and ".join(task.labels)))
                measure(client, number + 1)
            client.wait(client.update_class("digit 7", new_label="seven"))
            client.wait(client.update_class("seven", new_label="digit 7"))
        yield running


def measure(client: Client, tasks: int) -> None:
    """Evaluate the current version on images of the first tasks that nobody taught."""
    client.evaluate([example for task in TASKS[:tasks] for example in task.test[::4]])


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@dataclass(frozen=True)
class Browser:
    """A page, and what it is for.

    Attributes:
        page: The page.
        folder: For files of the test.
    """

    page: Page
    folder: Path

    def open(self, http: str) -> None:
        """Open a console, and wait until it shows a server."""
        self.page.open(f"http://{http}/")
        self.page.wait("document.querySelector('#latency svg') !== null")

    def errors(self) -> list[str]:
        """Return what the console of the browser says, but for refusals that are part of a test."""
        return [each for each in self.page.complaints if '"source": "network"' not in each]

    def findings(self, what: str) -> list[str]:
        """Return what axe has against the page as it is, if it is serious, and count it."""
        self.page.evaluate(AXE.read_text() + ";true")
        found: list[str] = self.page.evaluate(
            """axe.run(document, {resultTypes: ["violations"]}).then((found) => found.violations
                .filter((one) => ["serious", "critical"].includes(one.impact))
                .map((one) => `${one.id}: ${one.nodes.map((node) => node.html).join(" ")}`))"""
        )
        figures.count("axe_runs", 1)
        figures.count("axe_serious", len(found))
        return [f"{what}: {one}" for one in found]


@pytest.fixture
def browser(tools: None, tmp_path: Path) -> Iterator[Browser]:
    with chromium(tmp_path / "browser") as page:
        made = Browser(page, tmp_path)
        yield made
        figures.count("console_errors", len(made.errors()))
