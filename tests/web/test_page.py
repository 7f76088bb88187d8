"""The page in a headless Chromium, with models that a real server has learned and published."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from inflora_client import Client
from inflora_core.compute import Compute
from inflora_core.config import LearnConfig
from inflora_core.progress import Tracker
from inflora_core.spool import SpoolWriter
from inflora_core.store import Store
from inflora_core.worker import Worker
from inflora_edge import Device, Model, Server
from tests.benchmarks import data
from tests.benchmarks.accuracy import STREAM, STREAM_BACKBONE
from tests.chromium import Page, chromium
from tests.core import tiny
from tests.running_server import RunningServer, running_server
from tests.web.conftest import TASKS
from tests.web.site import Site

pytestmark = pytest.mark.slow

POLL = "?poll=0.1"
CLOSE = 0.02
"""How far probabilities and novelty may lie apart: browsers have decoders of their own."""

RESULTS = """[...document.querySelectorAll("#results > li")].map((entry) => ({
    name: entry.querySelector(".name").textContent,
    label: entry.querySelector(".best strong")?.textContent,
    share: parseFloat(entry.querySelector(".best .share")?.textContent) / 100,
    novelty: parseFloat(entry.querySelector(".novelty .value")?.textContent),
    isNew: entry.querySelector(".new")?.hidden === false,
    version: entry.querySelector(".by")?.textContent,
    classes: [...entry.querySelectorAll("tbody th")].map((one) => one.textContent),
    wrong: entry.querySelector(".wrong")?.textContent,
}))"""


def written(folder: Path, images: list[bytes]) -> list[Path]:
    """Write images to files."""
    folder.mkdir()
    paths = [folder / f"{number:02}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    return paths


def answers(page: Page, count: int, version: int) -> dict[str, dict[str, Any]]:
    """Return what the page says of each file, once all of it is of a version."""
    page.wait(f"{RESULTS}.filter((one) => one.version === 'Version {version}').length === {count}")
    return {one["name"]: one for one in page.evaluate(RESULTS)}


def agreed(client: Client, found: dict[str, dict[str, Any]], files: list[Path]) -> int:
    """Return of how many files the page says what the server does; numbers must be close in all."""
    count = 0
    for path in files:
        (theirs,) = client.predict([path.read_bytes()], top_k=5).predictions
        mine = found[path.name]
        assert mine["classes"] == [score.label for score in theirs.scores]
        assert abs(mine["share"] - theirs.scores[0].probability) < CLOSE, path
        assert abs(mine["novelty"] - theirs.novelty) < CLOSE, path
        assert mine["isNew"] == (theirs.novelty > 0.95), path
        count += mine["label"] == theirs.scores[0].label
    return count


def open_page(page: Page, site: Site, version: int) -> None:
    """Open it, and wait until a version answers."""
    page.open(f"{site.origin}/{POLL}")
    shows(page, version)


Opener = Callable[[int], None]


@pytest.fixture
def open_at(client: Client, device: Device, site: Site, page: Page) -> Opener:
    """Make a version current, and open the page that follows it."""

    def open_it(version: int) -> None:
        promote(client, device, version)
        open_page(page, site, version)

    return open_it


def promote(client: Client, device: Device, version: int) -> None:
    """Make a version current, and have the device fetch it."""
    client.promote(version)
    device.update()


def shows(page: Page, version: int) -> None:
    page.wait(f"document.querySelector('#version')?.textContent === 'Version {version}'")


def untroubled(page: Page, site: Site) -> None:
    """The console is silent, and all that was asked for lies here."""
    assert page.complaints == []
    assert page.requests
    for address in page.requests:
        assert address.startswith((f"{site.origin}/", f"blob:{site.origin}/")), address


def test_it_answers_as_the_server_and_goes_on_to_the_next_version(
    open_at: Opener, client: Client, device: Device, site: Site, page: Page, tmp_path: Path
) -> None:
    open_at(2)
    page.evaluate("window.marker = 'not loaded again'")
    files = written(tmp_path / "images", [x for task in TASKS[:4] for x, _ in task.test[::15]][:20])
    assert len(files) == 20
    page.choose("#files", files)
    before = answers(page, 20, 2)
    assert agreed(client, before, files) == 20

    client.wait(client.learn(TASKS[2].train))
    device.update()
    assert device.model.version > 2
    shows(page, device.model.version)
    # What is on the page is asked of the new version, which knows more.
    after = answers(page, 20, device.model.version)
    assert agreed(client, after, files) == 20
    assert {one["label"] for one in after.values()} > {one["label"] for one in before.values()}
    assert page.evaluate("window.marker") == "not loaded again"
    assert page.evaluate("document.querySelector('#known ul').children.length") == 6
    untroubled(page, site)


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_a_smaller_form_does_as_well(
    server: RunningServer, client: Client, site: Site, page: Page, tmp_path: Path, form: str
) -> None:
    client.promote(2)
    with Device(Server(server.address), site.models, threads=1, form=form) as device:
        device.update()
        open_page(page, site, 2)
        files = written(tmp_path / "images", [x for task in TASKS[:2] for x, _ in task.test[:3]])
        page.choose("#files", files)
        found = answers(page, len(files), 2)
        for path in files:
            mine = device.model.predict(path)
            assert found[path.name]["label"] == mine.label
            assert abs(found[path.name]["share"] - mine.probabilities[0]) < CLOSE
    untroubled(page, site)


def test_a_version_that_was_taken_back(
    open_at: Opener, client: Client, device: Device, site: Site, page: Page
) -> None:
    open_at(2)
    promote(client, device, 1)
    shows(page, 1)
    untroubled(page, site)


def test_what_is_damaged_or_no_model_is_refused_and_the_old_one_goes_on(
    open_at: Opener, client: Client, device: Device, site: Site, page: Page, tmp_path: Path
) -> None:
    open_at(1)
    whole = Device.active_file(site.models).read_bytes()
    (image,) = written(tmp_path / "images", [TASKS[0].test[0][0]])
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    foreign = b"this is a page of some proxy, and no model"
    other_version = whole.replace(b"version\x12\x011", b"version\x12\x012")
    for content, sha256, said in (
        (bytes(flipped), hashlib.sha256(whole + b"2").hexdigest(), "damaged on its way"),
        (foreign, hashlib.sha256(foreign).hexdigest(), "is no model of InfLoRA Server"),
        (whole[:-9999], hashlib.sha256(whole[:-9999]).hexdigest(), "failed its test"),
        (other_version, hashlib.sha256(other_version).hexdigest(), "says that it is version 2"),
    ):
        (site.models / f"7-{sha256}.onnx").write_bytes(content)
        state = site.models / "draft.json"
        state.write_text(json.dumps({"active": {"version": 7, "sha256": sha256}}))
        state.replace(site.models / "state.json")
        page.wait(f"document.querySelector('#problem').textContent.includes({json.dumps(said)})")
        assert "Version 1 goes on answering" in page.evaluate(
            "document.querySelector('#problem').textContent"
        )
        # Not for ever: a file of some hundred MB would be fetched every few seconds.
        page.wait("document.querySelector('#problem').textContent.includes('not tried again')")
        assert site.asked.count(f"/models/7-{sha256}.onnx") == 3
    page.choose("#files", [image])
    assert agreed(client, answers(page, 1, 1), [image]) == 1

    promote(client, device, 2)
    # It found its state changed by us, and says anew what is active.
    shows(page, 2)
    page.wait("document.querySelector('#problem').hidden")
    untroubled(page, site)


def test_a_page_before_there_is_a_model(
    client: Client, device: Device, site: Site, page: Page, tmp_path: Path
) -> None:
    client.promote(1)
    page.open(f"{site.origin}/{POLL}")
    page.wait("document.querySelector('#problem')?.textContent.includes('inflora-edge follow')")
    (image,) = written(tmp_path / "images", [TASKS[0].test[0][0]])
    page.choose("#files", [image])  # it will be answered when there is one
    device.update()
    assert agreed(client, answers(page, 1, 1), [image]) == 1
    page.wait("document.querySelector('#problem').hidden")


def test_files_that_are_dropped(
    open_at: Opener, client: Client, site: Site, page: Page, tmp_path: Path
) -> None:
    open_at(1)
    (image,) = written(tmp_path / "images", [TASKS[1].test[0][0]])
    page.drop("#drop", image)
    assert agreed(client, answers(page, 1, 1), [image]) == 1
    text = tmp_path / "notes.png"
    text.write_text("no image")
    page.drop("#drop", text)
    page.wait(f"{RESULTS}[0].wrong?.includes('no image that the browser can read')")
    Image.new("RGB", (404, 4)).save(tmp_path / "line.png")
    page.drop("#drop", tmp_path / "line.png")
    page.wait(f"{RESULTS}[0].wrong?.includes('404 x 4 pixels')")
    # A model: the one of the server is no longer followed, until somebody asks for it.
    export = client.download("2", to=tmp_path / "export.onnx").path
    page.drop("#drop", export)
    shows(page, 2)
    assert "export.onnx" in page.evaluate("document.querySelector('#source').textContent")
    page.wait(f"{RESULTS}[2].version === 'Version 2'")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    page.drop("#drop", tmp_path / "bad.onnx")
    page.wait("document.querySelector('#problem').textContent.includes('bad.onnx')")
    shows(page, 2)
    page.click("#follow")
    shows(page, 1)
    untroubled(page, site)


DECIDING = ("alpha.png", "palette.png", "turned.jpg")
"""Pictures that look different where transparency or EXIF is passed over."""


def pictures() -> dict[str, bytes]:
    """Return one digit in all ways that decoders may see differently."""
    digit = Image.open(io.BytesIO(TASKS[1].test[0][0])).convert("L")
    picture = digit.resize((60, 90), Image.Resampling.BICUBIC).convert("RGB")
    upright = Image.Exif()
    upright[0x0112] = 6
    seen_through = picture.copy()
    seen_through.putalpha(Image.linear_gradient("L").resize(picture.size))
    palette = picture.quantize(8)
    darkest = min(range(8), key=lambda i: sum((palette.getpalette() or [])[3 * i : 3 * i + 3]))
    saved: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.png": (picture, {}),
        "grey.png": (picture.convert("L"), {}),
        "alpha.png": (seen_through, {}),
        "palette.png": (palette, {"transparency": darkest}),
        "turned.jpg": (picture, {"quality": 92, "exif": upright.tobytes()}),
        "halved.jpg": (picture, {"quality": 92, "subsampling": 2}),
        "lossless.webp": (picture, {"lossless": True}),
        "large.png": (picture.resize((1000, 1500)), {}),
        "two.bmp": (picture.resize((2, 2)), {}),
    }
    content = {}
    for name, (image, options) in saved.items():
        file = io.BytesIO()
        image.save(file, Path(name).suffix[1:].replace("jpg", "jpeg"), **options)
        content[name] = file.getvalue()
    return content


def test_pixels_are_those_of_the_server(
    open_at: Opener, client: Client, device: Device, site: Site, page: Page, tmp_path: Path
) -> None:
    files = []
    for name, content in pictures().items():
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    open_at(2)
    page.choose("#files", files)
    assert agreed(client, answers(page, len(files), 2), files) == len(files)
    for path in files:
        if path.name in DECIDING:
            as_stored = device.model.predict(np.asarray(Image.open(path).convert("RGB")))
            best, share = as_stored.classes[0], as_stored.probabilities[0]
            right = device.model.predict(path)
            assert abs(share - right.probabilities[right.classes.index(best)]) > 2 * CLOSE, path
    untroubled(page, site)


@contextmanager
def camera_on(site: Site, folder: Path) -> Iterator[tuple[Page, bytes]]:
    """Open the page at version 2 with its camera on, which sees one digit; yield that, too."""
    frame = Image.open(io.BytesIO(TASKS[1].test[0][0])).convert("RGB")
    file = io.BytesIO()
    frame.resize((640, 640), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    # A film of one picture: the one that the camera sees.
    (folder / "film.mjpeg").write_bytes(file.getvalue() * 5)
    film = f"--use-file-for-fake-video-capture={folder / 'film.mjpeg'}"
    with chromium(folder / "with-camera", film) as page:
        open_page(page, site, 2)
        page.click("#camera")
        page.wait("document.querySelector('#seen .by')?.textContent === 'Version 2'")
        yield page, file.getvalue()


CAMERA_OFF = """document.querySelector("#live").hidden
    && document.querySelector("#video").srcObject === null
    && document.querySelector("#camera").ariaPressed === "false"
    && document.querySelector("#camera").textContent === "Use the camera"
