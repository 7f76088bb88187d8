"""Versions that were really learned, one of them on another branch."""

from __future__ import annotations

from pathlib import Path

from inflora_core.compute import Compute
from inflora_core.config import LearnConfig
from inflora_core.progress import Tracker
from inflora_core.store import Store
from inflora_core.worker import Worker
from tests.core import tiny

CONFIG = LearnConfig(epochs=1, batch_size=8, rank=2, threshold_first=0.6, threshold_last=0.8)
PARENTS = {1: None, 2: 1, 3: 2, 4: 2}
"""Version 4 was learned after 3 was rolled back."""
CLASSES = {1: ["red", "green"], 2: ["blue"], 3: ["white"], 4: ["yellow", "cyan"]}


def learned(folder: Path) -> Store:
    """Learn them in a new store, ``folder/store``."""
    store = Store.open(folder / "store")
    worker = Worker(store, Compute(), 1)
    worker.prepare(str(tiny.write_backbone(folder)), None)
    for number, parent in PARENTS.items():
        spool = tiny.write_spool(folder / f"spool-{number}", CLASSES[number], 8)
        assert worker.learn(f"task-{number}", spool, CONFIG, parent, Tracker()) == number
    return store
