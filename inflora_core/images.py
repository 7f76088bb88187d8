"""From encoded bytes to pixels, for input that nobody has checked.

Two steps. First the file's own structure is read, in plain Python: size, depth, colours, frames
and orientation, and whether the file is complete. Nothing is decoded, so a 20000 x 20000 image
costs as little as any other. Then Pillow decodes what is left of it: only the parts that make up
the pixels. It never sees EXIF, colour profiles, text or thumbnails, where its parsers would emit
warnings, unpack hidden megabytes, or take a photo for a multi-picture file.

JPEG and WebP hold no checksums: damage that still decodes cannot be told from a picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from inflora_core.config import Limits
from inflora_core.errors import InvalidImageError, LimitExceededError

MAX_ASPECT = 100
"""Longest side over shortest. Models resize the shorter side to theirs: a 2 x 60000 image of a few
hundred bytes would become 224 x 6.7 million float pixels on the way."""

_MAX_PARTS = 100_000
"""Chunks or segments of one file; 20 MB of empty ones would hold the interpreter for seconds."""

_MAX_SCANS = 100
"""Scans of one progressive JPEG (usual: about 10). Each costs a pass over all pixels, and a few
bytes in the file."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS")

_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
"""A marker that starts a segment or ends the image; not stuffing, fill, restarts, SOI."""
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_EXIF, _JPEG_SCAN, _JPEG_END = 0xE1, 0xDA, 0xD9
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""Comments and all APPn but 0 (JFIF) and 14 (Adobe), which tell RGB from YCbCr."""

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FOREIGN = (
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"II\*\x00|MM\x00\*"), "TIFF"),
    (re.compile(rb"(?s)....ftyp(?:heic|heix|mif1|msf1)"), "HEIC"),
    (re.compile(rb"(?s)....ftyp(?:avif|avis)"), "AVIF"),
    (re.compile(rb"%PDF"), "PDF"),
)
"""Formats that users do send, so that the refusal can name them."""


@dataclass(frozen=True)
class _Header:
    """What the structure of a file says, before anything is decoded.

    Attributes:
        reader: Pillow's class for the format.
        width: Pixels, as stored.
        height: Pixels, as stored.
        orientation: EXIF orientation, 1 to 8; 1 where there is none.
        pixels: The file again, complete as to its pixels, without the rest.
    """

    reader: Callable[[BytesIO], ImageFile.ImageFile]
    width: int
    height: int
    orientation: int
    pixels: bytes


def decode(data: bytes, limits: Limits, *, field: str = "image") -> NDArray[np.uint8]:
    """Decode one JPEG, PNG, WebP or BMP image to RGB.

    The image is turned upright as its EXIF orientation says. Grey and palette images become RGB;
    transparency is composited on white. Colour profiles are not applied.

    Safe to call from several threads; changes no state of Pillow or of ``warnings``.

    Args:
        data: The encoded file.
        limits: ``image_bytes``, ``image_pixels`` and ``image_side_min`` are looked at.
        field: What errors name, as a path into the request.

    Returns:
        (height, width, 3) uint8, contiguous, writable, sRGB as stored.

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
        header = _read_header(data)
        _check_size(header.width, header.height, limits)
        return _read_pixels(header)
    except InvalidImageError as error:
        raise InvalidImageError(error.message, field=field) from error.__cause__


def _read_header(data: bytes) -> _Header:
    if not data:
        raise InvalidImageError("the image is empty (0 bytes)")
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _read_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    if data.startswith(b"BM"):
        return _read_bmp(data)
    name = next((name for pattern, name in _FOREIGN if pattern.match(data)), None)
    found = f"{name} images are not accepted" if name else "the data is not an image known here"
    raise InvalidImageError(f"{found}: send JPEG, PNG, WebP or BMP")


def _check_size(width: int, height: int, limits: Limits) -> None:
    """Refuse what must not be decoded: called with nothing read but the header."""
    size = f"the image is {width} x {height} pixels"
    shorter, longer = sorted((width, height))
    if shorter < 1:
        raise _damaged(f"its header says {width} x {height} pixels")
    if width * height > limits.image_pixels:
        raise InvalidImageError(
            f"{size}; at most {limits.image_pixels} pixels in all are accepted: scale it down"
        )
    if shorter < limits.image_side_min:
        raise InvalidImageError(
            f"{size}; its shorter side must have at least {limits.image_side_min}"
        )
    if longer > MAX_ASPECT * shorter:
        raise InvalidImageError(
            f"{size}; its longer side may be at most {MAX_ASPECT} times its shorter: crop it"
        )


