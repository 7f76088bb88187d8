"""One process of a group that learns: ``torchrun ... -m tests.core.group_member FOLDER``.

Learns three small tasks on the tiny backbone in FOLDER; rank 0 writes what came of it.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from inflora_core.backbone import Backbone, create_backbone
from inflora_core.compute import Compute
from inflora_core.config import LearnConfig
from inflora_core.group import Group
from inflora_core.learner import learn_task
from inflora_core.model import Learned
from inflora_core.progress import Tracker
from tests.core import tiny

CPU = torch.device("cpu")
TASKS = (("red", "green"), ("blue", "yellow", "white"), ("cyan",))
CONFIG = LearnConfig(rank=4, epochs=2, batch_size=7, learning_rate=5e-3, augmentation="flip")
"""17 images in batches of 7: the last has 3 or fewer, and some process fewer still."""


def learn(backbone: Backbone, compute: Compute) -> list[Learned]:
    """Learn the tasks one after the other."""
    model, done = tiny.untaught(backbone), []
    for labels in TASKS:
        data = tiny.images(labels, 9 if len(labels) > 1 else 1)
        done.append(
            learn_task(model, backbone, data, labels[0], CONFIG, Tracker(), compute=compute)
        )
        model = done[-1].model
    return done


def main() -> None:
    """Learn with the others."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    compute = Compute(group=Group.of_environment(CPU))
    if compute.group.rank == 1:
        compute.most = 3  # memory is short here alone
    learned = learn(create_backbone(str(folder / "tiny.safetensors")), compute)
    if compute.group.leads:
        (folder / "learned.pickle").write_bytes(pickle.dumps([x.model for x in learned]))


if __name__ == "__main__":
    main()
