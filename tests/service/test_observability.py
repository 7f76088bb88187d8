"""The dashboard and the alert rules ask for nothing but what a running server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from inflora_service.server import Settings
from tests.deploy import expressions
from tests.service.conftest import BLUE, RED, Script, png
from tests.service.scraping import scrape
from tests.service.test_bad_input import publish
from tests.service.test_evaluating import evaluate
from tests.service.test_metrics import DOCS


async def test_every_expression_finds_what_it_asks_for(
    start: Callable[..., Any], settings: Settings, script: Script
) -> None:
    publish(settings.store, red=RED)
    running = await start()
    await evaluate(running, [(png(), "red")])
    script.hold("TRAINING")
    task = await running.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    exported = (await scrape(running)).labels
    script.release("TRAINING")
    await running.ended(task.name)
    assert len([*expressions.expressions()]) > 50
    faults = {
        f"{where}: {fault}"
        for where, expression in expressions.expressions()
        for fault in expressions.faults(expression, exported)
    }
    assert not faults
    shown = {name for _, text in expressions.expressions() for name in re.findall(r"\w+", text)}
    series = {name for name in exported if name.startswith("inflora_")}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in series}
    unseen = {name for name in families if not any(each.startswith(name) for each in shown)}
    assert unseen <= {
        "inflora_rpc_calls",
        "inflora_images",
        "inflora_tasks_ended",
        "inflora_worker_restarts",
        "inflora_scrape_faults",
        "inflora_worker_process_virtual_memory_bytes",
        "inflora_worker_process_start_time_seconds",
        "inflora_worker_process_open_fds",
        "inflora_worker_process_max_fds",
        "inflora_worker_process_cpu_seconds",
    }, "a metric that nobody looks at is not worth its place"


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("inflora_versions", "there is no inflora_versions"),
        ('sum(rate(inflora_version{task="x"}[5m]))', "inflora_version has no task"),
        ("sum by (code) (inflora_tasks) > 1", "has code"),
        ('histogram_quantile(0.9, x_bucket{instance="y"})', "there is no x_bucket"),
    ],
)
def test_what_is_asked_for_in_vain_is_found(expression: str, fault: str) -> None:
    exported: dict[str, set[str]] = {"inflora_version": set(), "inflora_tasks": {"state"}}
    (found,) = expressions.faults(expression, exported)
    assert fault in found


@pytest.mark.parametrize("expression", ["inflora_version{", "rate(inflora_version)", "a b", ""])
def test_what_is_no_promql_is_found(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        expressions.faults(expression, {"inflora_version": set()})


def test_the_rules_are_whole() -> None:
    rules = expressions.rules()
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names)
    documented = set(re.findall(r"\bInflora\w+", DOCS.read_text()))
    assert set(names) == documented, "each is in the documentation, with what to do"
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_the_dashboard_is_whole() -> None:
    dashboard = expressions.dashboard()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        places = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in places) < 24
        assert not taken & places, f"{panel['title']} lies over another"
        taken |= places
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert used - known == {"__rate_interval", "__all"}
