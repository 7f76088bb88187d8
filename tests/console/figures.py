"""What the tests of the console have measured; ``python -m tests.console`` prints it."""

from __future__ import annotations

from typing import Any

FOUND: dict[str, Any] = {}


def count(name: str, more: int) -> None:
    """Add to a figure."""
    FOUND[name] = FOUND.get(name, 0) + more