"""


def test_the_camera(client: Client, device: Device, site: Site, tmp_path: Path) -> None:
    promote(client, device, 2)
    (digit,) = {label for _, label in TASKS[1].test[:1]}
    with camera_on(site, tmp_path) as (page, frame):
        expected = Model(Device.active_file(site.models), 1).predict(frame)
        assert expected.label == digit
        assert page.evaluate("document.querySelector('#seen .best strong').textContent") == digit
        share = page.evaluate("parseFloat(document.querySelector('#seen .share').textContent)")
        assert abs(share / 100 - expected.probabilities[0]) < 0.1  # a film is compressed twice
        assert page.evaluate("document.querySelector('#said').textContent").startswith("Camera:")
        promote(client, device, 1)
        page.wait("document.querySelector('#seen .by')?.textContent === 'Version 1'")
        page.click("#camera")
        page.wait(CAMERA_OFF)
        untroubled(page, site)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        # As when it is unplugged: the video goes on showing its last frame.
        ("document.querySelector('#video').srcObject.getTracks()[0].stop()", "no more pictures"),
        # A video without a frame, of which the browser makes no picture.
        ("document.querySelector('#video').srcObject = null", "cannot be read"),
    ],
    ids=["ended", "unreadable"],
)
def test_a_camera_that_fails_is_switched_off_and_can_be_used_again(
    client: Client, device: Device, site: Site, tmp_path: Path, fault: str, said: str
) -> None:
    promote(client, device, 2)
    with camera_on(site, tmp_path) as (page, _):
        page.evaluate(f"{{{fault}}}")
        page.wait(CAMERA_OFF)
        assert said in page.evaluate("document.querySelector('#problem').textContent")
        assert page.evaluate("document.querySelector('#seen').textContent") == ""
        page.click("#camera")
        page.wait("document.querySelector('#seen .by')?.textContent === 'Version 2'")
        page.wait("document.querySelector('#problem').hidden")
        page.click("#camera")
        page.wait(CAMERA_OFF)
        untroubled(page, site)


HELD_BACK = """
    window.threads = [];
    window.Worker = class extends Worker {
        constructor(...given) {
            super(...given);
            window.threads.push(this);
        }
        postMessage(message, ...rest) {
            if (this.keeps && message.kind === "classify") this.kept = true;
            else super.postMessage(message, ...rest);
        }
    };
