"""What holds of a deployment, part by part; the last line is one JSON object.

    python -m tests.deploy --parts security

Each part is a function that takes an empty folder, prints how it does, and returns its figures;
under ``failed``, a list of what is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.deploy import image, manifests, metrics, nodes, scale, security

PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "security": security.measure,
    "metrics": metrics.measure,
    "manifests": manifests.measure,
    "scale": scale.scale,
    "rolling": scale.rolling,
    "cold": scale.cold,
    "image": image.measure,
    "nodes": nodes.measure,
}


def main() -> None:
    """Run all parts, or some."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/deploy"))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    failed: list[str] = []
    for part in options.parts:
        print(f"== {part}", flush=True)
        folder = options.out / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = PARTS[part](folder.resolve())
        for fault in found.pop("failed", []):
            print(f"{part}: {fault}", flush=True)
            failed.append(f"{part}: {fault}")
        figures |= found
    print(json.dumps(figures | {"failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
