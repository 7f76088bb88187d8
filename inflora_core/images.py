"""From encoded bytes to pixels, for input that nobody has checked. Pillow reads the files.

Pillow reads a file's header first and its pixels on demand; what is refused for its size, mode
or frames is refused in between, so a 20000 x 20000 image costs as little as any other.

JPEG and WebP hold no checksums: damage that still decodes cannot be told from a picture.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from functools import partial
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from inflora_core.config import Limits
from inflora_core.errors import InvalidImageError, LimitExceededError
from inflora_core.model import Preprocessing

# Pillow warns about metadata (an EXIF tag that points outside its block, a malformed picture
# index), once per tag number and size: one hostile file could write tens of thousands of lines to
# the log, and Python would remember each for ever. Set once, at import: `catch_warnings` around
# each call swaps a list that all threads share before Python 3.14, and decoding runs in pools.
warnings.filterwarnings("ignore", module=r"PIL\.")

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""What Pillow may read; it finds multi-picture photos (MPO) by way of JPEG."""
_FOREIGN = ("GIF", "TIFF", "AVIF", "ICO", "JPEG2000", "PSD")
"""What users do send besides, so that the refusal can name it."""

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_REACHES = {"bicubic": 2, "bilinear": 1}
"""Pixels to both sides that each of these filters weighs."""

_SPARE = 8
"""Most pixels of a side that are made though nobody wants them."""
_LARGEST_PART = 1 << 24
"""Pixels of the largest part that is cut out of an image: a copy of it, 64 MiB."""

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_EXIF = b"Exif\0\0"

_MAX_SCANS = 500
"""Of a progressive JPEG (usual: about 10). A scan is a few bytes, and a pass over all pixels: 20 MB
of them would hold a thread for hours."""


def decode(data: bytes, limits: Limits, *, field: str = "image") -> NDArray[np.uint8]:
    """Decode one JPEG, PNG, WebP or BMP image to RGB, as ``picture`` does.

    Returns:
        (height, width, 3) uint8, contiguous, writable, sRGB as stored.
    """
    return np.array(picture(data, limits, field=field))


def picture(data: bytes, limits: Limits, *, field: str = "image") -> Image.Image:
    """Decode one JPEG, PNG, WebP or BMP image to RGB.

    The image is turned upright as its EXIF orientation says; of a multi-picture photo the first
    picture counts. Grey and palette images become RGB; transparency is composited on white.
    Colour profiles are not applied.

    Safe to call from several threads.

    Args:
        data: The encoded file.
        limits: ``image_bytes`` and the other ``image_`` limits are looked at.
        field: What errors name, as a path into the request.

    Returns:
        Of mode RGB, its pixels in memory, sRGB as stored.

    Raises:
        LimitExceededError: if the encoded file is larger than ``limits.image_bytes``.
        InvalidImageError: if it is empty, not an image, of another format, animated, CMYK or
            deeper than 8 bits a channel, too small, narrow or large, truncated or damaged.
    """
    if len(data) > limits.image_bytes:
        raise LimitExceededError(
            f"the encoded image has {len(data)} bytes; at most {limits.image_bytes} are accepted: "
            "send it smaller or compressed",
            field=field,
        )
    try:
        with _open(data) as image:
            # With nothing read but the header: what is refused must not be decoded.
            check_sides(*image.size, limits)
            _check_kind(image, data)
            if image.format == "PNG":
                # Loading skips the checksums of image data: a flipped bit would be learned.
                with _open(data) as again:
                    again.verify()
            image.load()
            with suppress(Exception):
                # Damaged EXIF is no reason to refuse a complete picture. The pixels are turned
                # before the block is written anew, so they are whole where either fails.
                ImageOps.exif_transpose(image, in_place=True)
            return _on_white(image, data)
    except InvalidImageError as error:
        error.field = field
        raise
    except UnidentifiedImageError as error:
        raise InvalidImageError(_unknown(data), field=field) from error
    except Image.DecompressionBombError as error:
        # Pillow's own limit, left in place: it is checked before memory is set aside for a WebP.
        # `Limits` does not go beyond it.
        raise InvalidImageError(
            f"the image has more than {limits.image_pixels} pixels, the most that are accepted: "
            "scale it down",
            field=field,
        ) from error
    except Exception as error:
        # Hostile files make Pillow raise OSError, SyntaxError, ValueError, EOFError, IndexError,
        # struct.error, zlib.error, OverflowError and more, by design or by oversight.
        reason = str(error)[:200] or type(error).__name__
        raise InvalidImageError(
            f"the image is damaged or truncated ({reason}): send it again, whole", field=field
        ) from error


