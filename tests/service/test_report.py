"""``inflora report`` of stores that run, are stopped, are empty, damaged, or not there."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inflora_core.store import Store
from inflora_service.server import Settings
from tests.service.conftest import GREEN, RED, WHITE, Running, png
from tests.service.test_bad_input import publish
from tests.service.test_evaluating import evaluate


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inflora_service.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


async def report(store: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(run, "--store", store, *arguments)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return all files of a store, with when they were written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


async def test_a_server_that_runs_and_one_that_was_stopped(
    start: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    publish(settings.store, red=RED, white=WHITE)
    publish(settings.store, green=GREEN)
    running: Running = await start()
    task = await running.learn({"blue": [png((0, 0, 255))]}, display_name="Monday <i>")
    await running.ended(task.name)
    examples = [(png(RED), "red"), (png(RED), "white"), (png(GREEN), "green")]
    await evaluate(running, examples)
    output = tmp_path / "report.html"
    first = await report(settings.store, "--output", output, "--json")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert (found["version"], found["classes"], len(found["tasks"])) == (3, 4, 3)
    assert found["files"] == [str(output)]
    measured = {(each["after"], each["task"]): each["accuracy"] for each in found["accuracies"]}
    assert measured == {(3, 1): 0.5, (3, 2): 1.0}
    content = output.read_text()
    assert "Monday &lt;i&gt;" in content
    assert "<i>" not in content
    assert "<script" not in content
    assert "http" not in content.replace("http://www.w3.org/2000/svg", "").replace(
        'http-equiv="Content-Security-Policy"', ""
    )
    await running.server.stop()
    before = files(settings.store)
    second = await report(settings.store, "--output", output, "--json")
    assert json.loads(second.stdout) == found
    assert files(settings.store) == before


async def test_a_store_with_nothing_in_it(prepared_store: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    done = await report(prepared_store, "--output", output)
    assert (done.returncode, done.stdout) == (0, f"wrote {output}\n")
    assert "inflora learn FOLDER" in output.read_text()


async def test_what_is_no_file_is_not_replaced(prepared_store: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = await report(prepared_store, "--output", tmp_path / "pipe")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no file that could be replaced" in done.stderr
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("case", ["not there", "no store", "damaged", "no folder"])
async def test_what_cannot_be_reported_leaves_the_last_report(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    publish(settings.store, red=RED)
    output, store = tmp_path / "report.html", settings.store
    output.write_text("the last one")
    if case == "not there":
        store = tmp_path / "nowhere"
    elif case == "no store":
        store = tmp_path / "photos"
        store.mkdir()
    elif case == "damaged":
        folder = Store.open(store).root / "models" / "default" / "versions" / "00000001"
        (folder / "manifest.json").write_text("{}")
    else:
        output = tmp_path / "nowhere" / "report.html"
    done = await report(store, "--output", output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("inflora report: error: ")
    assert (tmp_path / "report.html").read_text() == "the last one"
    assert not (tmp_path / "nowhere").exists()
