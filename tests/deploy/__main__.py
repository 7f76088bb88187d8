"""``python -m tests.deploy --parts manifests``: what it takes to run this where it will live.

Each part is a function that returns figures; the last line is all of them, as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.deploy import image, manifests

PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "manifests": manifests.figures,
    "image": image.figures,
}


def main() -> int:
    """Run parts; the status is 1 if anything is wrong with the manifests or the image."""
    parser = argparse.ArgumentParser(prog="tests.deploy", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    figures: dict[str, Any] = {}
    for part in parser.parse_args().parts:
        figures |= PARTS[part]()
    print(json.dumps(figures))
    return 1 if figures.get("manifest_errors") or figures.get("image_errors") else 0


if __name__ == "__main__":
    sys.exit(main())
