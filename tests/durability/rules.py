"""Histories of requests, deaths and restarts, and after every step a server that is as expected.

    python -m tests.durability.rules --steps 1000 --out build/durability

A real server process is taught, edited, rolled back, stopped and killed, in an order that
hypothesis makes up. What it should be like is said by ``expected``; after every step the two are
compared. The learning worker is a process, too, but follows a script: it is held at a stage, killed
there, or ends itself, so that a history goes the same way every time. With ``--worker real`` it is
the one that learns; there is no holding that, so it is killed somewhere in its work.

A run that was cut off goes on with the next episode. One that found a difference does not: the same
command finds it again, until it is put right.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from inflora_core import durable
from tests.durability.machine import Machine
from tests.durability.real import Real
from tests.durability.scripted import Scripted

EPISODE = 50
"""Steps of one history, from a new store on."""

WORKERS: dict[str, type[Machine]] = {"scripted": Scripted, "real": Real}


def history(number: int, steps: int, machine: type[Machine] = Scripted) -> Counter[str]:
    """Go through one history; return how often each rule was followed.

    Histories that hypothesis gives up, as no rule is left that it has not left out, do not count.

    Args:
        number: Which; the same number is the same history.
        steps: How many steps, of which the first is the start.
        machine: What they are steps of.

    Raises:
        AssertionError: the server is not as expected; notes of it hold a program that shows it.
    """
    machines: list[Machine] = []

    def make() -> Machine:
        machines.append(machine())
        return machines[-1]

    run_state_machine_as_test(
        seed(number)(make),  # type: ignore[arg-type]
        settings=settings(
            max_examples=1,
            stateful_step_count=steps,
            phases=[Phase.generate, Phase.shrink],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return max((each.taken for each in machines), key=Counter.total)


@dataclass
class State:
    """What outlives this process.

    Attributes:
        episodes: How many histories there were without a difference.
        by_rule: How often each rule was followed in them.
    """

    episodes: int = 0
    by_rule: dict[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return sum(self.by_rule.values())

    @classmethod
    def load(cls, path: Path) -> State:
        """Return what was saved, or a new one."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        durable.replace(path, json.dumps(vars(self)).encode())


def main() -> None:
    """Read the command line, and go through histories."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--worker", choices=("scripted", "real"), default="scripted")
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    options = parser.parse_args()
    folder = options.out / "rules"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.worker}.json"
    state, differences = State.load(path), 0
    while state.steps < options.steps and not differences:
        try:
            taken = history(state.episodes, EPISODE, WORKERS[options.worker])
        except Exception:
            traceback.print_exc()
            differences = 1
        else:
            state.by_rule = dict(sorted((Counter(state.by_rule) + taken).items()))
            state.episodes += 1
            state.save(path)
            print(f"episode {state.episodes}: {state.steps} steps", flush=True)
    print(
        json.dumps(
            {
                "steps": state.steps,
                "differences": differences,
                "by_rule": state.by_rule,
                "episodes": state.episodes,
            }
        )
    )
    raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
