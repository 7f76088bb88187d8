"""``images.decode``: what is accepted, how it looks, and what is refused of hostile input."""

from __future__ import annotations

import gc
import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from inflora_core.config import Limits
from inflora_core.errors import InvalidImageError, InvalidInputError, LimitExceededError
from inflora_core.images import decode
from inflora_core.labels import check_label

# Pytest's own filter, "error", goes before the one that `images` sets when it is imported. What
# that one does is seen in `test_pillow_never_warns`, in a process without pytest.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

LIMITS = Limits()
SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Every mode that each format can hold and that is accepted.
KINDS = [
    ("JPEG", "L", {}),
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"subsampling": 0, "keep_rgb": True}),
    ("JPEG", "RGB", {"restart_marker_blocks": 1}),
    ("PNG", "1", {}),
    ("PNG", "L", {}),
    ("PNG", "L", {"transparency": 7}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "P", {"transparency": bytes(range(200))}),
    ("PNG", "RGB", {}),
    ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    ("PNG", "RGBA", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("BMP", "1", {}),
    ("BMP", "L", {}),
    ("BMP", "P", {}),
    ("BMP", "RGB", {}),
    ("BMP", "RGBA", {}),
]
EXTRA = [("PNG", "RGB", {"exif": True}), ("JPEG", "RGB", {"exif": True, "comment": b"hello"})]


