"""``allocator.apart``: what a version takes goes back as a whole."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from inflora_core import allocator

PROGRAM = """
import ctypes
from inflora_core import allocator

class Figures(ctypes.Structure):  # struct mallinfo2 of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

c = ctypes.CDLL(None)
c.mallinfo2.restype = Figures
c.malloc.restype = ctypes.c_void_p
size, count = 1 << 20, 20

def apart():
    return c.mallinfo2().hblkhd

with allocator.apart():
    with allocator.apart():
        pass
    before = apart()
    blocks = [ctypes.c_void_p(c.malloc(size)) for _ in range(count)]
    assert apart() - before >= count * size, "they lie among others"
held = apart()
other = c.malloc(size)
assert apart() == held, "what comes later is apart, too"
for block in blocks:
    c.free(block)
assert apart() <= held - count * size, "they are kept"
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
def test_only_what_is_allocated_meanwhile_is_apart():
    """In a process of its own: where much is free already, blocks come from there."""
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    with allocator.apart():
        pass
