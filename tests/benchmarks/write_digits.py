"""The handwritten digits as folders of images, to try things out without photos: ``make digits``.

    python -m tests.benchmarks.write_digits digits

writes some of each digit's images to ``digits/learn/digit N``, and others to ``digits/test``. Not
all of them: a first look should not take long.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.data import split_by_class

LEARN, TEST = 60, 30
"""Images of each digit."""


def write(folder: Path) -> None:
    """Write the images as PNG files, the same whenever it is called."""
    for label, sides in split_by_class("digits", seed=0).items():
        for side, count, images in zip(("learn", "test"), (LEARN, TEST), sides, strict=True):
            where = folder / side / label
            where.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images[:count]):
                (where / f"{number:03}.png").write_bytes(image)


def main() -> None:
    """Write them, and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(folder)
    print(f"{folder}/learn and {folder}/test: ten folders of images each")


if __name__ == "__main__":
    main()
