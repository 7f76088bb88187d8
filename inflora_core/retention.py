"""Which versions are old enough to let go. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from inflora_core.config import Retention
from inflora_core.model import Version


@dataclass(frozen=True)
class Outdated:
    """What need not be kept of versions.

    Attributes:
        versions: Numbers of those that can be retired.
        onnx_files: Numbers of those that need no ``model.onnx``; it may be gone already.
    """

    versions: tuple[int, ...]
    onnx_files: tuple[int, ...]


def outdated(versions: Iterable[Version], current: int, retention: Retention) -> Outdated:
    """Return what need not be kept; the current version and pinned ones are always kept.

    Args:
        versions: All that can be read.
        current: Number of the current one.
        retention: How many of the newest are kept besides.
    """
    usable = sorted((v for v in versions if not v.state.stripped), key=lambda v: v.number)

    def beyond(newest: int) -> tuple[int, ...]:
        older = usable[:-newest] if newest else []
        return tuple(v.number for v in older if v.number != current and not v.pinned)

    retired = beyond(retention.versions)
    without = (number for number in beyond(retention.onnx_files) if number not in retired)
    return Outdated(retired, tuple(without))
