"""Runs the blocks of a page, in their order, in a folder of its own and with a real server.

A page is run word by word, but for what ``SUBSTITUTES`` and ``shell.sh`` say. The folder holds what
pages take for granted: some photos, a store that has learned them, and the repository's own files.
A page that does not begin by starting a server finds one that answers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from inflora_client import Client
from tests.benchmarks.checkout import ROOT
from tests.docs.pages import Block
from tests.running_server import running_server

PEOPLE = ("Jane Doe", "cat", "dog")
"""Classes of the photos: the digits 0, 1 and 2, since no photos are at hand."""
EACH = 12
TESTS = 4
PHOTOS = (
    "another.jpg", "another.png", "new.jpg", "photo.jpg", "unknown.jpg", "more-photos/1.jpg",
)  # fmt: skip
STORES = ("STORE", "shop")
"""What pages call a store that is not named ``inflora-store``; it is that one."""

ADDRESSES = ("localhost:50051", "learner.example:50051", "inflora.plant.example:50051")
"""Where pages say that the server is."""

SUBSTITUTES = {
    "/var/lib/model": "device",
    "IP:10.0.0.5": "IP:127.0.0.1",  # in a certificate: where the server is then called
    "s3://models/flowers": "file://$PWD/shared",  # in commands only
    "pretrained=True": "pretrained=False",  # weights of a hub
}
"""What pages name and no test may use, and what is used in its place."""

KUSTOMIZATION = "kustomization.yaml"
"""What the page about Kubernetes has its reader write, and then apply."""

SHELL = Path(__file__).with_name("shell.sh")
SECONDS = 400.0
"""Longest time for one command."""


class BlockFailedError(Exception):
    """A command of a page did not do what the page says."""


@dataclass(frozen=True)
class World:
    """What all pages are run with.

    Attributes:
        folder: Holds the photos, and ``inflora-store``, in which their classes are learned.
        kubectl: The program, None where it is not installed.
        oip: A Python that has the clients of the Open Inference Protocol; likewise.
    """

    folder: Path
    kubectl: Path | None
    oip: Path | None


def make_world(folder: Path) -> World:
    """Write the photos, and have a server with the bundled backbone learn them."""
    home = folder / "home"
    write_photos(home)
    examples = [(path, path.parent.name) for path in sorted((home / "photos").glob("*/*"))]
    with running_server(folder / "server") as server, Client(server.address) as client:
        client.wait(client.learn(examples, epochs=1))
    (folder / "server" / "store").rename(home / "inflora-store")
    return World(home, _existing(".venv-deploy/bin/kubectl"), _existing(".venv-oip/bin/python"))


def write_photos(folder: Path) -> None:
    """Write handwritten digits as if they were photos."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, name in enumerate(PEOPLE):
        pixels = digits.images[digits.target == number][: EACH + TESTS] * (255 / 16)
        pictures = [Image.fromarray(np.uint8(x)).resize((64, 64)) for x in pixels]
        for kind, some in (("photos", pictures[:EACH]), ("test-photos", pictures[EACH:])):
            (folder / kind / name).mkdir(parents=True)
            for index, picture in enumerate(some):
                picture.convert("RGB").save(folder / kind / name / f"{index}.jpg")
    (folder / "more-photos").mkdir()
    for name in PHOTOS:
        pictures[-1].convert("RGB").save(folder / name)


def _existing(name: str) -> Path | None:
    return ROOT / name if (ROOT / name).exists() else None


