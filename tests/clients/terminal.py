"""The `inflora` command as a process with a terminal of its own, as a person has it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
COLUMNS = 200
SECONDS = 120
"""Longest wait for something to be shown."""
PATIENCE = 5
"""Seconds after which a key is pressed again that seems not to have been heard."""

MAIN = "from inflora_client.cli import main; main()"
# A background job of a shell, as CI may be, ignores Ctrl-C, and so would its children.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
_OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(**more: str) -> dict[str, str]:
    """The environment of a command that is started in any folder."""
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    # Those would win over the size of the terminal, and break lines elsewhere.
    kept = {name: x for name, x in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return kept | own | more


class Terminal:
    """A command that runs.

    Attributes:
        shown: All that was shown so far, without colours and movements.
    """

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self.shown = ""

    def until(self, text: str) -> None:
        """Wait until a text is shown, which was not before the last keys."""
        while text not in self.shown:
            assert self._read(), f"it ended without {text!r}:\n{self.shown}"

    def press(self, keys: str) -> None:
        self.shown = ""
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Wait until the command has ended; return its exit code."""
        while self._read():
            pass
        return self._process.wait(SECONDS)

    def interrupt(self) -> int:
        """Press Ctrl-C until the command has ended; return its exit code.

        One that comes after a question is shown, and before Python waits for the answer, is heard
        with the next key only: a person would press it again.
        """
        self.press(CTRL_C)
        while self._read(again=CTRL_C):
            pass
        return self._process.wait(SECONDS)

    def _read(self, again: str = "") -> bool:
        ready: list[int] = []
        for _ in range(SECONDS // PATIENCE):
            ready, _, _ = select.select([self._master], [], [], PATIENCE)
            if ready:
                break
            if again:
                os.write(self._master, again.encode())
        assert ready, f"nothing more is shown:\n{self.shown}"
        try:
            read = os.read(self._master, 65536)
        except OSError:  # what Linux says once nobody holds the other side
            return False
        self.shown += _CONTROL.sub("", read.decode(errors="replace"))
        return bool(read)


@contextmanager
def terminal(
    words: Sequence[object], folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Start ``inflora`` with these words in a folder."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", _OWN_TERMINAL + HEED + MAIN, *map(str, words)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        cwd=folder,
        env=env or environment(),
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)
