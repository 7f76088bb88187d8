"""Files that pretend to be images: cut, changed, spliced, with headers that lie, or plain noise."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st
from PIL import Image

KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "png": ("PNG", {}, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "apng": ("PNG", {"frames": 3}, ("RGB", "P")),
    "jpeg": ("JPEG", {}, ("L", "RGB", "CMYK")),
    "progressive": ("JPEG", {"progressive": True}, ("L", "RGB")),
    "webp": ("WEBP", {}, ("RGB", "RGBA")),
    "webp lossless": ("WEBP", {"lossless": True}, ("RGB", "RGBA")),
    "moving webp": ("WEBP", {"frames": 2}, ("RGB",)),
    "bmp": ("BMP", {}, ("1", "L", "P", "RGB", "RGBA")),
    "gif": ("GIF", {}, ("L", "P")),
    "moving gif": ("GIF", {"frames": 2}, ("P",)),
    "tiff": ("TIFF", {}, ("1", "L", "RGB", "RGBA", "CMYK", "F", "I;16")),
    "packed tiff": ("TIFF", {"compression": "tiff_lzw"}, ("RGB",)),
    "ico": ("ICO", {}, ("RGBA",)),
    "ppm": ("PPM", {}, ("RGB",)),
}
WITH_EXIF = ("png", "jpeg", "progressive", "webp")
ACCEPTED = ("png", "jpeg", "progressive", "webp", "webp lossless", "bmp")
SIDES = (1, 2, 8, 16, 16, 17, 24, 40, 201)
LIES = (0, 1, 2, 255, 256, 65535, 65536, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
"""Widths and heights that headers claim."""


@lru_cache(maxsize=512)
def sound(kind: str, mode: str, width: int, height: int, exif: bytes) -> bytes:
    """Return an image file with nothing wrong with it, but for its kind, its size or its EXIF."""
    form, options, _ = KINDS[kind]
    options = dict(options)
    frames = [
        Image.linear_gradient("L").rotate(90 * i).convert("RGB").resize((width, height))
        for i in range(options.pop("frames", 1))
    ]
    pictures = [frame.convert("L").convert(mode) if mode in ("I", "I;16", "F") else
                frame.convert(mode) for frame in frames]  # fmt: skip
    if len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    if exif and kind in WITH_EXIF:
        options["exif"] = exif
    file = io.BytesIO()
    pictures[0].save(file, form, **options)
    return file.getvalue()


@dataclass(frozen=True)
class Sound:
    """An image file as an encoder writes it."""

    kind: str
    mode: str
    width: int
    height: int
    exif: bytes = b""

    def data(self) -> bytes:
        return sound(self.kind, self.mode, self.width, self.height, self.exif)


@dataclass(frozen=True)
class Noise:
    """Bytes behind the first ones of some format."""

    begin: bytes
    rest: bytes

    def data(self) -> bytes:
        return self.begin + self.rest


@dataclass(frozen=True)
class Edit:
    """A change of a file.

    Attributes:
        what: ``cut``, ``set``, ``insert``, ``delete``, ``repeat``, ``size`` or ``chunk``.
        at: Where, as a share of the file.
        data: What is put there.
        numbers: How many bytes and times; or width and height.
    """

    what: str
    at: float = 0.0
    data: bytes = b""
    numbers: tuple[int, int] = (0, 0)

    def applied(self, file: bytes) -> bytes:
        at, (count, times) = int(self.at * len(file)), self.numbers
        match self.what:
            case "cut":
                return file[:at]
            case "set":
                return file[:at] + self.data + file[at + len(self.data) :]
            case "insert":
                return file[:at] + self.data + file[at:]
            case "delete":
                return file[:at] + file[at + count :]
            case "repeat":
                return file[:at] + file[at : at + count] * times + file[at + count :]
            case "size":
                return resized(file, *self.numbers)
            case _:
                return with_chunk(file, self.data)


@dataclass(frozen=True)
class Hostile:
    """A file after some changes, and perhaps the end of another one."""

    base: Sound | Noise
    edits: tuple[Edit, ...]
    splice: Sound | None = None

    def data(self) -> bytes:
        file = self.base.data()
        if self.splice is not None:
            other = self.splice.data()
            file = file[: len(file) // 2] + other[len(other) // 2 :]
        for edit in self.edits:
            file = edit.applied(file)
        return file


def resized(file: bytes, width: int, height: int) -> bytes:
    """Have a file's header claim another size, with a checksum that is right where there is one."""
    changed = bytearray(file)

    def put(form: str, at: int, *values: int) -> None:
        size = struct.calcsize(form)
        limit = 2 ** (8 * size // len(values))
        if at >= 0 and at + size <= len(changed):
            struct.pack_into(form, changed, at, *(value % limit for value in values))

    if file.startswith(b"\x89PNG"):
        put(">II", 16, width, height)
        put(">I", 29, zlib.crc32(changed[12:29]))
    elif file.startswith(b"\xff\xd8"):
        put(">HH", max(file.find(b"\xff\xc0"), file.find(b"\xff\xc2")) + 5, height, width)
    elif file.startswith(b"RIFF"):
        put("<HH", 26, width, height)
    elif file.startswith(b"BM"):
        put("<II", 18, width, height)
    elif file.startswith(b"GIF"):
        put("<HH", 6, width, height)
    else:
        put("<II", 18, width, height)
    return bytes(changed)


def with_chunk(file: bytes, data: bytes) -> bytes:
    """Put a chunk of one's own, with a right checksum, behind the header of a PNG file."""
    name, content = data[:4].ljust(4, b"x"), data[4:]
    chunk = struct.pack(">I", len(content)) + name + content
    return file[:33] + chunk + struct.pack(">I", zlib.crc32(name + content)) + file[33:]


EXIF = st.one_of(
    st.just(b""),
    st.sampled_from([1, 3, 6, 8, 9, 0]).map(
        lambda value: (
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([value, 0, 0])
        )
    ),
    st.binary(max_size=80).map(lambda rest: b"Exif\0\0II*\0" + rest),
    st.binary(max_size=40),
)
# More of what gets further than the first look at a header.
SOUND = st.sampled_from([*ACCEPTED * 4, *KINDS]).flatmap(
    lambda kind: st.builds(
        Sound,
        st.just(kind),
        st.sampled_from(KINDS[kind][2]),
        st.sampled_from(SIDES),
        st.sampled_from(SIDES),
        EXIF if kind in WITH_EXIF else st.just(b""),
    )
)
NOISE = st.builds(
    Noise,
    st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0",
            b"\xff\xd8\xff\xe1",
            b"RIFF\x20\0\0\0WEBPVP8 ",
            *(b"BM", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\1\0", b"8BPS", b"\0\0\0\x0cjP  "),
        ]
    ),
    st.binary(max_size=300),
)
SHARE = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
BYTES = st.binary(min_size=1, max_size=16)
CHUNKS = st.sampled_from(
    [
        b"IHDR",
        b"PLTE",
        b"tRNS",
        b"iCCP",
        b"zTXt",
        b"iTXt",
        b"eXIf",
        b"acTL",
        b"fcTL",
        b"IDAT",
        b"IEND",
    ]
)
EDIT = st.one_of(
    st.builds(Edit, st.just("cut"), SHARE),
    st.builds(Edit, st.sampled_from(["set", "insert"]), SHARE, BYTES),
    st.builds(Edit, st.just("set"), SHARE, BYTES),
    st.builds(
        Edit,
        st.sampled_from(["delete", "repeat"]),
        SHARE,
        st.just(b""),
        st.tuples(st.integers(1, 200), st.integers(0, 600)),
    ),
    st.builds(
        Edit,
        st.just("size"),
        numbers=st.tuples(st.sampled_from(LIES), st.sampled_from(LIES)),
    ),
    st.builds(
        Edit,
        st.just("chunk"),
        data=st.tuples(CHUNKS, st.binary(max_size=40)).map(b"".join),
    ),
)
IMAGE = st.builds(
    Hostile,
    st.one_of(*[SOUND] * 6, NOISE),
    st.lists(EDIT, max_size=3).map(tuple),
    st.one_of(*[st.none()] * 5, SOUND),
)
"""Any file that a client might call an image."""
