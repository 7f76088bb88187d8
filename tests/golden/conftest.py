"""Numbers recorded from the published code; the README beside them names every array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


def load(name: str) -> Mapping[str, Any]:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(
            "the golden numbers (shared/golden beside the checkout) are not on this machine"
        )
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="session")
def vit_learner() -> Mapping[str, Any]:
    return load("vit_learner.npz")


@pytest.fixture(scope="session")
def dualgpm() -> Mapping[str, Any]:
    return load("dualgpm.npz")
