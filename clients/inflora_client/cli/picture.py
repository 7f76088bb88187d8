"""The picture of ``inflora bench``: latency by the share of calls, a line for each load, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from inflora_client._bench import LoadReport

_WIDTH, _HEIGHT = 860, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 640, 50, 370
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by the colour-blind, too (Okabe and Ito)."""

_SHARES = (0.0, 0.5, 0.9, 0.99, 0.999)
_NINES = 3.3
"""The width in powers of ten of the calls that are slower: all of them are drawn at its end."""


def draw(reports: Sequence[LoadReport], title: str) -> str:
    """Return the picture; loads without an answer have only a line of text.

    Args:
        reports: At least one load.
        title: What was measured.
    """
    seconds = [value for report in reports for _, value in report.curve if value > 0]
    low = math.floor(math.log10(min(seconds, default=0.001)))
    high = max(math.ceil(math.log10(max(seconds, default=1.0))), low + 1)

    def across(share: float) -> float:
        nines = min(-math.log10(1 - share), _NINES) if share < 1 else _NINES
        return _LEFT + nines / _NINES * (_RIGHT - _LEFT)

    def up(value: float) -> float:
        height = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return _BOTTOM - height * (_BOTTOM - _TOP)

    height = max(_HEIGHT, _TOP + 38 * len(reports))  # of the list of loads
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_LEFT, 25, title, size=15),
        _text((_LEFT + _RIGHT) / 2, _HEIGHT - 12, "share of calls that took no longer", "middle"),
        _text(_LEFT - 60, _TOP - 10, "latency"),
    ]
    for share in _SHARES:
        parts += _rule(across(share), _TOP, across(share), _BOTTOM)
        parts.append(_text(across(share), _BOTTOM + 18, f"{share:.4g}", "middle"))
    steps = [step * 10.0**power for power in range(low, high) for step in (1, 2, 5)]
    for value in [*steps, 10.0**high]:
        parts += _rule(_LEFT, up(value), _RIGHT, up(value))
        shown = f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"
        parts.append(_text(_LEFT - 6, up(value) + 4, shown, "end"))
    for number, report in enumerate(reports):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{across(share):.1f},{up(value):.1f}" for share, value in report.curve)
        if points:
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
        line = _TOP + 10 + 38 * number
        parts.append(_text(_RIGHT + 20, line, load_name(report), colour=colour))
        failed = f", {report.failed} failed" if report.failed else ""
        parts.append(_text(_RIGHT + 20, line + 16, f"{report.throughput:.1f} calls/s{failed}"))
    return "\n".join([*parts, "</svg>", ""])


def load_name(report: LoadReport) -> str:
    """Say which load a report is of."""
    if report.concurrency is not None:
        return f"{report.concurrency} client{'s' if report.concurrency > 1 else ''}"
    return f"{report.rate:g} calls/s due"


def _rule(x1: float, y1: float, x2: float, y2: float) -> Iterable[str]:
    yield f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'


def _text(
    x: float,
    y: float,
    content: str,
    anchor: str = "start",
    size: int = 12,
    colour: str = "#222",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{colour}">{escape(content)}</text>'
    )
