"""Console and report in a headless Chromium, of a real server that has learned real tasks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inflora_client import Client, Task
from inflora_service.pictures import points
from tests.chromium import Page
from tests.console.conftest import LEARNED, QUICK, TASKS, Browser, measure
from tests.console.figures import FOUND, count
from tests.running_server import RunningServer, running_server
from tests.service.security_cases import entry
from tests.web.site import DIST, served

pytestmark = pytest.mark.slow

VIEWS = ("accuracy", "forgetting", "capacity", "interference", "lineage")
WIDE, PHONE = 1280, 360
SCHEMES = ("light", "dark")
SHOTS = os.environ.get("CONSOLE_SHOTS", "")
"""Folder for the pictures of docs/; none are taken without it."""

ROWS = """[...document.querySelectorAll(%s + " tbody tr")].map((row) =>
    [...row.children].map((cell) => cell.textContent))"""
ANSWERS = """[...document.querySelectorAll("#answers > li")].map((entry) => ({
    name: entry.querySelector(".name").textContent,
    classes: [...entry.querySelectorAll("tbody th")].map((one) => one.textContent),
    share: parseFloat(entry.querySelector(".share")?.textContent) / 100,
    by: entry.querySelector(".by").textContent,
}))"""


def rows(page: Page, where: str) -> list[list[str]]:
    """Return what a table says."""
    found: list[list[str]] = page.evaluate(ROWS % json.dumps(where))
    return found


def view(name: str) -> str:
    return f"[data-view={name}]"


def reported(server: RunningServer, folder: Path, *more: str) -> Any:
    """Write a report of the server's store, and return its figures."""
    command = [sys.executable, "-m", "inflora_client", "--json", "report"]
    command += ["--store", str(server.store), "--output", str(folder / "report.html"), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def written(folder: Path, images: list[bytes]) -> list[Path]:
    paths = [folder / f"{number:02}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    return paths


def test_it_is_there_at_once_and_small(server: RunningServer, browser: Browser) -> None:
    page = browser.page
    browser.open(server.http)
    paint = page.wait("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    # The page, and all that it loads, and the first answer.
    size = page.evaluate(
        """["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
            .slice(0, 7).reduce((sum, one) => sum + one.encodedBodySize, 0)"""
    )
    FOUND["first_paint_ms"] = round(paint)
    FOUND["page_bytes"] = size
    assert paint < 1000
    assert 20_000 < size < 500_000
    assert browser.errors() == []
    assert page.complaints == []
    assert {address.split("/")[2] for address in page.requests} == {server.http}


def test_each_view_has_what_was_measured(server: RunningServer, browser: Browser) -> None:
    page = browser.page
    browser.open(server.http)
    figures = reported(server, browser.folder)
    version, tasks = figures["version"], figures["tasks"]
    assert page.evaluate("document.querySelector('#version').textContent") == f"Version {version}"
    assert len(tasks) == LEARNED
    for name in VIEWS:
        drawn = page.evaluate(
            f"""(() => {{
                const picture = document.querySelector('{view(name)} svg[role=img]');
                const [title, text] = picture.getAttribute('aria-labelledby').split(' ')
                    .map((id) => document.getElementById(id).textContent);
                return [title, text, picture.getBoundingClientRect().width];
            }})()"""
        )
        assert all(drawn), name
        count("views", 1)
    accuracies = {(each["after"], each["task"]): each["accuracy"] for each in figures["accuracies"]}
    assert len(accuracies) == LEARNED * (LEARNED + 1) / 2
    cells = page.evaluate(
        f"[...document.querySelectorAll('{view('accuracy')} rect > title')]"
        ".map((title) => title.textContent)"
    )
    found = [re.match(r"task (\d+) after task (\d+): (\d+)% of (\d+) images", c) for c in cells]
    assert {(int(m[2]), int(m[1])): int(m[3]) for m in found if m} == {
        key: round(100 * share) for key, share in accuracies.items()
    }
    table = rows(page, view("accuracy"))
    assert {(int(row[0]), int(row[1].split()[0])): row[2] for row in table} == {
        key: f"{100 * share:.1f}%" for key, share in accuracies.items()
    }
    lost = {row[0].split()[0]: row[3] for row in rows(page, view("forgetting"))}
    known = {str(t["position"]): t["forgetting"] for t in tasks if t["forgetting"] is not None}
    assert len(known) == LEARNED - 1
    assert {key: f"{points(share)} pp" for key, share in known.items()} == {
        key: text for key, text in lost.items() if key in known
    }
    layers = len(tasks[0]["layers"])
    assert layers > 1
    thin = f"document.querySelectorAll('{view('capacity')} .p-thin').length"
    assert page.evaluate(thin) == layers
    capacity = [row[1] for row in rows(page, view("capacity"))]
    assert capacity == [f"{100 * task['capacity']:.1f}%" for task in tasks]
    for row, task in zip(rows(page, view("interference")), tasks[1:], strict=True):
        assert row[1:3] == [f"{task['leak']:.1e}", f"{task['interference']:.3f}"]
        assert re.fullmatch(r"([+-]\d+\.\d|0\.0) pp", row[3])
    versions = rows(page, view("lineage"))
    assert [int(row[0]) for row in versions] == list(range(version, 0, -1))
    assert [row[2] for row in versions] == ["current"] + [""] * (version - 1)
    shown = {row[0]: row[1] for row in rows(page, "#tasks")}
    assert all(shown[" and ".join(task.labels)] == "published" for task in TASKS[:LEARNED])
    count("views", 1)
    tiles = page.evaluate("document.querySelector('#tiles').innerText")
    assert f"{100 * figures['mean_accuracy']:.0f}%" in tiles
    assert f"{points(figures['mean_forgetting'])} pp" in tiles
    count("views", 1)
    assert page.complaints == []


def test_images_that_are_dropped_and_chosen(
    server: RunningServer, client: Client, browser: Browser
) -> None:
    page = browser.page
    browser.open(server.http)
    files = written(browser.folder, [image for image, _ in TASKS[1].test[:6]])
    page.drop("#drop", files[0])
    page.wait(f"{ANSWERS}.filter((one) => one.by.startsWith('Version')).length === 1")
    page.choose("#files", files[1:])
    page.wait(f"{ANSWERS}.filter((one) => one.by.startsWith('Version')).length === 6")
    answers = {one["name"]: one for one in page.evaluate(ANSWERS)}
    for path in files:
        (theirs,) = client.predict([path.read_bytes()], top_k=3).predictions
        mine = answers[path.name]
        assert mine["classes"] == [score.label for score in theirs.scores]
        assert abs(mine["share"] - theirs.scores[0].probability) < 0.0011
        assert f"novelty {theirs.novelty:.2f}" in mine["by"]
    count("views", 1)
    wrong = browser.folder / "letter.txt"
    wrong.write_text("no image")
    page.drop("#drop", wrong)
    page.wait("document.querySelector('#answers .wrong') !== null")
    assert "letter.txt" in page.evaluate("document.querySelector('#said').textContent")
    assert browser.errors() == []


def test_the_load_is_shown(server: RunningServer, client: Client, browser: Browser) -> None:
    page = browser.page
    browser.open(server.http)
    image = TASKS[0].test[0][0]
    seen = "document.querySelector('#latency desc').textContent"
    while "99% within" not in page.evaluate(seen):
        client.predict([image])
    assert page.evaluate("document.querySelectorAll('#latency .p-area').length") == 1
    assert "images a second" in page.evaluate("document.querySelector('#waiting').textContent")
    count("views", 1)
    assert page.complaints == []


def test_a_task_while_it_is_learned(
    server: RunningServer, client: Client, browser: Browser
) -> None:
    page = browser.page
    page.look(WIDE, 1000, "light")
    browser.open(server.http)
    page.evaluate("window.marker = 'not loaded again'")
    before = page.evaluate("document.querySelector('#version').textContent")
    if SHOTS:
        for _ in range(600):
            client.predict([TASKS[0].test[0][0]])
    files = written(browser.folder, [TASKS[number].test[number][0] for number in range(3)])
    page.choose("#files", files)
    with ThreadPoolExecutor(1) as threads:
        name = " and ".join(TASKS[LEARNED].labels)
        task = client.learn(TASKS[LEARNED].train, display_name=name)
        ended = threads.submit(waited, server, task)
        page.wait("document.querySelector('#running').hidden === false")
        page.wait("document.querySelector('#learning').innerText.includes('Loss')")
        assert page.evaluate("document.querySelector('#task').textContent") == name
        assert "Epoch" in page.evaluate("document.querySelector('#learning').innerText")
        assert 0 < page.evaluate("document.querySelector('#progress').value") < 1
        count("views", 1)
        if SHOTS:
            shoot(browser, Path(SHOTS))
        assert ended.result(200) == "PUBLISHED"
    page.wait("document.querySelector('#running').hidden")
    page.wait(f"document.querySelector('#version').textContent !== {json.dumps(before)}")
    measure(client, LEARNED + 1)
    newest = f"document.querySelectorAll('{view('accuracy')} rect > title').length"
    page.wait(f"{newest} === {(LEARNED + 1) * (LEARNED + 2) // 2}")
    assert page.evaluate("window.marker") == "not loaded again"
    assert page.complaints == []


def waited(server: RunningServer, task: Task) -> str:
    with Client(server.address) as other:
        return other.wait(task).state.value


def shoot(browser: Browser, folder: Path) -> None:
    """Take the pictures of docs/."""
    folder.mkdir(parents=True, exist_ok=True)
    page = browser.page
    for name, width, scheme in (
        ("console", WIDE, "light"),
        ("console-dark", WIDE, "dark"),
        ("console-phone", PHONE, "light"),
    ):
        page.look(width, 900, scheme)
        height = 1330 if width == WIDE else 1150
        page.look(width, height, scheme, 1.0 if width == WIDE else 2.0)
        screenshot(page, folder / f"{name}.png")
    page.look(WIDE, 1000, "light")


def screenshot(page: Page, path: Path) -> None:
    """Write what the window shows, in few colours: it is a file of the project."""
    page.screenshot(path)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def test_the_keyboard_is_enough(server: RunningServer, browser: Browser) -> None:
    page = browser.page
    page.look(WIDE, 900, "light")
    browser.open(server.http)
    reached: list[str] = []
    while "Versions, as a table" not in reached and len(reached) < 40:
        page.press("Tab", 9)
        reached.append(
            page.evaluate(
                "document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"
            )
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached[-1]
    assert reached[0] == "choose files"
    assert reached.count("As a table") == 4
    assert "Tasks, as a table" in reached
    page.evaluate(f"document.querySelector('{view('forgetting')} summary').focus()")
    page.press("Enter", 13)
    page.wait(f"document.querySelector('{view('forgetting')} details').open")
    # What is open stays so while the page looks at the server.
    page.evaluate("window.fresh = document.querySelector('#fresh').textContent")
    page.wait("document.querySelector('#fresh').textContent !== window.fresh")
    assert page.evaluate(f"document.querySelector('{view('forgetting')} details').open")
    chosen = page.evaluate(
        """new Promise((done) => {
            const input = document.querySelector('#files');
            input.addEventListener('click', (event) => {
                event.preventDefault();
                done(true);
            });
            document.querySelector('#choose').focus();
            setTimeout(() => document.activeElement.click());
        })"""
    )
    assert chosen
    assert page.complaints == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_nothing_is_out_of_reach(
    server: RunningServer, browser: Browser, width: int, scheme: str
) -> None:
    page = browser.page
    page.look(width, 900, scheme)
    browser.open(server.http)
    page.choose("#files", written(browser.folder, [TASKS[0].test[0][0]]))
    page.wait(f"{ANSWERS}.filter((one) => one.by.startsWith('Version')).length === 1")
    assert browser.findings(f"{scheme}, {width} pixels") == []
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.findings(f"{scheme}, {width} pixels, all open") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []


def test_who_wants_no_motion_has_none(server: RunningServer, browser: Browser) -> None:
    page = browser.page
    longest = """Math.max(...[...document.querySelectorAll("*")].map((one) =>
        parseFloat(getComputedStyle(one).transitionDuration)
        + parseFloat(getComputedStyle(one).animationDuration)))"""
    browser.open(server.http)
    assert page.evaluate(longest) > 0
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.call("Emulation.setEmulatedMedia", features=features)
    assert page.evaluate(longest) == 0


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that has learned nothing, and asks who calls."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "tokens.toml").write_text(entry("predict") + entry("learn"))
    with running_server(folder, (*QUICK, "--tokens", str(folder / "tokens.toml"))) as running:
        yield running


def sign_in(page: Page, token: str) -> None:
    page.evaluate(f"document.querySelector('#token').value = {json.dumps(token)}")
    page.click("#sign-in button")


def test_who_asks_signs_in(closed: RunningServer, browser: Browser) -> None:
    page = browser.page
    page.look(PHONE, 700, "dark")
    page.open(f"http://{closed.http}/")
    page.wait("document.querySelector('#sign-in')?.hidden === false")
    assert page.evaluate("document.activeElement.id") == "token"
    assert page.evaluate("document.querySelector('#shown').hidden")
    assert browser.findings("signing in") == []
    sign_in(page, "wrong")
    page.wait("document.querySelector('#problem').textContent.includes('nobody has this token')")
    sign_in(page, "token-of-predict")
    page.wait("document.querySelector('#shown')?.hidden === false")
    page.wait("document.querySelector('#tasks').textContent.includes('the role learn')")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.click("#leave")
    page.wait("document.querySelector('#sign-in')?.hidden === false")
    assert page.evaluate("sessionStorage.length") == 0
    sign_in(page, "token-of-learn")
    page.wait("document.querySelector('#tasks').textContent.includes('inflora learn FOLDER')")
    assert browser.errors() == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_to_do_before_there_is_anything(
    closed: RunningServer, browser: Browser, scheme: str
) -> None:
    page = browser.page
    page.look(PHONE, 700, scheme)
    page.open(f"http://{closed.http}/")
    page.wait("document.querySelector('#sign-in')?.hidden === false")
    sign_in(page, "token-of-learn")
    page.wait("document.querySelector('#shown')?.hidden === false")
    for name in VIEWS:
        text = page.wait(f"document.querySelector('{view(name)}').textContent")
        assert "inflora learn FOLDER" in text, name
    assert page.evaluate("document.querySelector('#drop').hidden")
    assert page.evaluate("document.querySelector('#cannot').hidden") is False
    assert browser.findings(f"nothing learned, {scheme}") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


# -- the report -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """Return what is in a store, but for what SQLite does with its own."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


def test_the_report_is_one_file_of_the_same(server: RunningServer, browser: Browser) -> None:
    page = browser.page
    before = contents(server.store)
    figures = reported(server, browser.folder)
    assert contents(server.store) == before
    report = browser.folder / "report.html"
    FOUND["report_bytes"] = report.stat().st_size
    assert "<script" not in report.read_text()
    for width, scheme in ((WIDE, "light"), (WIDE, "dark"), (PHONE, "light")):
        page.look(width, 900, scheme)
        page.open(report.as_uri())
        page.wait("document.querySelectorAll('svg.picture').length === 5")
        assert browser.findings(f"the report, {scheme}, {width} pixels") == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.requests == [report.as_uri()] * 3
    assert page.complaints == []
    page.look(WIDE, 900, "light")
    browser.open(server.http)
    theirs = {name: inner(page, view(name)) for name in VIEWS}
    page.open(report.as_uri())
    page.wait("document.title === 'InfLoRA report' && document.readyState === 'complete'")
    headings = page.evaluate("[...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert headings[-1] == "Tasks"
    for number, name in enumerate(VIEWS):
        assert inner(page, f"section:nth-of-type({number + 1})") == theirs[name], name
    count("views", len(VIEWS))
    assert f"version {figures['version']}" in page.evaluate("document.body.textContent")
    if SHOTS:
        page.look(860, 1120, "light")
        screenshot(page, Path(SHOTS) / "report.png")


def inner(page: Page, where: str) -> str:
    """Return the picture in some part of a page, as it was drawn."""
    found: str = page.evaluate(f"document.querySelector({json.dumps(where)} + ' svg').outerHTML")
    return found


@pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="there is no resvg_py")
def test_pictures_of_the_report(server: RunningServer, tmp_path: Path) -> None:
    figures = reported(server, tmp_path, "--png", str(tmp_path / "pictures"))
    assert {Path(name).stem for name in figures["files"]} == {*VIEWS, "report"}
    for name in VIEWS:
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            assert image.width == 364 * 3 or name == "lineage"
            colours = image.convert("RGB").getcolors(2**24)
            assert colours is not None
            # On white; with text, whose edges have many shades of grey.
            assert max(colours)[1] == (255, 255, 255)
            assert len(colours) > 20


@pytest.mark.skipif(not DIST.is_dir(), reason="the page of clients/web is not built: make web")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_of_devices_is_in_reach(browser: Browser, scheme: str) -> None:
    page = browser.page
    with served(browser.folder / "site") as site:
        page.look(PHONE, 700, scheme)
        page.open(f"{site.origin}/")
        page.wait("document.querySelector('#choose') !== null")
        assert browser.findings(f"the page of devices, {scheme}") == []