def resized(image: Image.Image | NDArray[np.uint8], to: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop one image as timm's evaluation transform does, without torch.

    What the crop would take away is not made, as a rule. Pillow takes the part of an image that is
    asked for in single precision, so of 3,000 values of a photo, one is another than timm's, mostly
    by a grey level (of bilinear sums more, since many end at a half); where nothing is cropped, and
    where nothing is resized, all are the same.

    Args:
        image: Of mode RGB, or (h, w, 3) uint8 RGB.
        to: Says how.

    Returns:
        (height, width, 3) uint8: the very pixels that ``Backbone.resize`` makes, and learning uses.
    """
    whole = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    sides, target = _resized_sides(*whole.size, to), (to.width, to.height)
    # torchvision's center_crop: half to even.
    corner = [round((side - wanted) / 2) for side, wanted in zip(sides, target, strict=True)]
    reach, kind = _REACHES[to.interpolation], _FILTERS[to.interpolation]
    x, y = map(partial(_span, reach=reach), corner, target, sides, whole.size)
    size, part = (x.made, y.made), (x.end - x.begin, y.end - y.begin)
    if (
        sides == whole.size  # Pillow copies it
        or math.prod(part) > _LARGEST_PART
        or _is_taller(whole.size, sides) != _is_taller(part, size)
    ):
        (left, top), scaled = corner, whole.resize(sides, kind)
    else:
        if part != whole.size:
            whole = whole.crop((x.begin, y.begin, x.end, y.end))
        left = top = 0
        scaled = whole.resize(size, kind, (x.start, y.start, x.stop, y.stop))
    return np.asarray(scaled)[top : top + to.height, left : left + to.width]


class _Span(NamedTuple):
    """What is made of a side, and what of.

    Attributes:
        begin: The first pixel of the image that is needed.
        end: The one after the last.
        start: Where, from ``begin``, the first pixel of the result begins.
        stop: Where the last one ends.
        made: Pixels that are made: those wanted, and some more.
    """

    begin: int
    end: int
    start: float
    stop: float
    made: int


def _span(first: int, wanted: int, scaled: int, whole: int, *, reach: int) -> _Span:
    """Return what is to be made of a side of ``whole`` pixels that would have ``scaled``.

    With ``stop`` a hundred-thousandth of a pixel off, as single precision has it, up to one value
    in a hundred is rounded otherwise. So of some ends the one is taken that it comes closest to.

    Args:
        first: The first pixel wanted.
        wanted: So many.
        scaled: Pixels that all of it would have.
        whole: Pixels that it has.
        reach: How far the filter reaches, in pixels of whichever has the larger ones.
    """
    scale = whole / scaled
    around = reach * max(scale, 1.0) + 1
    begin = max(0, math.floor(first * scale - around))
    start = first * scale - begin
    numbers = np.arange(wanted, min(scaled - first, wanted + _SPARE) + 1)
    stops = (first + numbers) * scale - begin
    single = np.float32(start)
    lengths = (stops.astype(np.float32) - single).astype(np.float64)
    best = int(np.argmin(np.abs(single + lengths - stops)))
    made = int(numbers[best])
    end = min(whole, math.ceil((first + made) * scale + around))
    return _Span(begin, end, start, float(stops[best]), made)


def _is_taller(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes columns first, and so rounds otherwise between the passes.

    It asks how many rows and columns go of the image that it is given, whatever the box. Of most
    images that are twice as tall as wide, or taller, they do in the whole and not in the part.
    """
    (width, height), (to_width, to_height) = before, after
    return height - to_height > max(0, 2 * (width - to_width))


def _resized_sides(width: int, height: int, to: Preprocessing) -> tuple[int, int]:
    """Return the width and height before the crop."""
    if to.crop_mode == "squash":
        return to.resize_width, to.resize_height
    if to.resize_height == to.resize_width:  # torchvision's Resize of one number
        shorter = min(width, height)
        return to.resize_width * width // shorter, to.resize_height * height // shorter
    # timm's ResizeKeepRatio
    ratio = min(width / to.resize_width, height / to.resize_height)
    return round(width / ratio), round(height / ratio)


def _open(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        # Pillow gives up a JPEG file whose EXIF resolution is text: it looks at it while opening.
        # Without its marker the block is skipped.
        if _EXIF not in data:
            raise
        return Image.open(BytesIO(data.replace(_EXIF, bytes(len(_EXIF)))), formats=_FORMATS)


def _unknown(data: bytes) -> str:
    """Return why Pillow could not open ``data``.

    Other formats are told by their first bytes. Their readers are not run: with each of them,
    hostile input would reach more code.
    """
    if not data:
        return "the image is empty (0 bytes)"
    Image.init()  # registers all formats
    for name in _FOREIGN:
        _, accept = Image.OPEN.get(name, (None, None))
        if accept is not None and accept(data[:16]):
            return f"{name} images are not accepted: send JPEG, PNG, WebP or BMP"
    return "the data is no readable image, or its header is damaged: send JPEG, PNG, WebP or BMP"


def check_sides(width: int, height: int, limits: Limits, *, field: str = "") -> None:
    """Refuse an image for its size.

    Args:
        width: In pixels.
        height: Likewise.
        limits: Those called ``image_``.
        field: What errors name.

    Raises:
        InvalidImageError: it is too small, narrow or large.
    """
    shorter, longer = sorted((width, height))
    size = f"the image is {width} x {height} pixels"
    if width * height > limits.image_pixels:
        raise InvalidImageError(
            f"{size}; at most {limits.image_pixels} pixels in all are accepted: scale it down",
            field=field,
        )
    if shorter < limits.image_side_min:
        raise InvalidImageError(
            f"{size}; its shorter side must have at least {limits.image_side_min}", field=field
        )
    if longer > limits.image_aspect * shorter:
        raise InvalidImageError(
            f"{size}; its longer side may be at most {limits.image_aspect} times its shorter: "
            "crop it",
            field=field,
        )


def _check_kind(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse what Pillow would decode, but to something else than one picture of 8 bits."""
    if image.mode == "CMYK":
        raise InvalidImageError("CMYK images are not accepted: convert to RGB first")
    # Byte 24 is the depth in the header of a PNG file: Pillow opens 16-bit RGB as plain RGB and
    # drops the low bytes without a word.
    if image.format == "PNG" and data[24] > 8:
        raise InvalidImageError(f"the image has {data[24]} bits a channel: convert to 8-bit RGB")
    if image.mode not in _MODES:
        raise InvalidImageError(f"images of mode {image.mode} are not accepted: convert to RGB")
    # The pictures of an MPO file are views of a scene or a preview, not an animation.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise InvalidImageError("animated images are not accepted: send one frame as a still image")
    if image.info.get("progressive") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise InvalidImageError("the JPEG image has too many scans: save it anew")
    if image.format == "BMP" and image.info["compression"] in (1, 2):
        # Pillow unpacks run lengths byte by byte in Python: 32 KB keep it busy for 15 seconds.
        raise InvalidImageError("compressed BMP images are not accepted: send PNG or plain BMP")


def _on_white(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Return ``image`` as RGB, what is transparent in front of white."""
    level = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(level, int):
        # Pillow scales the greys of a 2 or 4-bit file to 255, but not the one that is transparent:
        # a background of level 1 would come out nearly black.
        image.info["transparency"] = level * (255 // (2 ** data[24] - 1))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
