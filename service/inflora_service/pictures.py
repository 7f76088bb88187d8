"""Pictures of what a store has learned, as SVG: pure functions of plain data.

What is drawn has classes, no colours. Those are in ``stylesheet``: of a page, whose reader may want
it dark, or of a file that stands alone. Series differ in shape or dash, too: not everybody tells
their colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from inflora_service.overview import Cell, Fared, Lesson, Node, Source
from inflora_service.pulse import Moment

WIDTH = 340
"""Of most pictures: a phone shows them about as they are, by shrinking them a little."""

ROOM = 280
"""What a picture that does not shrink has on a phone before it is scrolled."""

MOST_TASKS = 40
"""Newest tasks in a picture that has a cell or a bar for each; tables have all."""

MOST_BARS = 14
MOST_VERSIONS = 40
"""Newest versions in the picture of the lineage."""

_MARGIN, _HEAD = 12, 24
"""Around a picture that stands alone, and for its title."""

_STEPS = 20
"""Shades of a heat map, one for each 5%. Darker ones lie closer: what matters is near 100%."""

_LIGHT = {
    "ground": "#ffffff",
    "text": "#1b2430",
    "quiet": "#5a6675",
    "line": "#d4dae1",
    "mark": "#0b62a8",
    "other": "#b3470a",
    "soft": "#c9dcec",
    "loss": "#b3470a",
    "gain": "#0b62a8",
}
_DARK = {
    "ground": "#171c23",
    "text": "#e4e9ef",
    "quiet": "#9aa7b5",
    "line": "#333d49",
    "mark": "#6cb2ee",
    "other": "#f0a35e",
    "soft": "#27435c",
    "loss": "#f0a35e",
    "gain": "#6cb2ee",
}
_HEAT = ((0xF1, 0xF5, 0xFA), (0x8F, 0xBF, 0xE3), (0x0A, 0x3D, 0x77))
"""From nothing to everything right; in the dark, the other way round and less bright."""
_DARK_HEAT = ((0x20, 0x2A, 0x36), (0x2F, 0x69, 0x9B), (0xCF, 0xE6, 0xFA))

_RULES = """
.p-ground { fill: %(ground)s; }
.p-t { fill: %(text)s; font-size: 11px; }
.p-q { fill: %(quiet)s; font-size: 10px; }
.p-b { fill: %(text)s; font-size: 11px; font-weight: 600; }
.p-s { font-size: 9px; }
.p-e { text-anchor: end; }
.p-m { text-anchor: middle; }
.p-axis { stroke: %(line)s; stroke-width: 1; fill: none; }
.p-none { fill: none; stroke: %(line)s; stroke-width: 1; stroke-dasharray: 2 2; }
.p-mark { stroke: %(mark)s; stroke-width: 2; fill: none; stroke-linejoin: round; }
.p-other { stroke: %(other)s; stroke-width: 2; fill: none; stroke-dasharray: 5 3; }
.p-thin { stroke: %(soft)s; stroke-width: 1; fill: none; }
.p-area { fill: %(soft)s; }
.p-dot { fill: %(mark)s; }
.p-odot { fill: %(other)s; }
.p-tmark { fill: %(mark)s; font-size: 11px; font-weight: 600; }
.p-tother { fill: %(other)s; font-size: 11px; font-weight: 600; }
.p-loss { fill: %(loss)s; }
.p-gain { fill: %(gain)s; }
.p-edge { stroke: %(quiet)s; stroke-width: 1.5; fill: none; }
.p-node { fill: %(ground)s; stroke: %(quiet)s; stroke-width: 1.5; }
.p-gone { fill: %(line)s; stroke: %(line)s; }
.p-held { stroke: %(other)s; stroke-dasharray: 3 2; }
.p-now { fill: %(mark)s; stroke: %(mark)s; }
.p-on { fill: %(ground)s; font-size: 9px; font-weight: 600; text-anchor: middle; }
.p-in { fill: %(text)s; font-size: 9px; text-anchor: middle; }
"""
FONT = "system-ui, 'DejaVu Sans', 'Liberation Sans', Arial, sans-serif"
"""Of pictures that stand alone."""


@dataclass(frozen=True)
class Picture:
    """Something drawn.

    Attributes:
        name: What it is called in a page or a folder.
        title: What it shows.
        description: What is to be seen in it, for those who do not see it.
        width: In pixels.
        height: Likewise.
        body: What is inside of the ``svg`` element.
    """

    name: str
    title: str
    description: str
    width: int
    height: int
    body: str

    def inline(self) -> str:
        """Return it for a page that has ``stylesheet``."""
        return self._svg(self.width, self.height, self.body)

    def alone(self) -> str:
        """Return it as a file of its own, with its title."""
        width, height = self.width + 2 * _MARGIN, self.height + 2 * _MARGIN + _HEAD
        rules = f"text {{ font-family: {FONT}; }}{_rules(_LIGHT, _HEAT)}"
        return self._svg(
            width,
            height,
            f'<style>{rules}</style><rect width="{width}" height="{height}" class="p-ground"/>'
            f"{_text(_MARGIN, _MARGIN + 11, self.title, 'p-b')}"
            f'<g transform="translate({_MARGIN} {_MARGIN + _HEAD})">{self.body}</g>',
        )

    def _svg(self, width: int, height: int, body: str) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" role="img" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'aria-labelledby="{self.name}-t {self.name}-d">'
            f'<title id="{self.name}-t">{escape(self.title)}</title>'
            f'<desc id="{self.name}-d">{escape(self.description)}</desc>{body}</svg>'
        )


def stylesheet() -> str:
    """Return the rules of pictures in a page, light, and dark where its reader wants that."""
    dark = f"@media (prefers-color-scheme: dark) {{{_rules(_DARK, _DARK_HEAT)}}}\n"
    return _rules(_LIGHT, _HEAT) + dark


def _rules(colours: Mapping[str, str], heat: Sequence[tuple[int, int, int]]) -> str:
    rules = _RULES % colours
    for step in range(_STEPS):
        red, green, blue = shade = _shade(heat, (step / (_STEPS - 1)) ** 2)
        rules += f".p-h{step} {{ fill: #{red:02x}{green:02x}{blue:02x}; }}\n"
        rules += f".p-c{step} {{ fill: {'#ffffff' if _is_dark(shade) else '#0d1620'}; }}\n"
    return rules


def _shade(heat: Sequence[tuple[int, int, int]], share: float) -> tuple[int, int, int]:
    place = share * (len(heat) - 1)
    low = min(int(place), len(heat) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - low)) for a, b in zip(heat[low], heat[low + 1], strict=True)
    )
    return red, green, blue


def _is_dark(colour: tuple[int, int, int]) -> bool:
    """Whether white is easier to read on it than black, by WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in _shares(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return luminance < 0.179


def _shares(colour: Iterable[int]) -> list[float]:
    return [part / 255 for part in colour]


# -- the pictures ---------------------------------------------------------------------------------


def accuracy(lessons: Sequence[Lesson], cells: Mapping[tuple[int, int], Cell]) -> Picture:
    """Draw a heat map: the accuracy of every task after every task.

    Args:
        lessons: The tasks, oldest first.
        cells: Accuracies, by the positions of the task that was learned last and of the images'.
    """
    shown = [lesson.position for lesson in lessons[-MOST_TASKS:]]
    left, top = 54, 32
    side = min(44.0, (WIDTH - left - 2) / max(1, len(shown)))
    place = {position: index * side for index, position in enumerate(shown)}
    every = max(1, math.ceil(16 / side))
    drawn = [_text(left, 10, "% right, on images of task", "p-q")]
    drawn.append(_text(left - 6, top - 8, "after task", "p-q p-e"))
    for index, position in enumerate(shown):
        if index % every == 0 or position == shown[-1]:
            middle = place[position] + side / 2
            drawn.append(_text(left + middle, top - 8, str(position), "p-t p-m"))
            drawn.append(_text(left - 8, top + middle + 4, str(position), "p-t p-e"))
    for after in shown:
        for position in (each for each in shown if each <= after):
            x, y = left + place[position], top + place[after]
            drawn.append(_cell(x, y, side, after, position, cells.get((after, position))))
    bottom = top + len(shown) * side + 16
    drawn += _scale(left, bottom)
    dots = any(cell.source is not Source.EVALUATED for cell in cells.values())
    if dots:
        drawn.append(_text(left, bottom + 20, "dot: images held out when learned", "p-q"))
    newest = (
        [cells[shown[-1], each] for each in shown if (shown[-1], each) in cells] if shown else []
    )
    seen = ", ".join(percent(cell.accuracy) for cell in newest) or "nothing yet"
    return Picture(
        "accuracy",
        "Accuracy of every task after every task",
        f"{len(shown)} tasks; after the last one: {seen}. The table has all of it.",
        WIDTH,
        round(bottom + (28 if dots else 8)),
        "".join(drawn),
    )


def _cell(x: float, y: float, side: float, after: int, position: int, cell: Cell | None) -> str:
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{side - 2:.1f}" height="{side - 2:.1f}"'
    if cell is None:
        return f'<rect {box} rx="2" class="p-none"/>' if side >= 8 else ""
    step = min(_STEPS - 1, int(cell.accuracy * _STEPS))
    said = (
        f"task {position} after task {after}: {percent(cell.accuracy)} of {cell.images} images; "
        f"{cell.source.value}, version {cell.version}"
    )
    drawn = f'<rect {box} rx="2" class="p-h{step}"><title>{escape(said)}</title></rect>'
    if side >= 20:
        number = f"{100 * cell.accuracy:.0f}"
        size = "" if side >= 26 else " p-s"
        drawn += _text(x + side / 2, y + side / 2 + 4, number, f"p-t p-m{size} p-c{step}")
    if cell.source is not Source.EVALUATED and side >= 12:
        drawn += f'<circle cx="{x + side - 5:.1f}" cy="{y + 5:.1f}" r="1.8" class="p-c{step}"/>'
    return drawn


def _scale(left: float, top: float) -> list[str]:
    drawn = [
        f'<rect x="{left + 7 * step}" y="{top - 8}" width="7" height="8" class="p-h{step}"/>'
        for step in range(_STEPS)
    ]
    drawn.append(_text(left - 6, top, "0", "p-q p-e"))
    drawn.append(_text(left + 7 * _STEPS + 5, top, "100", "p-q"))
    return drawn


def forgetting(fared: Sequence[Fared]) -> Picture:
    """Draw a bar for each task: the accuracy that it has lost since it was best.

    Args:
        fared: What became of each task, oldest first. Where there are too many, those that lost
            most are shown.
    """
    known = [(each, each.lost) for each in fared if each.lost is not None]
    worst = sorted(known, key=lambda pair: -pair[1])[:MOST_BARS]
    shown = sorted(worst, key=lambda pair: pair[0].lesson.position)
    most = max([0.05, *(abs(lost) for _, lost in shown)])
    gains = any(lost < 0 for _, lost in shown)
    left, right, row = 128, 44, 20
    zero = left + (WIDTH - left - right) * (0.5 if gains else 0.0)
    room = WIDTH - right - zero
    drawn = [_text(zero, 10, "percentage points lost", "p-q" + (" p-m" if gains else ""))]
    for index, (each, lost) in enumerate(shown):
        y = 18 + index * row
        length = room * abs(lost) / most
        x = zero - length if lost < 0 else zero
        drawn.append(_text(left - 6, y + 13, _short(_named(each.lesson), 19), "p-t p-e"))
        kind = "p-gain" if lost < 0 else "p-loss"
        drawn.append(
            f'<rect x="{x:.1f}" y="{y + 3}" width="{max(length, 1):.1f}" height="13" rx="1.5" '
            f'class="{kind}"><title>{escape(_lost(each, lost))}</title></rect>'
        )
        drawn.append(_text(WIDTH, y + 13, points(lost), "p-t p-e"))
    bottom = 18 + len(shown) * row
    drawn.append(_line(zero, 16, zero, bottom, "p-axis"))
    said = "; ".join(f"task {e.lesson.position} {points(lost)}" for e, lost in shown)
    return Picture(
        "forgetting",
        "Forgetting: best accuracy before, less the newest",
        f"Percentage points lost: {said or 'not known yet'}.",
        WIDTH,
        bottom + 6,
        "".join(drawn),
    )


def _lost(each: Fared, lost: float) -> str:
    assert each.best is not None, "what is lost was there"
    assert each.now is not None, "and something is left"
    return (
        f"task {each.lesson.position}: {percent(each.best.accuracy)} at version "
        f"{each.best.version}, {percent(each.now.accuracy)} at version {each.now.version}"
    )


def capacity(lessons: Sequence[Lesson]) -> Picture:
    """Draw the free share of every layer's dimensions, over tasks.

    Args:
        lessons: The tasks, oldest first.
    """
    shown = [lesson for lesson in lessons if lesson.report.layers]
    left, top, right, height = 34, 8, 84, 150
    across = _spread(left, WIDTH - right, len(shown))

    def down(share: float) -> float:
        return top + (1 - share) * height

    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawn.append(_line(left, down(share), WIDTH - right, down(share), "p-axis"))
        drawn.append(_text(left - 5, down(share) + 4, f"{100 * share:.0f}%", "p-q p-e"))
    layers = max((len(lesson.free) for lesson in shown), default=0)
    for layer in range(layers):
        line = [
            (x, down(lesson.free[layer]))
            for x, lesson in zip(across, shown, strict=True)
            if layer < len(lesson.free)
        ]
        drawn.append(_polyline(line, "p-thin"))
    means = [(x, down(lesson.report.capacity)) for x, lesson in zip(across, shown, strict=True)]
    least = [(x, down(min(lesson.free))) for x, lesson in zip(across, shown, strict=True)]
    drawn += _two_lines(means, least)
    said = "no task with layers was learned yet"
    if shown:
        mean, low = shown[-1].report.capacity, min(shown[-1].free)
        ends = _apart([means[-1][1], least[-1][1]])
        x = across[-1] + 8
        drawn.append(_text(x, ends[0] + 4, f"all {percent(mean)}", "p-tmark"))
        drawn.append(_text(x, ends[1] + 4, f"least {percent(low)}", "p-tother"))
        said = (
            f"after task {shown[-1].position} {percent(mean)} of all dimensions are free, "
            f"{percent(low)} of those of the layer with the least"
        )
    drawn += _positions(across, [lesson.position for lesson in shown], top + height + 14)
    drawn.append(_text((left + WIDTH - right) / 2, top + height + 28, "after task", "p-q p-m"))
    return Picture(
        "capacity",
        "Capacity: free dimensions of each layer",
        f"{layers} layers; {said}.",
        WIDTH,
        top + height + 34,
        "".join(drawn),
    )


def interference(lessons: Sequence[Lesson]) -> Picture:
    """Draw leak and interference of every task but the first, on a logarithmic scale.

    Args:
        lessons: The tasks, oldest first. The first had nothing to disturb.
    """
    shown = [each for each in lessons if each.report.layers and each.position > 1]
    left, top, right, height, decades = 40, 8, 96, 150, 8
    across = _spread(left, WIDTH - right, len(shown))

    def down(value: float) -> float:
        return top + height * min(-math.log10(max(value, 10.0**-decades)), decades) / decades

    drawn = []
    for power in range(0, decades + 1, 2):
        y = down(10.0**-power)
        drawn.append(_line(left, y, WIDTH - right, y, "p-axis"))
        least = "\N{LESS-THAN OR EQUAL TO}" if power == decades else ""
        drawn.append(_text(left - 5, y + 4, f"{least}1e-{power}" if power else "1", "p-q p-e"))
    high = [(x, down(each.report.interference)) for x, each in zip(across, shown, strict=True)]
    low = [(x, down(each.report.leak)) for x, each in zip(across, shown, strict=True)]
    drawn += _two_lines(high, low)
    said = "there is no second task yet"
    if shown:
        last = shown[-1].report
        ends = _apart([high[-1][1], low[-1][1]])
        x = across[-1] + 8
        drawn.append(_text(x, ends[0] - 3, "interference", "p-tmark"))
        drawn.append(_text(x, ends[0] + 10, f"{last.interference:.2f}", "p-tmark"))
        drawn.append(_text(x, ends[1] - 3, "leak", "p-tother"))
        drawn.append(_text(x, ends[1] + 10, f"{last.leak:.0e}", "p-tother"))
        said = (
            f"of task {shown[-1].position} interference is {last.interference:.2f} and leak "
            f"{last.leak:.0e}, each of the layer with the most"
        )
    drawn += _positions(across, [lesson.position for lesson in shown], top + height + 14)
    drawn.append(_text((left + WIDTH - right) / 2, top + height + 28, "task", "p-q p-m"))
    return Picture(
        "interference",
        "Leak and interference of every task",
        f"On a logarithmic scale: {said}.",
        WIDTH,
        top + height + 34,
        "".join(drawn),
    )


def lineage(nodes: Sequence[Node]) -> Picture:
    """Draw which version came of which.

    Args:
        nodes: All versions, oldest first; the newest are shown.
    """
    shown = nodes[-MOST_VERSIONS:]
    lanes = _lanes(shown)
    step, top, row = 34, 22, 34
    place = {
        node.step.number: (20 + index * step, top + lanes[node.step.number] * row)
        for index, node in enumerate(shown)
    }
    drawn = []
    for node in shown:
        x, y = place[node.step.number]
        parent = place.get(node.step.parent or 0)
        if parent is not None:
            half = (parent[0] + x) / 2
            drawn.append(
                f'<path d="M{parent[0]} {parent[1]} C{half:.0f} {parent[1]} {half:.0f} {y} {x} {y}"'
                ' class="p-edge"/>'
            )
    drawn += [_node(node, *place[node.step.number]) for node in shown]
    answering = next((node.step.number for node in nodes if node.answering), None)
    more = len(nodes) - len(shown)
    return Picture(
        "lineage",
        "Which version came of which",
        f"{len(nodes)} versions"
        + (f", of which the newest {len(shown)} are drawn" if more else "")
        + (f"; version {answering} answers." if answering else "; none answers."),
        40 + step * max(0, len(shown) - 1),
        top * 2 + row * max(lanes.values(), default=0),
        "".join(drawn),
    )


def _lanes(nodes: Sequence[Node]) -> dict[int, int]:
    """Return the row of each version: what came of the first child of each stays in its own."""
    steps = {node.step.number: node.step for node in nodes}
    line = set()
    following = next((node.step.number for node in nodes if node.answering), None)
    while following in steps:
        line.add(following)
        following = steps[following].parent
    lanes: dict[int, int] = {}
    ends: dict[int, int] = {}
    for number, step in steps.items():
        if number in line:
            lane = 0
        elif (
            step.parent is not None
            and ends.get(lanes.get(step.parent, 0)) == step.parent
            and (lanes.get(step.parent, 0) != 0 or not line)
        ):
            lane = lanes[step.parent]
        else:
            lane = next(n for n in range(1, len(steps) + 2) if n not in ends)
        lanes[number], ends[lane] = lane, number
    return lanes


def _node(node: Node, x: float, y: float) -> str:
    kinds = ["p-node"]
    if node.gone:
        kinds.append("p-gone")
    if node.step.candidate:
        kinds.append("p-held")
    if node.answering:
        kinds.append("p-now")
    kind = " ".join(kinds)
    said = f"version {node.step.number}" + (f", {node.status}" if node.status else "")
    said += ", pinned" if node.pinned else ""
    said += "" if node.step.report is not None else "; only the class table changed"
    if node.step.report is not None:
        shape = f'<circle cx="{x}" cy="{y}" r="11" class="{kind}">'
        end = "</circle>"
    else:
        shape = f'<path d="M{x} {y - 12} l12 12 l-12 12 l-12 -12 z" class="{kind}">'
        end = "</path>"
    number = _text(x, y + 3.5, str(node.step.number), "p-on" if node.answering else "p-in")
    pin = f'<circle cx="{x + 10}" cy="{y - 10}" r="3" class="p-odot"/>' if node.pinned else ""
    return f"{shape}<title>{escape(said)}</title>{end}{number}{pin}"


def latency(moments: Sequence[Moment], seconds: float) -> Picture:
    """Draw calls a second and how long they took, over the last minutes.

    Args:
        moments: What was seen, oldest first; ``ago`` of each is at most ``seconds``.
        seconds: How far back the picture goes.
    """
    left, right, top, height, gap = 44, 68, 16, 46, 30

    def across(ago: float) -> float:
        return left + (WIDTH - left - right) * (1 - ago / seconds)

    drawn = []
    busiest = _nice(max([1.0, *(each.calls for each in moments)]))
    base = top + height
    calls = [(across(e.ago), base - height * e.calls / busiest) for e in moments]
    drawn.append(_text(left, top - 6, "predictions a second", "p-q"))
    drawn += _frame(left, WIDTH - right, top, base, f"{busiest:g}")
    if calls:
        area = [(calls[0][0], base), *calls, (calls[-1][0], base)]
        drawn.append(f'<polygon points="{_points(area)}" class="p-area"/>')
        drawn.append(_polyline(calls, "p-mark"))
        drawn.append(
            _text(calls[-1][0] + 6, calls[-1][1] + 4, f"{moments[-1].calls:.1f}", "p-tmark")
        )
    low = base + gap
    floor = low + height
    timed = [each for each in moments if each.p99 is not None]
    slowest = _nice(max([1.0, *(1000 * (each.p99 or 0.0) for each in timed)]))
    drawn.append(_text(left, low - 6, "milliseconds: half, and 99 of 100, took at most", "p-q"))
    drawn += _frame(left, WIDTH - right, low, floor, f"{slowest:g}")
    ends = []
    for kind, which in (("mark", "p50"), ("other", "p99")):
        line = [
            (across(each.ago), floor - height * 1000 * (getattr(each, which) or 0.0) / slowest)
            for each in timed
        ]
        drawn.append(_polyline(line, f"p-{kind}"))
        ends += line[-1:]
    if timed and timed[-1] is moments[-1]:
        first, second = _apart([y for _, y in ends])
        drawn.append(
            _text(ends[0][0] + 6, first + 4, f"p50 {_milliseconds(timed[-1].p50)}", "p-tmark")
        )
        drawn.append(
            _text(ends[0][0] + 6, second + 4, f"p99 {_milliseconds(timed[-1].p99)}", "p-tother")
        )
    drawn.append(_text(left, floor + 14, f"{seconds / 60:g} minutes ago", "p-q"))
    drawn.append(_text(WIDTH - right, floor + 14, "now", "p-q p-e"))
    said = "nothing was asked"
    if moments:
        last = moments[-1]
        said = f"{last.calls:.1f} predictions a second"
        if last.p50 is not None and last.p99 is not None:
            half, most = _milliseconds(last.p50), _milliseconds(last.p99)
            said += f", half within {half} ms, 99% within {most} ms"
    return Picture("latency", "Load and latency", f"{said}.", WIDTH, floor + 20, "".join(drawn))


# -- what they are made of ------------------------------------------------------------------------


def _named(lesson: Lesson) -> str:
    return f"{lesson.position} {lesson.title}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def points(share: float) -> str:
    """Return what was lost in percentage points, and no sign before what is none."""
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def percent(share: float, digits: int = 0) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.{digits}f}%"


