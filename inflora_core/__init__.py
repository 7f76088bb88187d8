"""InfLoRA: a classifier that never stops learning. Start reading at ``learner.py``."""

import os

# Before onnxruntime is imported by anyone: it would keep an id of the machine and a database in the
# home folder and in that for temporary files, and report to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
