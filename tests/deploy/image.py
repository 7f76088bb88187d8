"""That ``deploy/Dockerfile`` builds, and that what it builds answers.

No registry of images can be reached where the tests run, so the base is made on the spot: Debian's
own Python of the same release, by debootstrap, under the name that the Dockerfile's argument takes.
buildah then builds `predictor` from the Dockerfile as it is, and its entrypoint is run in the
image, as the image's user, until it answers for its health.

Needs root, and Debian's `buildah` and `debootstrap`; where they are not installed the part says so
and does nothing. Files lie under `build/image`, and stay there for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "image"
BASE = "localhost/python-local"
RELEASE = "bookworm"
USER = 10001
TARGET = "predictor"
WAIT = 120.0
"""Seconds that a server may take until it answers."""


def measure(folder: Path) -> dict[str, Any]:
    """Build, run and ask; return what came of it.

    Args:
        folder: Empty; the store that the image is tried with is put there.
    """
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    if missing or os.getuid() != 0:
        reason = f"needs root, and of Debian: {' '.join(missing)}"
        print(f"image: not built: {reason}")
        return {"image_built": 0, "image_not_built": reason}
    began = time.monotonic()
    BUILD.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    size = ""
    try:
        _make_base()
        _buildah(
            *("build", "--format", "docker", "--file", "deploy/Dockerfile", "--target", TARGET),
            *("--build-arg", f"BASE={BASE}", "--tag", f"localhost/inflora-{TARGET}"),
            *_registry_settings(),
            ".",
        )
        (image,) = json.loads(_buildah("images", "--json", f"localhost/inflora-{TARGET}"))
        size = image["size"]
        failed += _faults(folder / "store")
    except subprocess.CalledProcessError as error:
        failed.append(f"{' '.join(map(str, error.cmd))}: {(error.stderr or '')[-3000:]}")
    return {
        "image_built": int(not failed),
        "image_size": size,
        "image_seconds": round(time.monotonic() - began, 1),
        "failed": failed,
    }


def _buildah(*arguments: object, quiet: bool = True) -> str:
    command = ["buildah", "--root", BUILD / "storage", "--runroot", BUILD / "run", *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    return {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}


def _registry_settings() -> list[str]:
    """Have pip in the build find the registry where pip here does, and trust it."""
    settings = [Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf"]
    volumes = [f"{path}:/etc/pip.conf:ro" for path in settings if path.is_file()][-1:]
    authorities = Path("/etc/ssl/certs/ca-certificates.crt")
    volumes += [f"{authorities}:{authorities}:ro"] if authorities.is_file() else []
    return [f"--volume={volume}" for volume in volumes]


def _make_base() -> None:
    if BASE in _buildah("images", "--format={{.Name}}"):
        return
    with tempfile.TemporaryDirectory(dir=BUILD.parent) as name:
        folder = Path(name) / "root"
        subprocess.run(
            [
                *("debootstrap", "--variant=minbase"),
                "--include=python3,python3-pip,python3-venv,python-is-python3,ca-certificates",
                *(RELEASE, str(folder)),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        # As the images of Docker's library: pip may install into the system's Python.
        for marker in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        container = _buildah("from", "scratch")
        _buildah("copy", container, folder, "/")
        _buildah("commit", "--rm", container, BASE)


def _faults(store: Path) -> list[str]:
    """Run the image's entrypoint on a store, and ask it."""
    container = _buildah("from", f"localhost/inflora-{TARGET}")
    try:
        _make_store(store)
        return _run_and_ask(container, store)
    finally:
        _buildah("rm", container)


def _make_store(store: Path) -> None:
    """Make a store with a version, as a predictor without a learner needs one."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from inflora_core.store import Store\n"
        "from tests.service.test_bad_input import publish\n"
        "from tests.service.conftest import make_backbone, RED\n"
        "make_backbone(Store.open(Path(sys.argv[1])))\n"
        "publish(Path(sys.argv[1]), red=RED)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(store)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    for path in [store, *store.rglob("*")]:
        os.chown(path, USER, USER)


def _run(container: str, store: Path, *command: str) -> list[str]:
    return [
        *("buildah", "--root", str(BUILD / "storage"), "--runroot", str(BUILD / "run"), "run"),
        *("--user", f"{USER}:{USER}", "--volume", f"{store}:/store", container, "--", *command),
    ]


def _run_and_ask(container: str, store: Path) -> list[str]:
    made = json.loads(_buildah("inspect", container))["Docker"]["config"]
    wanted = {
        "Entrypoint": ["python", "-m", "inflora_service"],
        "User": f"{USER}:{USER}",
        "Healthcheck": ["CMD", "python", "-m", "inflora_service.probe"],
    }
    made["Healthcheck"] = made["Healthcheck"]["Test"]
    found = [f"{name} is {made[name]}" for name in wanted if made[name] != wanted[name]]
    # The build has no network of its own, so the image's own ports may be taken.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        _run(
            *(container, store, "python", "-m", "inflora_service", "--store=/store"),
            *("--port=0", f"--health-port={port}", "--provider=cpu"),
        ),
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        probe = ("python", "-m", "inflora_service.probe", f"localhost:{port}", "--service")
        predicts = "inflora.v1.PredictorService"
        deadline, answer = time.monotonic() + WAIT, ""
        while time.monotonic() < deadline and server.poll() is None and answer != "SERVING":
            answer = _said(_run(container, store, *probe, predicts))
        if answer != "SERVING":
            found.append(f"the entrypoint does not answer for its health: {answer}")
        for name, program in _PROGRAMS.items():
            if (
                said := _said(_run(container, store, "python", "-c", program))
            ) != "as it should be":
                found.append(f"{name}: {said}")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            log, _ = server.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            log, _ = server.communicate()
    return found + ([f"its log: {log[-3000:]}"] if found else [])


_PROGRAMS = {
    "torch": (
        "import importlib.util as u;"
        "print('as it should be' if not u.find_spec('torch') else 'is in the image')"
    ),
    "user": f"import os; print('as it should be' if os.getuid() == {USER} else os.getuid())",
    "tools": (
        "import importlib.util as u;"
        "print([m for m in ('pytest', 'mypy', 'pip') if u.find_spec(m)] or 'as it should be')"
    ),
}


def _said(command: Sequence[str]) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]
