"""glibc's allocator, told which memory goes as a whole, and which stays.

It takes large blocks from the system one by one, and gives each back when it is freed, but decides
by what was freed before what is large: after the first swap, a version's weights lie between what
calls use, and what is freed there stays with the process. After 200 swaps a server held half as
much again as it used. A training step is the opposite: the next one takes all that it frees.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of mallopt, from malloc.h."""

_USUAL = 32 << 20
"""Bytes of a large block: the most that there may be, which glibc would come to by itself."""

_FOR_GOOD = 128 << 10
"""Bytes of a large block among those of a version: the least that glibc itself begins with."""

_ALL = 2**31 - 1
"""Bytes that are never reached: what is freed stays. Parameters of mallopt are a C ``int``."""

_lock = threading.Lock()
_inside: set[object] = set()


@contextmanager
def apart() -> Iterator[None]:
    """Allocate in whole pages meanwhile what is not small, and give back what is free then.

    It holds for all threads, so those that answer calls are a little slower for as long. Elsewhere
    than with glibc, nothing is different.
    """
    if os.name != "posix":
        yield
        return
    c, this = ctypes.CDLL(None), object()
    with _lock:
        _inside.add(this)
        # Images are decoded into blocks that come and go: their pages are kept.
        _set(c, _TRIM_THRESHOLD, 2 * _USUAL)
        _set(c, _MMAP_THRESHOLD, _FOR_GOOD)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(this)
            if not _inside:
                _set(c, _MMAP_THRESHOLD, _USUAL)
        give_back()


def keep_apart() -> None:
    """Allocate like that for as long as this process lives."""
    if os.name == "posix":
        with _lock:
            _inside.add(keep_apart)  # which nobody takes out
            _set(ctypes.CDLL(None), _MMAP_THRESHOLD, _FOR_GOOD)


@contextmanager
def kept() -> Iterator[None]:
    """Keep meanwhile what is freed, and give it back then.

    What a step frees, a gigabyte and more, the next one takes. From the system it would come page
    by page, each filled with zeros: 3 to 7% of the time. Where memory is apart, it stays so.
    """
    if os.name != "posix" or _inside:
        yield
        return
    c = ctypes.CDLL(None)
    _set(c, _TRIM_THRESHOLD, _ALL)
    _set(c, _MMAP_THRESHOLD, _ALL)
    try:
        yield
    finally:
        _set(c, _MMAP_THRESHOLD, _USUAL)
        _set(c, _TRIM_THRESHOLD, 2 * _USUAL)
        give_back()


def share() -> None:
    """Let threads that begin from now on allocate from the same memory, as long as this lives.

    Each would have some of its own, where what it has freed is of no use to the others: steps whose
    parts are taken by other threads than those before would take a quarter as much again.
    """
    if os.name == "posix":
        _set(ctypes.CDLL(None), _ARENA_MAX, 1)


def give_back() -> None:
    """Give the system back what is free."""
    if os.name == "posix":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set(c: ctypes.CDLL, parameter: int, value: int) -> None:
    with suppress(AttributeError):
        c.mallopt(parameter, value)
