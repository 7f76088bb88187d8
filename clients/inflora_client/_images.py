"""What callers may pass as an image, and how it becomes bytes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import NamedTuple, Protocol


class Readable(Protocol):
    """What gives its bytes when they are needed: ``zipfile.Path``, or a member of an archive."""

    def read_bytes(self) -> bytes:
        """Return the encoded bytes of an image."""


ImageSource = bytes | str | os.PathLike[str] | Readable
"""An encoded image file (JPEG, PNG, WebP or BMP), the path of one, or what reads as one."""


class Example(NamedTuple):
    """A labelled image; a plain ``(image, label)`` tuple does as well.

    Attributes:
        image: Encoded bytes, or where they are, which is read only when its turn to be sent comes.
        label: The class, 1 to 200 printable characters. Sent in Unicode normal form NFC.
    """

    image: ImageSource
    label: str


def read_image(source: ImageSource) -> bytes:
    """Return the encoded bytes of an image.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return source.read_bytes()


async def read_image_async(source: ImageSource) -> bytes:
    """As ``read_image``, off the event loop, since a disk may be slow."""
    return source if isinstance(source, bytes) else await asyncio.to_thread(read_image, source)
