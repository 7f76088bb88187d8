"""What a version takes goes back as a whole, and what a step frees is there for the next."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from inflora_core import allocator

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later"
)

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


@needs_glibc
def test_only_what_is_allocated_meanwhile_is_apart():
    """In a process of its own: where much is free already, blocks come from there."""
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


STEP = """
import ctypes, resource, sys
from inflora_core import allocator

c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
size = 64 << 20

def resident():
    with open("/proc/self/statm") as figures:
        return int(figures.read().split()[1]) * resource.getpagesize()

if "limited" in sys.argv:
    allocator.keep_apart()
    with allocator.apart():
        pass
before = resident()
with allocator.kept():
    blocks = [ctypes.c_void_p(c.malloc(size)) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        c.free(block)
    print(resident() - before > size)
print(resident() - before > size)
"""


@needs_glibc
@pytest.mark.parametrize("given", [[], ["limited"]])
def test_what_a_step_frees_is_there_for_the_next(given: list[str]):
    """And given back in the end; with a limit of memory, at once."""
    command = [sys.executable, "-c", STEP, *given]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    meanwhile = "False" if given else "True"
    assert (result.stdout.split(), result.stderr) == ([meanwhile, "False"], "")


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    with allocator.apart(), allocator.kept():
        pass
