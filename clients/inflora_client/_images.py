"""What callers may pass as an image, and how it becomes bytes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import NamedTuple

ImageSource = bytes | str | os.PathLike[str]
"""An encoded image file (JPEG, PNG, WebP or BMP), or the path of one."""


class Example(NamedTuple):
    """A labelled image; a plain ``(image, label)`` tuple does as well.

    Attributes:
        image: Encoded bytes, or a path, which is read only when its turn to be sent comes.
        label: The class, 1 to 200 printable characters. Sent in Unicode normal form NFC.
    """

    image: ImageSource
    label: str


def read_image(source: ImageSource) -> bytes:
    """Return the encoded bytes of an image.

    Raises:
        OSError: The file cannot be read.
    """
    return source if isinstance(source, bytes) else Path(source).read_bytes()


async def read_image_async(source: ImageSource) -> bytes:
    """As ``read_image``, off the event loop, since a disk may be slow."""
    return source if isinstance(source, bytes) else await asyncio.to_thread(read_image, source)
