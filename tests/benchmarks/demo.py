"""The main job, once: ``make demo``. A stream with settings that suit a first look.

Teaches the ten classes of scikit-learn's handwritten digits as five tasks of two to a real server.
``--data FOLDER`` and ``--backbone NAME-OR-FILE`` do the same on anything.
"""

from __future__ import annotations

import sys

from tests.benchmarks import stream
from tests.benchmarks.checkout import ROOT

if __name__ == "__main__":
    stream.main(["--out", str(ROOT / "build" / "demo"), *sys.argv[1:]])
