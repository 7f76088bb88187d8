"""Numbers recorded from the published code; the README beside them names every array."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lacking import skip_or_fail

GOLDEN = Path(os.environ.get("GOLDEN") or Path(__file__).parents[3] / "shared" / "golden")


def load(name: str) -> Mapping[str, Any]:
    path = GOLDEN / name
    if not path.exists():
        skip_or_fail(f"no {name} in {GOLDEN}; name the folder with GOLDEN=", "GOLDEN_REQUIRED")
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="session")
def vit_learner() -> Mapping[str, Any]:
    return load("vit_learner.npz")


@pytest.fixture(scope="session")
def dualgpm() -> Mapping[str, Any]:
    return load("dualgpm.npz")