"""
"""Keeps the pages' threads at hand, and on demand what is asked of one from reaching it."""


def test_a_thread_that_fails_after_its_version_was_replaced_is_no_concern(
    client: Client, device: Device, site: Site, tmp_path: Path
) -> None:
    promote(client, device, 2)
    with chromium(tmp_path / "browser") as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=HELD_BACK)
        open_page(page, site, 2)
        page.click("#camera")
        page.wait("document.querySelector('#seen .by')?.textContent === 'Version 2'")
        page.evaluate("threads[0].keeps = true")
        page.wait("threads[0].kept")  # a frame waits for version 2, which will not answer
        promote(client, device, 1)
        shows(page, 1)
        page.evaluate(
            """{
                window.texts = [];
                const seen = document.querySelector("#seen");
                new MutationObserver(() => window.texts.push(seen.textContent))
                    .observe(seen, { childList: true, subtree: true });
                threads[0].dispatchEvent(new ErrorEvent("error", { message: "out of memory" }));
            }"""
        )
        page.wait("document.querySelector('#seen .by')?.textContent === 'Version 1'")
        assert page.evaluate("texts.filter((one) => one.includes('load the page again'))") == []
        untroubled(page, site)


def test_keyboard_and_a_narrow_window(open_at: Opener, page: Page) -> None:
    page.look(320, 640, "light")
    open_at(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    reached = []
    for _ in range(3):
        page.press("Tab", 9)
        reached.append(page.evaluate("document.activeElement.textContent"))
    assert reached == ["Choose files", "Use the camera", "All 2 classes"]
    page.press("Enter", 13)
    page.wait("document.querySelector('#known').open")
    assert page.evaluate("document.querySelector('#known ul').innerText.split('\\n')") == list(
        TASKS[0].labels
    )


def test_labels_are_text(site: Site, page: Page, tmp_path: Path) -> None:
    """Whatever a class is called, it is no HTML."""
    names = ["<img src=x onerror=alert(1)>", "Größe & 猫"]
    store = Store.open(tmp_path / "store")
    worker = Worker(store, Compute(), 1)
    worker.prepare(str(tiny.write_backbone(tmp_path)), None)
    with SpoolWriter(tmp_path / "spool") as spool:
        for colour, name in zip(("red", "green"), names, strict=True):
            for number in range(8):
                spool.add(tiny.png(colour, number), name)
        spool.finish()
    config = LearnConfig(epochs=1, batch_size=8, rank=2)
    version = worker.learn("task", tmp_path / "spool", config, None, Tracker())
    (tmp_path / "named.onnx").write_bytes(store.onnx(version))
    page.open(f"{site.origin}/{POLL}")
    page.wait("document.querySelector('#problem')?.textContent.includes('inflora-edge follow')")
    page.choose("#files", [tmp_path / "named.onnx"])
    shows(page, version)
    shown = page.evaluate("[...document.querySelectorAll('#known li')].map((x) => x.textContent)")
    assert shown == names


@pytest.mark.skipif(
    not STREAM.exists() or not STREAM_BACKBONE.exists(),
    reason=f"no {STREAM.name} beside the checkout",
)
def test_a_real_backbone(site: Site, page: Page, tmp_path: Path) -> None:
    """DeiT-tiny: twelve blocks, 224 pixels, CIFAR-100 of classes known and unknown."""
    tasks = data.load(str(STREAM), 5, 10, 0)
    files = written(tmp_path / "images", [x for task in tasks for x, _ in task.test[::50]][:20])
    with (
        running_server(tmp_path, ("--backbone", str(STREAM_BACKBONE), "--epochs", "1")) as server,
        Client(server.address) as client,
    ):
        client.wait(client.learn(tasks[0].train))
        page.open(f"{site.origin}/{POLL}")
        page.wait("document.querySelector('#problem')?.textContent.includes('inflora-edge follow')")
        page.choose("#files", [client.download("1", to=tmp_path / "model.onnx").path])
        shows(page, 1)
        page.choose("#files", files)
        assert agreed(client, answers(page, 20, 1), files) == 20


def test_screenshots(open_at: Opener, page: Page, tmp_path: Path) -> None:
    """As docs/images/web.png was made; they are under build/web."""
    out = Path(__file__).parents[2] / "build" / "web"
    out.mkdir(parents=True, exist_ok=True)
    (unlike := tmp_path / "traffic-light.png").write_bytes(traffic_light())
    files = []
    for label in TASKS[1].labels:
        image = next(x for x, name in TASKS[1].test if name == label)
        files.append(tmp_path / f"{label.replace(' ', '-')}.png")
        files[-1].write_bytes(image)
    open_at(2)
    page.choose("#files", [*files, unlike])
    answers(page, 3, 2)
    for width, height, scheme in ((1000, 680, "light"), (1000, 680, "dark"), (360, 780, "dark")):
        page.look(width, height, scheme)
        page.screenshot(out / f"web-{width}-{scheme}.png")
    assert np.asarray(Image.open(out / "web-1000-light.png").convert("L")).std() > 5


def traffic_light() -> bytes:
    """Draw something that is no digit."""
    picture = Image.new("RGB", (320, 320), (120, 170, 220))
    pen = ImageDraw.Draw(picture)
    pen.rounded_rectangle((110, 20, 210, 300), 20, fill=(40, 45, 50))
    for number, colour in enumerate([(230, 60, 50), (240, 190, 60), (60, 190, 100)]):
        pen.ellipse((128, 38 + 88 * number, 192, 102 + 88 * number), fill=colour)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