def _read_pixels(header: _Header) -> NDArray[np.uint8]:
    """Decode with Pillow; whatever it raises on damaged data is one error here.

    The format's class is called directly: ``Image.open`` would guess among formats, warn about
    sizes that ``limits`` allow, and take JPEG files with a preview for multi-picture files.
    """
    try:
        with header.reader(BytesIO(header.pixels)) as image:
            # What was checked must be what is decoded, however a file may contradict itself.
            if image.size != (header.width, header.height):
                raise _damaged("its parts disagree about its size")
            upright = _upright(_on_white(image), header.orientation)
            return np.array(upright, dtype=np.uint8)
    except InvalidImageError:
        raise
    except Exception as error:
        # Hostile files make Pillow raise OSError, SyntaxError, ValueError, EOFError, KeyError,
        # struct.error, zlib.error, OverflowError and MemoryError, by design or by oversight.
        raise _damaged(str(error)[:200] or type(error).__name__) from error


def _on_white(image: Image.Image) -> Image.Image:
    """Return ``image`` as RGB, what is transparent in front of white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    how = _ORIENTATIONS.get(orientation)
    return image if how is None else image.transpose(how)


def _orientation(exif: bytes) -> int:
    """Return the orientation tag of a TIFF-encoded EXIF block, 1 if it has none or is damaged.

    Damaged metadata is no reason to refuse a picture that is itself complete.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
            if (tag, kind, count) == (0x0112, 3, 1):
                return value if value in _ORIENTATIONS else 1
    except struct.error:
        return 1
    return 1


def _read_png(data: bytes) -> _Header:
    if data[12:16] != b"IHDR":
        raise _damaged("it does not start with a header")
    width, height, depth, colours = struct.unpack(">IIBB", _take(data, 16, 10))
    if depth > 8:
        # Pillow would open 16-bit RGB as plain RGB and drop the low bytes without a word.
        raise InvalidImageError(f"the image has {depth} bits a channel: convert to 8-bit RGB")
    if depth == 0:
        raise _damaged("its header says 0 bits a channel")
    head: list[bytes] = []
    body: list[bytes] = []
    exif = b""
    for kind, content in _png_chunks(data):
        if kind == b"IHDR" and head:
            raise _damaged("it has more than one header")
        if kind == b"fdAT" or (kind == b"acTL" and content[:4] > b"\0\0\0\1"):
            raise _animated()
        if kind == b"IDAT":
            body.append(content)
        elif kind == b"eXIf":
            exif = content
        elif kind == b"tRNS" and colours == 0:
            head.append(_png_chunk(kind, _transparent_grey(content, depth)))
        elif kind in _PNG_PIXEL_CHUNKS:
            head.append(_png_chunk(kind, content))
    image = [*head, _png_chunk(b"IDAT", b"".join(body)), _png_chunk(b"IEND", b"")]
    return _Header(
        PngImageFile, width, height, _orientation(exif), _PNG_SIGNATURE + b"".join(image)
    )


