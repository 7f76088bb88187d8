"""What a machine lacks for a test: a reason to skip it, or to fail where it has to be run."""

from __future__ import annotations

import os

import pytest


def skip_or_fail(missing: str | None, required: str) -> None:
    """Skip what needs something that is missing; fail it if a variable is set that requires it.

    Args:
        missing: What is missing, and how to get it; None for nothing.
        required: The variable, which a make target sets that must not pass having tested nothing.
    """
    if missing is not None:
        pytest.fail(missing) if required in os.environ else pytest.skip(missing)
