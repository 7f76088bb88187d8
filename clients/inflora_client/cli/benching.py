"""``inflora bench``: loads, one after the other, and how they end."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from inflora_client import _bench as bench
from inflora_client._calls import Question
from inflora_client.cli.progress import progress_bar
from inflora_client.cli.session import (
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    Session,
    fail,
    note,
    of_file,
)

_SIDES = (640, 480)
"""Pixels of the image that is made where none is given."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What ``inflora bench`` found.

    Attributes:
        server: Address of the server.
        images: Different images that were sent.
        image_bytes: Size of all of them.
        batch: Images of each call.
        deadline: Seconds that each call had.
        warm_up: Seconds of each load before it counted.
        loads: One after the other.
    """

    server: str
    images: int
    image_bytes: int
    batch: int
    deadline: float
    warm_up: float
    loads: list[bench.LoadReport]


def loads_of(
    concurrency: str | None, rate: Sequence[float], constant: bool, seed: int
) -> list[bench.Closed] | list[bench.Open]:
    """Return the loads that were asked for; end the command if they make no sense."""
    if rate:
        if concurrency is not None:
            fail(
                "--concurrency is for a closed loop and --rate for an open one: give one",
                EXIT_USAGE,
            )
        wrong = [each for each in rate if not 0 < each <= bench.MAX_RATE]
        if wrong:
            fail(f"--rate is {wrong[0]:g}, but above 0 and at most {bench.MAX_RATE:g}", EXIT_USAGE)
        return [bench.Open(each, not constant, seed) for each in rate]
    if constant:
        fail("--constant is for an open loop: give --rate, too", EXIT_USAGE)
    clients = []
    for word in (concurrency or "1").split(","):
        if not word.strip().isdecimal() or not 1 <= int(word) <= bench.MAX_CONCURRENCY:
            fail(
                f"--concurrency has {word.strip()!r}, but takes whole numbers from 1 to "
                f"{bench.MAX_CONCURRENCY} with commas between",
                EXIT_USAGE,
            )
        clients.append(bench.Closed(int(word)))
    return clients


def images_of(paths: Sequence[Path]) -> list[bytes]:
    """Read image files, or make an image if there is none; end the command if one is unreadable."""
    if not paths:
        return [_made_image()]
    try:
        return [path.read_bytes() for path in paths]
    except OSError as error:
        fail(of_file(error), EXIT_USAGE)


def _made_image() -> bytes:
    """Return a JPEG that costs about what a photo does: soft shapes, and some noise."""
    # Only this command needs Pillow: others start sooner without it.
    from PIL import Image

    plasma = Image.merge(
        "RGB",
        [
            Image.radial_gradient("L").resize(_SIDES),
            Image.linear_gradient("L").resize(_SIDES),
            Image.linear_gradient("L").rotate(90).resize(_SIDES),
        ],
    )
    grains = random.Random(0).randbytes(_SIDES[0] * _SIDES[1])
    noise = Image.frombytes("L", _SIDES, grains).convert("RGB")
    file = io.BytesIO()
    Image.blend(plasma, noise, 0.1).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(
    session: Session,
    question: Question,
    images: Sequence[bytes],
    batch: int,
    loads: Sequence[bench.Closed | bench.Open],
    bounds: bench.Bounds,
) -> BenchReport:
    """Put loads on the server, and report; Ctrl-C ends the command."""

    async def all_loads() -> list[bench.LoadReport]:
        reports = []
        with progress_bar() as bar:
            async with bench.PredictCalls(
                session.server, question, images, batch, session.access
            ) as call:
                for number, load in enumerate(loads):
                    bar(f"load {number + 1}/{len(loads)}", number / len(loads))
                    tally = await bench.drive(call, load, bounds)
                    reports.append(bench.report(load, tally, batch))
        return reports

    try:
        found = asyncio.run(all_loads())
    except KeyboardInterrupt:
        note("stopped; what was measured so far is not shown")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    size = sum(map(len, images))
    return BenchReport(
        session.server, len(images), size, batch, bounds.deadline, bounds.warm_up, found
    )


def end_unanswered(report: BenchReport) -> None:
    """End the command with an error if a load had no answer at all."""
    for load in report.loads:
        if not load.answered:
            codes = ", ".join(f"{code} ({count})" for code, count in load.errors.items())
            unreachable = set(load.errors) == {"UNAVAILABLE"}
            fail(
                f"no call was answered: {codes or 'none was due in time'}; see what "
                "'inflora predict' says of one",
                EXIT_UNREACHABLE if unreachable else EXIT_REFUSED,
            )