def _transparent_grey(content: bytes, depth: int) -> bytes:
    """Return the content of a grey image's tRNS chunk as Pillow understands it.

    The file counts in its own levels, 0 to 3 with 2 bits. Pillow scales pixels to 0 to 255 but
    not this one level, and would make another level transparent.
    """
    (level,) = struct.unpack(">H", _take(content, 0, 2))
    highest = 2**depth - 1
    return struct.pack(">H", (level & highest) * 255 // highest)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, content) of every chunk up to IEND, with its checksum verified.

    Pillow does not look at the checksums of image data: a flipped bit would be learned.
    """
    position = len(_PNG_SIGNATURE)
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack(">I4s", _take(data, position, 8))
        content = _take(data, position + 8, length)
        (checksum,) = struct.unpack(">I", _take(data, position + 8 + length, 4))
        if zlib.crc32(content, zlib.crc32(kind)) != checksum:
            raise _damaged(f"the checksum of its {kind.decode('latin-1')!a} chunk is wrong")
        if kind == b"IEND":
            return
        yield kind, content
        position += length + 12
    raise _damaged(f"it has more than {_MAX_PARTS} chunks")


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", checksum)


def _read_jpeg(data: bytes) -> _Header:
    kept = [b"\xff\xd8"]
    frame = exif = b""
    scan = 0
    scans = 0
    for marker, start, end in _jpeg_segments(data):
        content = data[start + 4 : end]
        if marker == _JPEG_SCAN:
            scan = scan or start
            scans += 1
            if scans > _MAX_SCANS:
                raise _damaged(f"it has more than {_MAX_SCANS} scans")
        elif marker in _JPEG_SIZES:
            frame = frame or content
        elif marker == _JPEG_EXIF and not exif and content.startswith(b"Exif\0\0"):
            exif = content
        if not scan and marker not in _JPEG_METADATA:
            kept.append(data[start:end])
    if not scan or not frame:
        raise _damaged("it has no image data")
    depth, height, width, components = struct.unpack(">BHHB", _take(frame, 0, 6))
    if components == 4:
        raise InvalidImageError("CMYK images are not accepted: convert to RGB first")
    if depth != 8:
        raise InvalidImageError(f"the image has {depth} bits a channel: convert to 8-bit RGB")
    pixels = b"".join(kept) + data[scan:]
    return _Header(JpegImageFile, width, height, _orientation(exif), pixels)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of every segment up to EOI, through all scans.

    ``start`` is at the marker. What follows EOI (previews, the video of a motion photo) is
    ignored; a file without EOI was cut off, even where a decoder would make something up.
    """
    position = 2
    for _ in range(_MAX_PARTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise _truncated()
        marker, start = found[1][0], found.start()
        if marker == _JPEG_END:
            return
        (length,) = struct.unpack(">H", _take(data, start + 2, 2))
        _take(data, start + 2, length)
        position = start + 2 + max(length, 2)
        yield marker, start, position
    raise _damaged(f"it has more than {_MAX_PARTS} segments")


def _read_webp(data: bytes) -> _Header:
    kind, frames, exif = b"", 0, b""
    for chunk, content in _webp_chunks(data):
        kind = kind or chunk
        frames += chunk == b"ANMF"
        if chunk == b"EXIF":
            exif = content
    if frames > 1:
        raise _animated()
    width, height = _webp_size(kind, _take(data, 20, 10))
    return _Header(WebPImageFile, width, height, _orientation(exif), data)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    (size,) = struct.unpack("<I", _take(data, 4, 4))
    file = _take(data, 0, size + 8)
    position = 12
    for _ in range(_MAX_PARTS):
        if position >= len(file):
            return
        kind, length = struct.unpack("<4sI", _take(file, position, 8))
        yield kind, _take(file, position + 8, length)
        position += 8 + length + length % 2
    raise _damaged(f"it has more than {_MAX_PARTS} chunks")


def _webp_size(kind: bytes, start: bytes) -> tuple[int, int]:
    """Return width and height from the first 10 bytes of the first chunk, ``kind``."""
    if kind == b"VP8X":
        return (
            int.from_bytes(start[4:7], "little") + 1,
            int.from_bytes(start[7:10], "little") + 1,
        )
    if kind == b"VP8L":
        bits = int.from_bytes(start[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", start[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise _damaged("it starts with an unknown chunk")


def _read_bmp(data: bytes) -> _Header:
    (size,) = struct.unpack("<I", _take(data, 14, 4))
    if size == 12:
        width, height = struct.unpack("<HH", _take(data, 18, 4))
        compression = 0
    else:
        width, height, _, _, compression = struct.unpack("<iiHHI", _take(data, 18, 16))
    if compression not in (0, 3):
        # Pillow unpacks run lengths byte by byte in Python: 60 KB keep it busy for seconds.
        raise InvalidImageError("compressed BMP images are not accepted: send PNG or plain BMP")
    # A negative height means that rows run from top to bottom.
    return _Header(BmpImageFile, width, abs(height), 1, data)


def _take(data: bytes, start: int, length: int) -> bytes:
    """Return ``data[start:start + length]``.

    Raises:
        InvalidImageError: if the file ends before.
    """
    if start + length > len(data):
        raise _truncated()
    return data[start : start + length]


def _truncated() -> InvalidImageError:
    return InvalidImageError("the image is truncated: the file ends early; send it whole")


def _damaged(why: str) -> InvalidImageError:
    return InvalidImageError(f"the image is damaged: {why}")


def _animated() -> InvalidImageError:
    return InvalidImageError("animated images are not accepted: send one frame as a still image")
