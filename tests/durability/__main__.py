"""Everything that shows that nothing is lost; the last line is one JSON object.

    python -m tests.durability --out build/durability

Every part goes on where it was when it was cut off, and can be run alone: see its module. What was
found with other code than there is now counts no more: that part begins anew. Not with ``--keep``,
which names it under ``other_code`` in the end. With ``--again`` all begin anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks import teaching
from tests.benchmarks.accuracy import STREAM
from tests.benchmarks.checkout import ROOT, commit

PARTS = ("flips", "rules", "inputs", "gate", "faults", "kills")
"""Short ones first."""


def code_of(part: str) -> str:
    """Return a hash of the code that decides what a part finds."""
    if part == "gate":
        files = [ROOT / "inflora_core" / "gate.py", ROOT / "tests" / "benchmarks" / "gate.py"]
        return hashlib.sha256(
            "".join([teaching.method_digest(), *map(teaching.code_digest, files)]).encode()
        ).hexdigest()
    folders = ("inflora_core", "service", "clients", "proto", "tests/durability", "tests/service")
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256("".join(map(teaching.code_digest, files)).encode()).hexdigest()


def prepare(part: str, out: Path, *, keep: bool) -> bool:
    """Remove what a part found with other code; return whether that is kept instead."""
    stamp, code = out / f"{part}.code", code_of(part)
    found = [out / name for name in (part, f"{part}.jsonl") if (out / name).exists()]
    if found and (not stamp.exists() or stamp.read_text() != code):
        if keep:
            return True
        print(f"{part} begins anew: what is there was found with other code", flush=True)
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stamp.write_text(code)
    return False


def command(part: str, out: Path) -> list[str]:
    """Return the arguments of Python that run a part."""
    if part == "gate":
        return ["-m", "tests.benchmarks.gate", "--out", str(out / "gate.jsonl")]
    return ["-m", f"tests.durability.{part}", "--out", str(out)]


def figures(part: str, out: Path) -> dict[str, Any]:
    """Run a part, show what it prints, and return the JSON object that is its last line."""
    if part == "gate" and not Path(STREAM).exists():
        print(f"the gate cannot be looked at: {STREAM} is not there", flush=True)
        return {"gate_false_pass": None, "gate_false_stop": None, "failed": True}
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
    parser.add_argument("--keep", action="store_true", help="keep what other code found")
    options = parser.parse_args()
    if options.again:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    other = [part for part in options.parts if prepare(part, options.out, keep=options.keep)]
    found = {part: figures(part, options.out) for part in options.parts}
    failed = [part for part, each in found.items() if each.pop("failed", False)]
    violations = sum(
        each.get(name, 0) for each in found.values() for name in ("violations", "fault_violations")
    )
    every: dict[str, Any] = {}
    for each in found.values():
        every |= {name: value for name, value in each.items() if not isinstance(value, dict)}
    state = {"violations": violations, "failed": failed, "other_code": other, "commit": commit()}
    print(json.dumps(every | state))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
