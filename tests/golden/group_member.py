"""One process of a group that learns the recording: ``torchrun ... -m tests.golden.group_member``.

Rank 0 writes the models after each task to the file that it is told.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from inflora_core.compute import Compute
from inflora_core.group import Group
from tests.golden.conftest import load
from tests.golden.test_vit_learner import learn_recording


def main() -> None:
    """Learn with the others."""
    torch.set_num_threads(1)
    compute = Compute(group=Group.of_environment(torch.device("cpu")))
    run = learn_recording(load("vit_learner.npz"), compute)
    if compute.group.leads:
        models = [recorded.learned.model for recorded in run.tasks]
        Path(sys.argv[1]).write_bytes(pickle.dumps(models))


if __name__ == "__main__":
    main()
