"""``allocator.apart``: what a version takes goes back as a whole."""

from __future__ import annotations

import ctypes

import pytest

from inflora_service import allocator

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Figures(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


c = ctypes.CDLL(None)


def apart_bytes() -> int:
    """Return the bytes of blocks that were taken from the system one by one."""
    c.mallinfo2.restype = Figures
    return int(c.mallinfo2().hblkhd)


@pytest.mark.skipif(not hasattr(c, "mallinfo2"), reason="needs glibc 2.33 or later")
def test_only_what_is_allocated_meanwhile_is_apart():
    c.malloc.restype = ctypes.c_void_p
    size = 1 << 20
    with allocator.apart():
        before = apart_bytes()
        blocks = [ctypes.c_void_p(c.malloc(size)) for _ in range(20)]
        assert apart_bytes() - before >= 20 * size
    held = apart_bytes()
    other = ctypes.c_void_p(c.malloc(size))
    assert apart_bytes() == held
    for block in blocks:
        c.free(block)
    assert apart_bytes() <= held - 20 * size
    c.free(other)


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    with allocator.apart():
        pass
