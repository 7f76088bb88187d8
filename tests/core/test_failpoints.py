"""Failpoints: what their variable says, and that they are nothing without it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

from inflora_core import failpoints
from inflora_core.failpoints import POINTS, VARIABLE, parse

WRITE = """
import sys
from pathlib import Path
from inflora_core import durable
for number in range(5):
    try:
        durable.replace(Path(sys.argv[1]), str(number).encode())
    except OSError as error:
        print(error.errno, end=" ")
"""


def run(path: Path, value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITE, path],
        check=False,
        env=os.environ | {VARIABLE: value},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("value", "status", "output", "content"),
    [
        ("", 0, "", "4"),
        ("replace.rename=kill@3", -signal.SIGKILL, "", "1"),
        ("replace.renamed=kill@3", -signal.SIGKILL, "", "2"),
        ("replace.write=ENOSPC@2*2", 0, f"{errno.ENOSPC} {errno.ENOSPC} ", "4"),
        ("replace.write=EIO@4, spool.sync=kill", 0, f"{errno.EIO} {errno.EIO} ", "2"),
    ],
)
def test_a_process_fails_where_it_is_told_to(
    tmp_path: Path, value: str, status: int, output: str, content: str
) -> None:
    path = tmp_path / "file"
    ended = run(path, value)
    assert (ended.returncode, ended.stdout, path.read_text()) == (status, output, content)


@pytest.mark.parametrize(
    "value", ["nowhere=kill", "spool.sync", "spool.sync=ENONE", "spool.sync=kill@x", "spool.sync=9"]
)
def test_what_is_no_failpoint_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match="is no failpoint"):
        parse(value)
    assert "is no failpoint" in run(tmp_path / "file", value).stderr


def test_without_the_variable_there_is_nothing() -> None:
    assert VARIABLE not in os.environ
    assert failpoints.reach is failpoints._nothing
    call = timeit.timeit(lambda: failpoints.reach("spool.write"), number=10_000)
    hash_ = timeit.timeit(lambda: hash(tuple(range(200))), number=10_000)
    assert call < hash_, "less than any step that it stands beside"


def test_every_failpoint_is_somewhere() -> None:
    root = Path(__file__).parents[2]
    files = [*root.glob("inflora_core/*.py"), *root.glob("service/inflora_service/*.py")]
    code = "".join(path.read_text() for path in files if path.name != "failpoints.py")
    assert {name for name in POINTS if f'reach("{name}")' not in code} == set()
