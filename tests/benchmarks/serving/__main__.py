"""How fast predictions are served, and by whom else: ``make bench-serving``.

    python -m tests.benchmarks.serving --out build/serving

Every part goes on where it was cut off: a measurement that is in ``results.jsonl``, made with the
same code and settings, is not made again. The last line is one JSON object. ``--smoke`` sees in a
few minutes that every part works, in a file of its own; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inflora_core.predictor import processors
from tests.benchmarks.checkout import ROOT, commit
from tests.benchmarks.serving import figures, peers, scene, steps
from tests.benchmarks.serving.record import Record

PARTS = ("bare", "peers", "swaps", "learning", "cancelling", "soak")
BARE_CONCURRENCY = (16, 64)
PEER_CONCURRENCY = (1, 8, 32)

BEGIN, END = "<!-- bench-serving -->", "<!-- /bench-serving -->"

Figures = dict[str, Any]


def main() -> None:
    """Measure what is not measured yet, and say what came of it."""
    options = parser().parse_args()
    lengths = steps.Lengths(
        options.seconds, options.warm_up, options.swaps, options.cancelled, options.soak
    )
    rounds = options.rounds
    if options.smoke:
        lengths, rounds = steps.Lengths(1.5, 0.5, 20, 300, 30), 1
    options.out.mkdir(parents=True, exist_ok=True)
    stage = scene.Scene(options.out, options.threads or processors())
    scene.prepare(stage)
    machine = scene.machine()
    record = Record(
        options.out / ("smoke.jsonl" if options.smoke else "results.jsonl"),
        {
            "code": scene.code(),
            "threads": stage.threads,
            "seconds": lengths.seconds,
            "warm_up": lengths.warm_up,
            "machine": machine,
        },
        {"commit": commit()},
    )
    run: dict[str, Callable[[], Figures]] = {
        "bare": lambda: bare(record, stage, lengths, rounds),
        "peers": lambda: against_peers(record, stage, lengths, rounds, options),
        "swaps": lambda: swaps(record, stage, lengths),
        "learning": lambda: learning(record, stage, lengths, rounds),
        "cancelling": lambda: cancelling(record, stage, lengths),
        "soak": lambda: soak(record, stage, lengths),
    }
    found: Figures = {}
    for part in options.parts:
        print(f"== {part}", flush=True)
        found |= run[part]()
    if text := found.pop("table", ""):
        (options.out / "table.md").write_text(text)
        print(text, flush=True)
        if options.write:
            write_table(ROOT / "docs" / "benchmarks.md", text)
    print(json.dumps(found | {"threads": stage.threads, **machine, "commit": commit()}))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = result.add_argument
    add("--out", type=Path, default=ROOT / "build" / "serving")
    add("--parts", nargs="*", choices=PARTS, default=PARTS)
    add("--peers", nargs="*", default=[peer.name for peer in peers.PEERS])
    add("--layouts", nargs="*", choices=peers.LAYOUTS, default=peers.LAYOUTS)
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=8.0, help="of each load")
    add("--warm-up", type=float, default=2.0, help="seconds before each load")
    add("--swaps", type=int, default=200)
    add("--cancelled", type=int, default=10_000, help="calls with random deadlines")
    add("--soak", type=float, default=900.0, help="seconds of everything at once")
    add("--threads", type=int, default=0, help="of every contender; 0: one a processor")
    add("--smoke", action="store_true", help="only see that every part works")
    add("--write", action="store_true", help="write the table into docs/benchmarks.md")
    return result


def bare(record: Record, stage: scene.Scene, lengths: steps.Lengths, rounds: int) -> Figures:
    """Our server against bare loops."""
    slices = []
    for number in range(rounds):
        key = {"part": "bare", "round": number}
        measured = record.take(
            key, lambda: steps.beside_bare(stage, lengths, (1, *BARE_CONCURRENCY))
        )
        slices += measured["slices"]
    plain, own, ours = ([each[who] for each in slices] for who in (*steps.LOOPS, figures.OURS))
    return figures.against_bare(plain, ours, BARE_CONCURRENCY) | {
        name.replace("bare", "own_loop"): figure
        for name, figure in figures.against_bare(own, ours, BARE_CONCURRENCY).items()
    }


def against_peers(
    record: Record,
    stage: scene.Scene,
    lengths: steps.Lengths,
    rounds: int,
    options: argparse.Namespace,
) -> Figures:
    """Our server against others with the same file."""
    chosen = [peer for peer in peers.PEERS if peer.name in options.peers]
    pace = steps.pace_of(stage)
    measures: dict[str, Callable[[], Figures]] = {
        figures.OURS: lambda: steps.ours(stage, lengths, PEER_CONCURRENCY, pace=pace)
    }
    for peer in chosen:
        for layout in options.layouts:
            measures[f"{peer.name}/{layout}"] = lambda peer=peer, layout=layout: steps.peer(  # type: ignore[misc]
                peer, layout, stage, lengths, PEER_CONCURRENCY, pace
            )
    found = in_turn(record, "peers", measures, lengths, rounds)
    cells = figures.cells(found, PEER_CONCURRENCY)
    errors = {
        name: next(each["error"] for each in measured if "error" in each)
        for name, measured in found.items()
        if any("error" in each for each in measured)
    }
    settings = {f"{peer.name} ({peer.requirement})": peer.settings for peer in chosen}
    return {
        **figures.compared(cells),
        "cells_of": cells,
        "peer_errors": errors,
        "failed_calls": figures.failures(found, PEER_CONCURRENCY),
        "top1_agreement": figures.agreement(found),
        "table": figures.table(cells, errors, settings),
    }


def in_turn(
    record: Record,
    part: str,
    measures: dict[str, Callable[[], Figures]],
    lengths: steps.Lengths,
    rounds: int,
) -> dict[str, list[Figures]]:
    """Measure everybody once in each round; whoever is first in one is last in the next."""
    found: dict[str, list[Figures]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            key = {"part": part, "round": number, "contender": name}
            found[name].append(record.take(key, measures[name]))
    return found


def swaps(record: Record, stage: scene.Scene, lengths: steps.Lengths) -> Figures:
    """Versions that change under load."""
    key = {"part": "swaps", "swaps": lengths.swaps}
    return figures.of_swaps(record.take(key, lambda: steps.swaps(stage, lengths)))


def learning(record: Record, stage: scene.Scene, lengths: steps.Lengths, rounds: int) -> Figures:
    """Predictions while a task is learned."""
    found = [
        record.take(
            {"part": "learning", "round": number},
            lambda: steps.learning(stage, lengths),
        )
        for number in range(rounds)
    ]
    return figures.of_learning(found)


def cancelling(record: Record, stage: scene.Scene, lengths: steps.Lengths) -> Figures:
    """Calls that are given up, and the places that they had."""
    key = {"part": "cancelling", "calls": lengths.cancelled}
    found = record.take(key, lambda: steps.cancelling(stage, lengths))
    return {
        "leaked_slots": found["leaked_slots"],
        "cancelled_calls": found["ends"],
        "failed_after_cancelling": found["normal"]["failed"],
    }


def soak(record: Record, stage: scene.Scene, lengths: steps.Lengths) -> Figures:
    """Everything at once, for long."""
    key = {"part": "soak", "soak": lengths.soak}
    return figures.of_soak(record.take(key, lambda: steps.soak(stage, lengths)))


def write_table(path: Path, text: str) -> None:
    """Put the table between its marks, at the end if there are none yet."""
    content = path.read_text()
    if BEGIN not in content:
        content += f"\n## Serving\n\n`make bench-serving`:\n\n{BEGIN}\n{END}\n"
    before, _, rest = content.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
