"""What the dashboard and the alert rules in ``deploy/observability`` ask Prometheus for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "observability"
ALERTS, DASHBOARD = FOLDER / "alerts.yaml", FOLDER / "dashboard.json"

TARGET = frozenset({"instance", "job", "le"})
"""Labels that Prometheus adds to every series, and that of buckets."""

VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}
"""Grafana's, and what stands for them here."""


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def expressions() -> Iterator[tuple[str, str]]:
    """Yield where each expression is, and the expression."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in dashboard()["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def faults(expression: str, exported: Mapping[str, set[str]]) -> list[str]:
    """Return what an expression asks for in vain.

    Args:
        expression: In PromQL, with Grafana's variables.
        exported: The labels of each series that there is.

    Raises:
        ValueError: it is not PromQL.
    """
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    found: list[str] = []
    labels: set[str] = set()
    for part in _parts(promql_parser.parse(expression)):
        if isinstance(part, promql_parser.VectorSelector):
            if part.name not in exported:
                found.append(f"there is no {part.name}")
                continue
            labels |= exported[part.name]
            asked = {matcher.name for matcher in part.matchers.matchers}
            found += [f"{part.name} has no {n}" for n in asked - exported[part.name] - TARGET]
        elif isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            inside = {
                label
                for each in _parts(part.expr)
                if isinstance(each, promql_parser.VectorSelector)
                for label in exported.get(each.name or "", ())
            }
            asked = set(part.modifier.labels)
            found += [f"nothing in {part.expr} has {name}" for name in asked - inside - TARGET]
    return found


def _parts(tree: promql_parser.Expr) -> list[promql_parser.Expr]:
    """Return an expression and all that it is made of."""
    found: list[promql_parser.Expr] = []
    promql_parser.walk(tree, found.append)
    return found
