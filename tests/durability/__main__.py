"""Everything that shows that nothing is lost; the last line is one JSON object.

    python -m tests.durability --out build/durability

Every part goes on where it was when it was cut off, and can be run alone: see its module. With
``--again`` all begin anew, as they should after a change of what they test.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.accuracy import STREAM

PARTS = ("flips", "rules", "inputs", "gate", "faults", "kills")
"""Short ones first."""


def command(part: str, out: Path) -> list[str]:
    """Return the arguments of Python that run a part."""
    if part == "gate":
        return ["-m", "tests.benchmarks.gate", "--out", str(out / "gate.jsonl")]
    return ["-m", f"tests.durability.{part}", "--out", str(out)]


def figures(part: str, out: Path) -> dict[str, Any]:
    """Run a part, show what it prints, and return the JSON object that is its last line."""
    if part == "gate" and not Path(STREAM).exists():
        print(f"the gate is left out: {STREAM} is not there", flush=True)
        return {"gate_false_pass": None, "gate_false_stop": None}
    print(f"== {part}", flush=True)
    last = ""
    with subprocess.Popen(
        [sys.executable, *command(part, out)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    try:
        found: dict[str, Any] = json.loads(last)
    except ValueError:
        raise SystemExit(f"{part} ended with exit status {process.returncode}") from None
    return found | {"failed": process.returncode != 0}


def main() -> None:
    """Run all parts, or some."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/durability"))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--again", action="store_true", help="begin anew")
    options = parser.parse_args()
    if options.again:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {part: figures(part, options.out) for part in options.parts}
    failed = [part for part, each in found.items() if each.pop("failed", False)]
    violations = sum(
        each.get(name, 0) for each in found.values() for name in ("violations", "fault_violations")
    )
    every: dict[str, Any] = {}
    for each in found.values():
        every |= {name: value for name, value in each.items() if not isinstance(value, dict)}
    print(json.dumps({**every, "violations": violations, "failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
