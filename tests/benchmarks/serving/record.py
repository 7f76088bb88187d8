"""Measurements, one JSON line each, so that a run goes on where it was cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Found = dict[str, Any]


class Record:
    """A file of measurements.

    Args:
        path: The file.
        common: What every measurement's key has: code, threads, settings. Those with others are
            left where they are, and count for nothing.
        context: What is written beside each new measurement: machine, versions.
    """

    def __init__(self, path: Path, common: Found, context: Found) -> None:
        self._path = path
        self._common = common
        self._context = context
        self._found: dict[str, Found] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # one was cut off
                    entry = json.loads(line)
                    self._found[_text(entry["key"])] = entry["found"]

    def take(self, key: Found, measure: Callable[[], Found]) -> Found:
        """Return the measurement of ``key``, made now if there is none.

        One with an ``error`` is not kept: the next run tries again.
        """
        whole = self._common | key
        known = self._found.get(_text(whole))
        if known is not None:
            return known
        print(" ".join(f"{name}={value}" for name, value in key.items()), flush=True)
        found = measure()
        print("    " + _short(found), flush=True)
        if "error" in found:
            return found
        entry = {"key": whole, "found": found, "at": time.time(), **self._context}
        with self._path.open("a") as file:
            # The line before may have been cut off.
            file.write(f"\n{json.dumps(entry)}\n")
        self._found[_text(whole)] = found
        return found


def _text(key: Found) -> str:
    return json.dumps(key, sort_keys=True)


def _short(found: Found) -> str:
    text = json.dumps(found)
    return text if len(text) <= 300 else f"{text[:300]}..."