class Sandbox:
    """A page's folder, and what is left there from one block to the next.

    Args:
        folder: Where the commands are run.
        own: Of the sandbox's own, outside of that; empty.
        environment: Of the commands.
        oip: A Python that has the clients of the Open Inference Protocol.
    """

    def __init__(
        self, folder: Path, own: Path, environment: dict[str, str], oip: Path | None = None
    ) -> None:
        self.folder = folder
        self._own = own
        self._oip = oip
        self._environment = {**environment, "SANDBOX": str(own)}

    def run(self, block: Block) -> list[str]:
        """Run a block, and return what each of its commands printed.

        Raises:
            BlockFailedError: with the command, and what was printed.
        """
        if block.language == "yaml":
            (self.folder / KUSTOMIZATION).write_text(block.text)
            return []
        if block.language == "python":
            return [self._run(block, block.text, self._python(block), [])]
        printed = []
        for command, prints in block.commands():
            words = dry(command) if block.kind == "dry" else command
            printed.append(self._run(block, command, substituted(words, "$INFLORA_SERVER"), prints))
        return printed

    @property
    def _state(self) -> Path:
        return self._own / "state"

    def _python(self, block: Block) -> str:
        """Write a block of Python as a file, and return the command that runs it."""
        script = self._own / "block.py"
        script.write_text(substituted(block.text, self._address()))
        if "tritonclient" not in block.text:
            return f"python {shlex.quote(str(script))}"
        if self._oip is None:
            raise BlockFailedError(f"{block.where}: there is no .venv-oip: run `make venv-oip`")
        return shlex.join([str(self._oip), str(script)])

    def _address(self) -> str:
        state = self._state.read_text() if self._state.exists() else ""
        found = re.findall(r'^declare -x INFLORA_SERVER="(.+)"$', state, re.MULTILINE)
        return found[0] if found else self._environment.get("INFLORA_SERVER", "")

    def _run(self, block: Block, command: str, words: str, prints: list[str]) -> str:
        state = shlex.quote(str(self._state))
        lines = ["set -euo pipefail", f". {shlex.quote(str(SHELL))}"]
        if self._state.exists():
            lines.append(f". {state}")
        # What the next command begins with: variables that were set, and the folder.
        keep = f'declare -px >{state}; echo "cd $(printf %q "$PWD")" >>{state}'
        script = "\n".join([*lines, f"trap {shlex.quote(keep)} EXIT", words])
        printed = self._own / "printed"
        # Into a file: a server in the background may hold a pipe open.
        with printed.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", script], cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            status = process.wait(SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # what the shell has started, too
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BlockFailedError(f"{block.where}: {command}\ntook too long") from error
            raise
        said = printed.read_text(errors="replace")
        if status not in (0, block.may_end_with):
            raise BlockFailedError(
                f"{block.where}: {command}\nended with {status}:\n{said[-3000:]}"
            )
        shapes = {shape(line) for line in said.splitlines()}
        if missing := [line for line in prints if shape(line) not in shapes]:
            raise BlockFailedError(
                f"{block.where}: {command}\ndid not print {missing[0]!r}, but:\n{said[-3000:]}"
            )
        return said

    def stop(self) -> None:
        """End the servers that the page has started."""
        for path in (self._own / "servers").glob("*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)


def shape(line: str) -> str:
    """Return a line without what differs from run to run: figures, and how wide columns are."""
    figures = re.sub(r"\d+(?:[.:]\d+)+|\d+(?=%| bytes| s\b)|\b[0-9a-f]{64}\b", "0", line)
    return re.sub(r"[\s─━]+", " ", figures).strip()


def substituted(text: str, address: str) -> str:
    """Put what a test can use in place of what a page names."""
    for name in ADDRESSES:
        text = text.replace(name, address)
    for name, other in SUBSTITUTES.items():
        text = text.replace(name, other)
    return text


def dry(command: str) -> str:
    """Return what kubectl can do of a command without a cluster.

    What would be created is shown, and a label put on that; what would be applied is rendered; what
    would be waited for has to be in there.
    """
    show = "--dry-run=client --output=yaml"
    render = "kubectl kustomize --load-restrictor=LoadRestrictionsNone ."
    if " create " in command:
        return f"{command} {show}"
    if label := re.fullmatch(r"kubectl label namespace (\S+) (\S+)", command):
        made = f"kubectl create namespace {label[1]} {show}"
        return f"{made} | kubectl label --local --filename - {label[2]} --output=yaml"
    if command == "kubectl apply -k .":
        return render
    if waited := re.search(r" rollout status (statefulset|deployment)/(\S+)", command):
        return f"{render} | grep -iA 9 'kind: {waited[1]}' | grep 'name: {waited[2]}$'"
    raise BlockFailedError(f"{command}: cannot be tried without a cluster")


def to_run(block: Block) -> bool:
    """Whether a block is something to do when its page is followed."""
    return block.kind in ("run", "dry") or "kind: Kustomization" in block.text


@contextmanager
def sandbox(world: World, folder: Path, page_blocks: list[Block]) -> Iterator[Sandbox]:
    """Make a page's folder; if it begins without a server, there is one that knows the photos."""
    shutil.copytree(world.folder, folder / "page", symlinks=True)
    for name in ("clients", "deploy", "docs"):
        (folder / "page" / name).symlink_to(ROOT / name)
    for name in STORES:
        (folder / "page" / name).symlink_to("inflora-store")
    if any(block.kind == "dry" for block in page_blocks):
        (folder / "page" / "inflora").symlink_to(ROOT)
        (folder / "page" / "tokens.toml").touch()
    text = "\n".join(block.text for block in page_blocks)
    with _server(folder, text) as address:
        environment = _environment(world, folder, text, address)
        (folder / "own").mkdir()
        made = Sandbox(folder / "page", folder / "own", environment, world.oip)
        try:
            yield made
        finally:
            made.stop()


@contextmanager
def _server(folder: Path, text: str) -> Iterator[str]:
    first = re.search(r"^(\$ )?inflora (\w+)", text, re.MULTILINE)
    if first and first[2] in ("doctor", "serve", "token"):
        yield ""
        return
    shutil.copytree(folder / "page" / "inflora-store", folder / "running" / "store")
    with running_server(folder / "running") as server:
        yield server.address


def _environment(world: World, folder: Path, text: str, address: str) -> dict[str, str]:
    programs = [str(Path(sys.executable).parent)]
    if world.kubectl:
        programs.append(str(world.kubectl.parent))
    if "pip install" in text:
        programs.insert(0, str(_pip(folder / "tools")))
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    found = {**os.environ, "PATH": path, "HOME": str(folder), "COLUMNS": "120", "TERM": "dumb"}
    if address:
        found["INFLORA_SERVER"] = address
    return found


def _pip(folder: Path) -> Path:
    """Make an environment with pip, and all that this one has; return where its programs are."""
    venv.create(folder, with_pip=True, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    # Not the paths alone: what is installed to be edited is a .pth of theirs.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in theirs]
    (packages / "theirs.pth").write_text("".join(lines))
    return folder / "bin"