def _milliseconds(seconds: float | None) -> str:
    milliseconds = 1000 * (seconds or 0.0)
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"


def _nice(most: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... that is no less."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= most * 0.999)


def _spread(left: float, right: float, count: int) -> list[float]:
    if count == 1:
        return [(left + right) / 2]
    inner = (right - left - 12) / max(1, count - 1)
    return [left + 6 + index * inner for index in range(count)]


def _positions(across: Sequence[float], positions: Sequence[int], y: float) -> list[str]:
    every = max(1, math.ceil(len(positions) / 10))
    return [
        _text(x, y, str(position), "p-t p-m")
        for index, (x, position) in enumerate(zip(across, positions, strict=True))
        if index % every == 0
    ]


def _apart(heights: Sequence[float], room: float = 14.0) -> tuple[float, float]:
    """Return where two texts go that belong to these heights, and must not touch."""
    first, second = heights
    if abs(first - second) >= room:
        return first, second
    middle = (first + second) / 2
    up, down = middle - room / 2, middle + room / 2
    return (up, down) if first <= second else (down, up)


def _frame(left: float, right: float, top: float, bottom: float, most: str) -> list[str]:
    return [
        _line(left, top, right, top, "p-axis"),
        _line(left, bottom, right, bottom, "p-axis"),
        _text(left - 5, top + 4, most, "p-q p-e"),
        _text(left - 5, bottom + 4, "0", "p-q p-e"),
    ]


def _text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" class="{kind}"/>'


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline points="{_points(points)}" class="{kind}"/>' if len(points) > 1 else ""


def _two_lines(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> list[str]:
    """Draw two lines over tasks, told apart without colours."""
    return [
        *(_polyline(first, "p-mark"), *_dots(first, "p-dot")),
        *(_polyline(second, "p-other"), *_squares(second, "p-odot")),
    ]


def _dots(points: Iterable[tuple[float, float]], kind: str) -> list[str]:
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="{kind}"/>' for x, y in points]


def _squares(points: Iterable[tuple[float, float]], kind: str) -> list[str]:
    return [
        f'<rect x="{x - 2.5:.1f}" y="{y - 2.5:.1f}" width="5" height="5" class="{kind}"/>'
        for x, y in points
    ]
