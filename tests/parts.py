"""Checks that run part by part, each in an empty folder, and end with one JSON object."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Part = Callable[[Path], dict[str, Any]]
"""Takes an empty folder, prints how it does, and returns its figures; under ``failed``, a list of
what is not as it should be."""


def run(parts: Mapping[str, Part], description: str, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Run all parts, or those that the command line names; return figures and failures."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    failed: list[str] = []
    for part in options.parts:
        print(f"== {part}", flush=True)
        folder = options.out.resolve() / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = parts[part](folder)
        for fault in found.pop("failed", []):
            print(f"{part}: {fault}", flush=True)
            failed.append(f"{part}: {fault}")
        figures |= found
    return figures, failed
