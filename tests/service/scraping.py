"""What a server answers by HTTP, and what its metrics say by a parser's account."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def get(address: str, path: str, accept: str = "*/*", method: str = "GET") -> tuple[int, str]:
    """Return status and content of a page. Blocks."""
    request = urllib.request.Request(
        f"http://{address}{path}", headers={"Accept": accept}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@dataclass(frozen=True)
class Scrape:
    """What a server exports at one moment.

    Attributes:
        text: As it came, in the older format.
        families: By name; that of a counter is without ``_total``.
    """

    text: str
    families: dict[str, Metric]

    @classmethod
    def of(cls, address: str) -> Scrape:
        """Scrape a server in both formats. Blocks."""
        status, text = get(address, "/metrics")
        assert status == 200, text
        families = {family.name: family for family in plain_text(text)}
        other = {family.name for family in open_metrics(get(address, "/metrics", OPEN_METRICS)[1])}
        # The worker may have come, or gone, in between.
        assert not [n for n in other ^ families.keys() if not n.startswith("inflora_worker_proc")]
        return cls(text, families)

    @property
    def labels(self) -> dict[str, set[str]]:
        """The labels of every series, by its name; of families without any, by the family's."""
        found: dict[str, set[str]] = {name: set() for name in self.families}
        for family in self.families.values():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of the one series of that name whose labels are these, None without."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, (name, labels, found)
        return found[0] if found else None


async def scrape(running: Any) -> Scrape:
    """Scrape a server of this process."""
    return await asyncio.to_thread(Scrape.of, running.server.http_address)
