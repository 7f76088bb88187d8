"""Figures and tables of what was measured: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

OURS = "ours"
METRICS = ("throughput", "p50", "p99")

_NEVER = 3600.0
"""The latency, in seconds, of a load without an answer: worse than any, and a number in JSON."""

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""What each contender came to in every round: reports by the number of clients, or an error."""


def value(report: Mapping[str, Any], metric: str) -> float:
    """Return a figure of one load; what had no answer is the worst there is."""
    if metric == "throughput":
        return float(report["throughput"])
    return float(report["latency"][metric]) if report["latency"] else _NEVER


def _at_pace(report: Mapping[str, Any], metric: str, usual: float) -> float:
    speed = report.get("pace", usual) / usual
    figure = value(report, metric)
    return figure / speed if metric == "throughput" else figure * speed


def against_bare(bare: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]],
                 concurrency: Sequence[int]) -> dict[str, Any]:  # fmt: skip
    """Compare with the bare loop: medians over slices of the ratios within each."""
    pairs = list(zip(bare, ours, strict=True))
    latency = median(value(o["1"], "p50") / value(b["1"], "p50") for b, o in pairs)
    throughput = {
        str(clients): median(
            value(o[str(clients)], "throughput") / value(b["1"], "throughput") for b, o in pairs
        )
        for clients in concurrency
    }
    return {
        "latency_vs_bare": latency,
        "throughput_vs_bare": min(throughput.values()),
        "throughput_vs_bare_at": throughput,
    }


def cells(rounds: Rounds, concurrency: Sequence[int]) -> list[dict[str, Any]]:
    """Return each cell with the median of every contender, and how ours compares.

    A contender is called ``name`` or ``name/layout``. Of those that are not ours, the best counts.
    ``ratio`` is above 1 where ours is better than that. Rounds in which one could not be measured
    do not count for it. Where loads have a ``pace``, figures are what they would be if the machine
    were as fast as it is in the median.
    """
    paces = [
        load["pace"]
        for measured in rounds.values()
        for each in measured
        for load in each.values()
        if isinstance(load, Mapping) and "pace" in load
    ]
    usual = median(paces) if paces else 1.0
    found = []
    for clients in concurrency:
        for metric in METRICS:
            values = {
                name: median(_at_pace(each[str(clients)], metric, usual) for each in worked)
                for name, measured in rounds.items()
                if (worked := [each for each in measured if "error" not in each])
            }
            others = {name: each for name, each in values.items() if name != OURS}
            cell = {"concurrency": clients, "metric": metric, "values": values}
            if others and OURS in values:
                better = max if metric == "throughput" else min
                best = better(others, key=lambda name: others[name])
                mine, theirs = values[OURS], max(others[best], 1e-9)
                ratio = mine / theirs if metric == "throughput" else theirs / max(mine, 1e-9)
                cell |= {"best_peer": best, "ratio": ratio}
            found.append(cell)
    return found


def compared(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the cells that ours is first in, and those within 3% of the best."""
    ratios = [cell["ratio"] for cell in found if "ratio" in cell]
    return {
        "cells": len(found),
        "cells_first": sum(ratio >= 1 for ratio in ratios),
        "cells_within_3_percent": sum(ratio >= 0.97 for ratio in ratios),
    }


def failures(rounds: Rounds, concurrency: Sequence[int]) -> dict[str, int]:
    """Return how many calls of each contender failed: latencies are of the others."""
    return {
        name: sum(
            each[str(clients)]["failed"]
            for each in measured
            if "error" not in each
            for clients in concurrency
        )
        for name, measured in rounds.items()
    }


def agreement(rounds: Rounds) -> dict[str, float]:
    """Return for each contender the share of images with the same best class as ours."""
    ours = rounds[OURS][0]["labels"]
    return {
        name: sum(a == b for a, b in zip(ours, measured[0]["labels"], strict=True)) / len(ours)
        for name, measured in rounds.items()
        if measured and "labels" in measured[0]
    }


def of_swaps(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of swapping: p99 against the mean of before and after, and memory.

    Of memory, medians of ten swaps: while calls are under way, it is a tenth more or less.
    """
    memory, count = found["resident_bytes"], found["swaps"]
    quiet = (value(found["before"], "p99") + value(found["after"], "p99")) / 2
    early, late = (median(memory[max(end - 10, 0) : end]) for end in (max(count // 10, 1), count))
    return {
        "swaps": count,
        "swap_failures": sum(
            sum(found[phase]["errors"].values()) for phase in ("before", "during", "after")
        ),
        "swap_p99_ratio": value(found["during"], "p99") / quiet,
        "swap_memory_ratio": late / early,
    }


def of_soak(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of everything at once; growth is that of medians from the second quarter
    to the last: what is set up lazily is there by the second."""
    load, memory, turns = found["load"], found["memory"], found["turns"]
    quarter = len(memory) // 4
    ended_badly = sum(turns.get(state, 0) for state in ("FAILED", "SET_ASIDE", "HELD_BACK"))

    def growth(process: str) -> float:
        sizes = [each[process] for each in memory]
        return median(sizes[-quarter:]) / median(sizes[quarter : 2 * quarter])

    return {
        "soak_seconds": found["seconds"],
        "soak_calls": load["calls"],
        "soak_failures": load["failed"] + ended_badly,
        "soak_p99": value(load, "p99"),
        "soak_learned": turns.get("PUBLISHED", 0),
        "soak_swaps": turns.get("PUBLISHED", 0) + turns.get("promoted", 0),
        "soak_memory_ratio": growth("server"),
        "soak_worker_memory_ratio": growth("worker"),
    }


def of_learning(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of predicting while a task is learned: medians of the rounds."""
    return {
        "learning_p99_ratio": median(
            value(each["learning"], "p99") / value(each["idle"], "p99") for each in rounds
        ),
        "learning_failures": sum(
            each[phase]["failed"] for each in rounds for phase in ("idle", "learning")
        ),
        "answers_identical": all(each["identical"] for each in rounds),
        "learned_all_along": all(each["learned_all_along"] for each in rounds),
    }


def table(found: Sequence[Mapping[str, Any]], errors: Mapping[str, str],
          settings: Mapping[str, str]) -> str:  # fmt: skip
    """Return the cells as markdown, a row for each contender, what is best in bold.

    Args:
        found: From ``cells``.
        errors: Contenders that could not be measured, and why.
        settings: What each contender is, by its name without the layout.
    """
    names = list(found[0]["values"]) if found else []
    head = [_title(cell) for cell in found]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in names:
        row = []
        for cell in found:
            better = max if cell["metric"] == "throughput" else min
            shown = _shown(cell["values"][name], cell["metric"])
            best = better(cell["values"].values()) == cell["values"][name]
            row.append(f"**{shown}**" if best else shown)
        lines.append(f"| {name} | {' | '.join(row)} |")
    if any("ratio" in cell for cell in found):
        ratios = [f"{cell['ratio']:.2f}" if "ratio" in cell else "-" for cell in found]
        lines.append(f"| ours against the best peer | {' | '.join(ratios)} |")
    notes = [f"- {name}: {text}" for name, text in settings.items()]
    notes += [f"- {name} is not in the table: {_line(why)}" for name, why in errors.items()]
    return "\n".join([*lines, "", *notes, ""])


def _title(cell: Mapping[str, Any]) -> str:
    unit = "calls/s" if cell["metric"] == "throughput" else f"{cell['metric']}, ms"
    return f"{cell['concurrency']}: {unit}"


def _shown(figure: float, metric: str) -> str:
    return f"{figure:.1f}" if metric == "throughput" else f"{1000 * figure:.1f}"


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
