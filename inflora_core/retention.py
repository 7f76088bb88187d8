"""Which versions are old enough to let go. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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


def outdated(
    versions: Iterable[Version], wanted: Collection[int], retention: Retention
) -> Outdated:
    """Return what need not be kept.

    Candidates do not count: a few of them would push out all versions that can answer.

    Args:
        versions: All that can be read.
        wanted: Numbers of those that are kept however old they are, beside pinned ones.
        retention: How many of the newest are kept besides.
    """
    usable = sorted((v for v in versions if not v.state.stripped), key=lambda v: v.number)
    counted = [v.number for v in usable if not v.candidate]

    def beyond(newest: int) -> tuple[int, ...]:
        oldest = counted[-newest] if 0 < newest <= len(counted) else 0
        older = (v for v in usable if v.number < oldest)
        return tuple(v.number for v in older if v.number not in wanted and not v.pinned)

    retired = beyond(retention.versions)
    without = (number for number in beyond(retention.onnx_files) if number not in retired)
    return Outdated(retired, tuple(without))
