"""What holds of a deployment, part by part; the last line is one JSON object.

    python -m tests.deploy --parts security

What a part is, ``tests/parts.py`` says.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests import parts
from tests.deploy import image, manifests, metrics, nodes, scale, security

PARTS: dict[str, parts.Part] = {
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
    figures, failed = parts.run(PARTS, __doc__, Path("build/deploy"))
    print(json.dumps(figures | {"failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