def picture(mode: str = "RGB", width: int = 23, height: int = 17, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise, so that every format has something to encode."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    wave = np.stack([rows * 7 + columns * 3, rows * 2 + columns * 9, rows * columns, columns * 5])
    pixels = (wave.transpose(1, 2, 0) + rng.integers(0, 9, (height, width, 4))).astype(np.uint8)
    rgba = Image.fromarray(pixels)
    if mode == "P":
        return rgba.convert("RGB").quantize(64)
    return rgba if mode == "RGBA" else rgba.convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    if options.get("exif") is True:
        options["exif"] = orientation_exif(6)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker of cameras"
    return exif.tobytes()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, **more: bytes):
    """A PNG file made by hand; ``more`` are chunks that go before the image data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = b"".join(chunk(kind.encode(), content) for kind, content in more.items())
    body = extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND")
    return SIGNATURE + chunk(b"IHDR", header) + body


def reference(data: bytes) -> NDArray[np.uint8]:
    """The same by the plain way through Pillow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return np.asarray(upright.convert("RGB"))
            rgba = np.asarray(upright.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def refused(data: bytes, limits: Limits = LIMITS) -> str:
    """Assert that ``data`` is refused as an image, and return the message."""
    with pytest.raises(InvalidImageError) as caught:
        decode(data, limits, field="images[3]")
    assert caught.value.field == "images[3]"
    assert len(caught.value.message) < 400
    return caught.value.message


def files() -> list[bytes]:
    return [encode(picture(mode), kind, **options) for kind, mode, options in KINDS + EXTRA]


# --- What is accepted ---------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 90), st.integers(2, 90), st.integers(0, 2**32 - 1))
def test_pixels_are_those_of_the_file(
    kind: tuple[str, str, dict[str, Any]], width: int, height: int, seed: int
):
    name, mode, options = kind
    data = encode(picture(mode, width, height, seed), name, **options)
    pixels = decode(data, LIMITS)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.abs(pixels.astype(int) - reference(data)).max() <= 1  # rounding of the alpha blend


@pytest.mark.parametrize("name", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_back_what_was_saved(name: str):
    image = picture("RGB", 40, 30)
    options = {"lossless": True} if name == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(image, name, **options), LIMITS), image)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparent_pixels_become_white(mode: str, kind: str):
    image = Image.new(mode, (6, 4), (0,) * len(mode))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert (decode(encode(image, kind, **options), LIMITS) == 255).all()
    half = Image.new(mode, (6, 4), (*(0,) * (len(mode) - 1), 127))
    assert (decode(encode(half, kind, **options), LIMITS) == 128).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_png_counts_in_the_files_own_levels(depth: int):
    levels = [0, 1] * 8
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    row = b"\0" + int(bits, 2).to_bytes(2 * depth, "big")
    data = png(16, 2, row * 2, depth=depth, colour=0, tRNS=struct.pack(">H", 0))
    pixels = decode(data, LIMITS)
    assert (pixels[:, 0::2] == 255).all()
    assert (pixels[:, 1::2] == 255 // (2**depth - 1)).all()
    data = png(16, 2, row * 2, depth=depth, colour=0, tRNS=struct.pack(">H", 1))
    pixels = decode(data, LIMITS)
    assert (pixels[:, 0::2] == 0).all()
    assert (pixels[:, 1::2] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int):
    image = picture("RGB", 24, 16)
    data = encode(image, kind, exif=orientation_exif(orientation), quality=95)
    plain = decode(encode(image, kind, quality=95), LIMITS)
    pixels = decode(data, LIMITS)
    assert pixels.shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))
    np.testing.assert_array_equal(pixels, reference(data))
    assert (orientation == 1) == np.array_equal(pixels, plain)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_either_byte_order_is_read(order: str):
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0
    )
    pixels = decode(encode(picture(), "JPEG", exif=b"Exif\0\0" + tiff), LIMITS)
    assert pixels.shape == (23, 17, 3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_exif_does_not_fail(data: st.DataObject):
    exif = bytearray(orientation_exif(3))
    for _ in range(data.draw(st.integers(1, 6))):
        exif[data.draw(st.integers(6, len(exif) - 1))] = data.draw(st.integers(0, 255))
    exif = exif[: data.draw(st.integers(6, len(exif)))]
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    pixels = decode(encode(picture(), kind, exif=bytes(exif)), LIMITS)
    assert pixels.shape in {(17, 23, 3), (23, 17, 3)}


def exif_of(*tags: tuple[int, int, int, int]) -> bytes:
    """EXIF of (tag, type, count, value or offset), followed by 60 empty bytes."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(60)


@pytest.mark.parametrize("kind", range(1, 14))
@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_a_resolution_of_the_wrong_type_does_not_fail(kind: int, count: int):
    """Pillow looks at it when it opens a JPEG file, and gives up some."""
    exif = exif_of((0x011A, kind, count, 0x37), (0x0128, 3, 1, 2))
    assert decode(encode(picture(), "JPEG", exif=exif), LIMITS).shape == (17, 23, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_beside_damaged_tags(kind: str):
    exif = exif_of((0x010F, 2, 50_000, 7), (0x0112, 3, 1, 6), (0x0132, 99, 1, 0), (0x8769, 4, 1, 9))
    assert decode(encode(picture(), kind, exif=exif), LIMITS).shape == (23, 17, 3)


NOISY = """
import sys, warnings
from pathlib import Path

from PIL import Image

from inflora_core.config import Limits
from inflora_core.images import decode

for path in sorted(Path(sys.argv[1]).iterdir()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(path) as image:
            image.getexif()
        print(len(caught), end=" ")
    print(decode(path.read_bytes(), Limits()).shape)
"""


def test_pillow_never_warns(tmp_path: Path):
    """Neither on damaged EXIF nor on a damaged index of animations or pictures."""
    damaged = exif_of((0x010F, 2, 50_000, 7), (0x0112, 3, 1, 6))
    for kind in ("JPEG", "PNG", "WEBP"):
        (tmp_path / kind).write_bytes(encode(picture(), kind, exif=damaged))
    rows = (b"\0" + bytes(range(24))) * 8
    (tmp_path / "animation").write_bytes(png(8, 8, rows, acTL=struct.pack(">II", 0, 0)))
    photo = encode(picture("RGB", 32, 32), "MPO", save_all=True, append_images=[picture()])
    (tmp_path / "photo").write_bytes(photo.replace(b"\x02\xb0\x07\0", b"\x09\xb0\x07\0"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NOISY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    heard = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(heard) == 5
    assert all(heard)  # or this test shows nothing
    assert done.stdout.count("(23, 17, 3)") == 3


@pytest.mark.parametrize("jfif", [True, False])
@pytest.mark.parametrize("transform", [0, 1, None])
def test_the_colours_of_a_jpeg_are_what_its_application_segments_say(
    jfif: bool, transform: int | None
):
    data = encode(picture(), "JPEG")
    assert data[2:4] == b"\xff\xe0"
    rest = data[2:] if jfif else data[20:]
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform or 0])
    made = b"\xff\xd8" + (b"" if transform is None else adobe) + rest
    np.testing.assert_array_equal(decode(made, LIMITS), reference(made))
    is_rgb = not np.array_equal(decode(made, LIMITS), decode(data, LIMITS))
    assert is_rgb == (transform == 0 and not jfif)


def test_a_multi_picture_photo_is_its_first_picture():
    first, preview = picture("RGB", 32, 32), picture("RGB", 16, 16, seed=1)
    data = encode(first, "MPO", save_all=True, append_images=[preview], exif=True)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    np.testing.assert_array_equal(decode(data, LIMITS), reference(data))


def test_what_follows_the_image_is_ignored():
    for kind in ("JPEG", "PNG", "BMP", "WEBP"):
        data = encode(picture(), kind)
        video = os.urandom(5000) + b"\xff\xda" * 500
        np.testing.assert_array_equal(decode(data + video, LIMITS), decode(data, LIMITS))


def test_threads_decode_at_the_same_time():
    data = files()
    alone = [decode(item, LIMITS) for item in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: decode(item, LIMITS), data * 4))
    for index, pixels in enumerate(together):
        np.testing.assert_array_equal(pixels, alone[index % len(alone)])


def test_neither_pillow_nor_warnings_are_reconfigured():
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    decode(encode(picture(), "JPEG"), LIMITS)
    refused(b"no image")
    assert limit == Image.MAX_IMAGE_PIXELS
    assert list(warnings.filters) == filters


def test_no_file_is_left_open():
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("needs /proc")
    gc.collect()
    before = len(list(opened.iterdir()))
    for data in files():
        decode(data, LIMITS)
        refused(data[: len(data) // 2])
    assert len(list(opened.iterdir())) == before


# --- What is refused ----------------------------------------------------------------------------


def test_empty():
    assert "empty" in refused(b"")


@pytest.mark.parametrize(
    "text", [b"hello", b"B", b"BM", b"\xff\xd8\xff", SIGNATURE, b"RIFF", b"\0"]
)
def test_non_images(text: bytes):
    refused(text)


@pytest.mark.parametrize(
    ("name", "mode"), [("GIF", "P"), ("TIFF", "RGB"), ("AVIF", "RGB"), ("ICO", "RGBA")]
)
def test_other_formats_are_named(name: str, mode: str):
    message = refused(encode(picture(mode, 32, 32), name))
    assert "JPEG, PNG, WebP or BMP" in message
    assert name == "ICO" or name in message


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("frames", [2, 5])
def test_animated(name: str, frames: int):
    pictures = [picture("RGB", seed=seed) for seed in range(frames)]
    message = refused(encode(pictures[0], name, save_all=True, append_images=pictures[1:]))
    assert ("GIF" if name == "GIF" else "animated") in message


def test_animated_behind_a_default_image():
    pictures = [picture("RGB", seed=seed) for seed in range(2)]
    data = encode(pictures[0], "PNG", save_all=True, append_images=pictures[1:], default_image=True)
    assert "animated" in refused(data)


def test_an_animation_of_one_frame_is_a_still_image():
    rows = (b"\0" + bytes(range(24))) * 8
    frame = struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0)
    data = png(8, 8, rows, acTL=struct.pack(">II", 1, 0), fcTL=frame)
    np.testing.assert_array_equal(decode(data, LIMITS), decode(png(8, 8, rows), LIMITS))


def test_cmyk():
    assert "convert to RGB" in refused(encode(picture("CMYK"), "JPEG"))


def test_a_jpeg_of_12_bits():
    data = bytearray(encode(picture(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    refused(bytes(data))


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_sixteen_bits(colour: int):
    """All but grey would be opened by Pillow as if they had 8."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = (b"\0" + bytes(8 * channels * 2)) * 8
    data = png(8, 8, rows, depth=16, colour=colour)
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # the file is fine but for its depth
    assert "16 bits" in refused(data)


def test_one_pixel():
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        assert "1 x 1" in refused(encode(picture("RGB", 1, 1), kind))
    assert "shorter side" in refused(encode(picture("RGB", 50, 8), "PNG"), Limits(image_side_min=9))
    decode(encode(picture("RGB", 50, 9), "PNG"), Limits(image_side_min=9))


def test_a_side_of_nothing():
    refused(png(0, 5, b""))


def test_a_strip():
    """It would be resized to a few hundred by millions of pixels."""
    assert "longer side" in refused(png(2, 201, bytes(7 * 201)))
    decode(png(2, 200, bytes(7 * 200)), LIMITS)
    assert "at most 3 times" in refused(png(2, 7, bytes(7 * 7)), Limits(image_aspect=3))


def huge(kind: str) -> bytes:
    """An image whose header says 20000 x 20000 (WebP: its largest), small on disk."""
    if kind == "PNG":
        return png(20_000, 20_000, bytes(20_000 * 2_501), depth=1, colour=0)
    data = bytearray(encode(picture(), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 20_000, -20_000)
    else:
        data[26:30] = struct.pack("<HH", 16_383, 16_383)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_huge_images_are_refused_from_their_header(kind: str):
    """1.2 GB if decoded; refused without the memory."""
    data = huge(kind)
    assert len(data) < 100_000
    resident = peak_resident()
    tracemalloc.start()
    try:
        message = refused(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "64000000 pixels" in message
    assert peak < 1_000_000
    # Pillow's own memory is not Python's: what the whole process took at most is the witness.
    assert peak_resident() - resident < 50_000


@pytest.mark.parametrize("side", [8_001, 12_000])
def test_the_limit_of_pixels_is_the_operators(side: int):
    """Below Pillow's limits, and where Pillow itself would only warn."""
    assert f"{side} x {side}" in refused(png(side, side, b""))
    small = Limits(image_pixels=23 * 17 - 1)
    assert "23 x 17" in refused(encode(picture(), "BMP"), small)
    decode(encode(picture(), "BMP"), Limits(image_pixels=23 * 17))


def test_no_limit_of_pixels_is_beyond_what_pillow_opens():
    assert Image.MAX_IMAGE_PIXELS is not None
    with pytest.raises(ValueError, match="less than or equal"):
        Limits(image_pixels=2 * Image.MAX_IMAGE_PIXELS + 1)
    Limits(image_pixels=2 * Image.MAX_IMAGE_PIXELS)


def peak_resident() -> int:
    """Return the most memory that this process ever held, in KiB."""
    resource = pytest.importorskip("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def test_too_many_bytes():
    data = encode(picture(), "PNG")
    with pytest.raises(LimitExceededError, match=str(len(data))) as caught:
        decode(data, Limits(image_bytes=len(data) - 1), field="examples[0].image")
    assert caught.value.field == "examples[0].image"
    decode(data, Limits(image_bytes=len(data)))


@pytest.mark.parametrize("number", range(len(KINDS) + len(EXTRA)))
def test_a_file_cut_anywhere_is_refused(number: int):
    """At every position in the first and last 300 bytes, and at 100 between."""
    data = files()[number]
    middle = range(300, len(data), max(len(data) // 100, 1))
    cuts = {*range(min(300, len(data))), *middle, *range(max(len(data) - 300, 0), len(data))}
    for cut in sorted(cuts):
        try:
            pixels = decode(data[:cut], LIMITS)
        except InvalidImageError:
            continue
        # BMP rows are padded, so its last bytes may be none of a pixel's. In a PNG file they are
        # the checksum of the empty chunk that ends it.
        assert data[:2] == b"BM" or data.startswith(SIGNATURE)
        assert len(data) - cut <= 4
        np.testing.assert_array_equal(pixels, decode(data, LIMITS))


def test_a_png_with_any_bit_flipped_is_refused():
    """Its checksums see all; Pillow looks at those of the image data only when told to.

    The last chunk is empty and only marks the end.
    """
    data = encode(picture("RGBA", 9, 7), "PNG")
    for position in range(len(data) - 12):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            refused(bytes(damaged))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(KINDS) + len(EXTRA) - 1), st.data())
def test_damage_is_an_error_about_the_image_or_a_picture(number: int, data: st.DataObject):
    """Bytes overwritten, cut out, repeated and inserted at random places: never another error."""
    file = bytearray(FILES[number])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(file)))
        how = data.draw(st.sampled_from(["set", "cut", "repeat", "insert"]))
        some = data.draw(st.binary(min_size=1, max_size=8))
        if how == "set":
            file[at : at + len(some)] = some
        elif how == "cut":
            del file[at : at + len(some)]
        elif how == "repeat":
            file[at:at] = file[at : at + 64]
        else:
            file[at:at] = some
    survives(bytes(file))


def test_flipped_bits_in_every_format():
    chance = random.Random(7)
    for file in FILES:
        for _ in range(150):
            damaged = bytearray(file)
            for _ in range(chance.choice([1, 1, 2, 5, 20])):
                # Headers are where the traps are; half of the flips go there.
                reach = chance.choice([min(80, len(file)), len(file)])
                damaged[chance.randrange(reach)] ^= 1 << chance.randrange(8)
            survives(bytes(damaged))


def test_damaged_chunks_with_right_checksums():
    """What a checksum would hide from the other tests: hostile, not merely damaged."""
    chance = random.Random(11)
    for file in FILES:
        if not file.startswith(SIGNATURE):
            continue
        for _ in range(150):
            parts = [bytearray(content) for content in chunks(file)]
            part = chance.choice(parts)
            for _ in range(chance.choice([1, 2, 4])):
                if len(part) > 4:
                    part[chance.randrange(4, len(part))] = chance.randrange(256)
            if chance.random() < 0.3:
                parts.insert(chance.randrange(len(parts)), part)
            survives(SIGNATURE + b"".join(chunk(bytes(p[:4]), bytes(p[4:])) for p in parts))


def chunks(file: bytes) -> list[bytes]:
    """Return kind and content of every chunk of a PNG file."""
    found, at = [], len(SIGNATURE)
    while at < len(file):
        (length,) = struct.unpack_from(">I", file, at)
        found.append(file[at + 4 : at + 8 + length])
        at += length + 12
    return found


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", SIGNATURE, b"BM", b"RIFF\x40\0\0\0WEBPVP8X", b"GIF89a"]),
    st.binary(max_size=300),
)
def test_random_bytes(start: bytes, rest: bytes):
    survives(start + rest)


def survives(data: bytes) -> None:
    try:
        pixels = decode(data, LIMITS, field="here")
    except InvalidImageError as error:
        assert error.field == "here"  # noqa: PT017
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(), "JPEG").replace(b"\xff\xc4", b"\xff\xc0\x00\x02\xff\xc4"),
        encode(picture(), "PNG").replace(b"IHDR", b"IHDX"),
        png(8, 8, b"short"),
        png(8, 8, bytes(25 * 8), colour=3),  # a palette image without a palette
        png(8, 8, bytes(25 * 8), depth=3),
        png(8, 8, bytes(8), depth=0, colour=0, tRNS=b"\0\0"),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_crafted_files_are_refused(data: bytes):
    """Two sizes, no header, too little data, no palette, impossible depths."""
    assert "damaged" in refused(data) or "truncated" in refused(data)


def test_run_length_bombs_are_refused():
    """Pillow fills each row of such a file byte by byte in Python."""
    header = struct.pack("<IiiHHIIiiII", 40, 8000, 8000, 1, 8, 1, 0, 0, 0, 2, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 62) + header + bytes(8) + b"\0\0" * 8000
    assert "compressed BMP" in refused(data)


def test_scan_bombs_are_refused():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    start, end = whole.rindex(b"\xff\xda"), whole.rindex(b"\xff\xd9")
    assert "scans" in refused(whole[:end] + 501 * whole[start:end] + whole[end:])


def test_text_bombs_are_not_unpacked():
    """50 MB of text in 50 KB."""
    bomb = b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    data = png(8, 8, (b"\0" + bytes(range(24))) * 8, zTXt=bomb)
    resident = peak_resident()
    assert "too large" in refused(data)
    assert peak_resident() - resident < 10_000


def test_errors_name_their_cause_and_no_object():
    message = refused(png(8, 8, b"short"))
    assert "object at 0x" not in message


FILES = files()


# --- Labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [
        "cat",
        "a",
        "x" * 200,
        "wire-haired fox terrier (UK)",
        "caf\u00e9",
        "\u732b",
        "\U0001f431",
        "\U0001f469\u200d\U0001f33e",  # a farmer: woman, joiner, sheaf
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian with a non-joiner
        "../etc/passwd",  # a label is never a path
    ],
)
def test_labels_are_returned_as_they_are(label: str):
    assert check_label(label, field="label") == label


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("", "empty"),
        ("[forgotten]", "stands for the names"),
        ("x" * 201, "201 characters"),
        ("cafe\u0301", "unicodedata.normalize('NFC', label)"),
        ("\u212b", "NFC"),  # the unit angstrom, which NFC makes the letter
        (" cat", "white space"),
        ("cat\n", "white space"),
        ("cat\u3000", "white space"),
        (" ", "white space"),
        ("a\tb", "U+0009"),
        ("a\0b", "U+0000"),
        ("a\x7fb", "U+007F"),
        ("a\u202eb", "U+202E"),  # turns the text around it
        ("a\u200bb", "U+200B"),
        ("a\u00a0b", "U+00A0"),
        ("\u200dcat", "U+200D"),
        ("cat\u200c", "U+200C"),
        ("\ud83d", "surrogate"),
        ("a\udc80b", "surrogate"),
    ],
)
def test_labels_that_are_refused(label: str, why: str):
    with pytest.raises(InvalidInputError) as caught:
        check_label(label, field="examples[2].label")
    assert why in caught.value.message
    assert caught.value.field == "examples[2].label"


@given(st.text(alphabet=st.characters(codec=None), max_size=210))
def test_labels_pass_only_if_they_are_what_they_seem(label: str):
    message = complaint(label)
    assert message.isascii()  # or the refusal itself could not be sent
    assert len(message) < 900
    if not message:
        assert 1 <= len(label.encode()) <= 800
        assert unicodedata.normalize("NFC", label) == label.strip() == label
        assert label.replace("\u200c", "").replace("\u200d", "").isprintable()


def complaint(label: str) -> str:
    """Return why ``label`` is refused, or ""."""
    try:
        check_label(label, field="label")
    except InvalidInputError as error:
        return error.message
    return ""
