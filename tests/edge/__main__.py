"""What holds of devices: ``make test-edge``.

    python -m tests.edge --parts delta forms follow alone

``delta``: sizes and times of deltas between models of the shape of a ViT-B, and long lines of them;
``forms``: the smaller forms of a DeiT-tiny that learned a stream, beside the file itself;
``follow``: a device that is cut off, killed and damaged at random while a real server's model
changes; ``alone``: what a device answers with its own packages alone. The last line is one JSON
object; the exit status is 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys

from tests.edge import alone, deltas, faults, forms

PARTS = {
    "delta": deltas.measured,
    "forms": forms.measured,
    "follow": faults.measured,
    "alone": alone.measured,
}


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--faults", type=int, default=100, help="of `follow`")
    parser.add_argument("--seed", type=int, default=0, help="likewise")
    parser.add_argument("--epochs", type=int, default=1, help="of each task of `forms`")
    options = parser.parse_args()
    found: dict[str, object] = {}
    for part in options.parts:
        print(f"== {part}", flush=True)
        figures = PARTS[part](options)
        print(json.dumps(figures), flush=True)  # a run that is cut short has said what it found
        found |= figures
    wrong = [
        name
        for name, holds in {
            "delta_share": lambda share: share <= 0.012,
            "delta_mismatches": lambda count: count == 0,
            "fp16_agreement": lambda share: share >= 0.995,
            "int8_agreement": lambda share: share >= 0.98,
            "int8_lost": lambda lost: lost <= 0.01,
            "int8_share": lambda share: share <= 0.30,
            "int8_cpu_ratio": lambda ratio: ratio <= 0.75,
            "follow_failures": lambda count: count == 0,
            "alone_agreed": lambda count: count == found["alone_images"],
            "alone_mebibytes": lambda size: size <= 256,
        }.items()
        if name in found and not holds(found[name])
    ]
    print(json.dumps(found | {"wrong": wrong}), flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
