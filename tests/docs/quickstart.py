"""Follows the quickstart word by word on an empty machine, and measures how long that takes.

    python -m tests.docs.quickstart FOLDER

A machine is empty here when it has ``python3``, ``make`` and ``git``, an empty home and an empty
folder, and nothing of this checkout. The page's words are run as they stand; ``git`` is told to
clone this checkout in place of the address that the page names, and the server listens on a free
port (``shell.sh``). What the page shows as printed has to be printed; what it promises is in
``PROMISES``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.benchmarks.checkout import ROOT
from tests.docs import pages
from tests.docs.sandbox import Sandbox

PAGE = "docs/quickstart.md"
ADDRESS = "https://git.example/inflora-server.git"
CLONE = "inflora-server"

_KEPT = re.compile(r"(PIP|UV|SSL|HTTPS?|NO|ALL)_.*|(https?|no)_proxy|LANG|TMPDIR")
"""Variables by which a machine reaches its package registry."""


def _knows(labels: range) -> Callable[[str, Path], bool]:
    """Return whether at most one of the digits ``labels`` is named wrong."""

    def check(printed: str, _: Path) -> bool:
        named = re.findall(r"digit (\d)/000\.png\W+(?:\d+\W+)?digit (\d)", printed)
        right = {int(true) for true, answer in named if true == answer}
        return len(right & set(labels)) >= len(labels) - 1

    return check


def _newer(printed: str) -> bool:
    """Whether the digits that were not taught are newer to it than those that were."""
    found = re.findall(r"^digit (\d): .*novelty (\d\.\d+)$", printed, re.MULTILINE)
    known, new = (
        [float(x) for digit, x in found if (int(digit) < 5) is side] for side in (True, False)
    )
    return len(known) == len(new) == 5 and median(new) > median(known)


PROMISES: dict[str, Callable[[str, Path], bool]] = {
    "inflora predict digits/test/*/000.png": _knows(range(5)),
    "inflora predict digits/test/*/000.png --top-k 2": _knows(range(10)),
    "from pathlib import Path": lambda printed, _: _newer(printed),
    "inflora versions": lambda printed, _: bool(re.search(r"\b2\b.*current", printed)),
    "inflora export --output digits.onnx": lambda _, folder: (folder / "digits.onnx").is_file(),
    "import json": lambda printed, _: printed.strip() == "digit 7",
}
"""What has to hold after a command, or after a block of Python that begins so."""


def follow(folder: Path) -> dict[str, float | int]:
    """Follow the page in ``folder``, which is empty; ``transcript.txt`` there has what it printed.

    Raises:
        BlockFailedError: a command failed, or did not print what the page says.
        RuntimeError: what the page promises does not hold.
    """
    for name in ("home", "page", "own"):
        (folder / name).mkdir(parents=True)
    blocks = [block for block in pages.blocks_of(PAGE) if block.kind == "run"]
    machine = Sandbox(folder / "page", folder / "own", _environment(folder / "home"))
    kept: set[str] = set()
    ran, begun = 0, time.monotonic()
    try:
        for block in blocks:
            printed = machine.run(block)
            commands = [command for command, _ in block.commands()]
            for command, said in zip(commands, printed, strict=True):
                ran += 1
                print(f"{time.monotonic() - begun:6.1f} s  {command.splitlines()[0]}", flush=True)
                with (folder / "transcript.txt").open("a") as transcript:
                    transcript.write(f"$ {command}\n{said}\n")
                first = command.split("  ")[0].splitlines()[0].strip()
                if first in PROMISES:
                    kept.add(first)
                    if not PROMISES[first](said, folder / "page" / CLONE):
                        raise RuntimeError(f"{block.where}: {command}\nprinted:\n{said}")
        minutes = (time.monotonic() - begun) / 60
    finally:
        machine.stop()
    if missing := PROMISES.keys() - kept:
        raise RuntimeError(f"{PAGE} no longer says: {', '.join(sorted(missing))}")
    return {"quickstart_commands": ran, "quickstart_minutes": round(minutes, 2)}


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    programs = [str(Path(sys.base_prefix) / "bin"), "/usr/local/bin", "/usr/bin", "/bin"]
    return {
        **kept,
        "HOME": str(home),
        "PATH": os.pathsep.join(programs),
        "COLUMNS": "120",
        "TERM": "dumb",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }


def main() -> None:
    """Follow the page, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(json.dumps(follow(parser.parse_args().folder.resolve())))


if __name__ == "__main__":
    main()
