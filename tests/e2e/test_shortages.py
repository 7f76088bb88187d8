"""What a machine can run out of, while clients predict: nothing is lost, and it mends by itself."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inflora_client import (
    Client,
    ResourceExhaustedError,
    StatusError,
    Task,
    TaskFailedError,
    TaskStage,
    TaskState,
    UnavailableError,
)
from inflora_core.failpoints import VARIABLE
from inflora_core.spool import STEP_BYTES
from inflora_core.store import Store
from tests.e2e.conftest import QUICK, Example, connect, examples, images
from tests.e2e.predicting import Predicting
from tests.running_server import RunningServer, running_server

LABELS = ("red", "green")
MORE = ("blue", "white")


@pytest.fixture(scope="module")
def taught(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one version."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(prepared, folder / "store")
    with running_server(folder, QUICK) as server, connect(server) as client:
        client.wait(client.learn(examples(*LABELS, each=4)))
    return server.store


@pytest.fixture
def folder(taught: Path, tmp_path: Path) -> Path:
    """A server's folder whose store has one version."""
    shutil.copytree(taught, tmp_path / "server" / "store")
    return tmp_path / "server"


def photos(count: int) -> list[Example]:
    """Return images of about 120 kB each, which no compression makes smaller."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (200, 200, 3), np.uint8)).save(file, "PNG")
        found.append((file.getvalue(), MORE[number % 2]))
    return found


@contextmanager
def unharmed(server: RunningServer, store: Path | None = None) -> Iterator[Client]:
    """Predict all along; at the end there must be no failure, and nothing half-written."""
    with Predicting(server, images(*LABELS)) as predicting, connect(server) as client:
        predicting.wait_for_more()
        yield client
        predicting.wait_for_more()
    assert predicting.failures == []
    whole = Store.open(store or server.store)
    for number in whole.numbers():
        whole.verify(number)
    for name in ("spool", "drafts"):
        assert not list((whole.root / name).iterdir())


def learn(client: Client, data: list[Example] | None = None) -> Task:
    return client.learn(data or examples(*MORE, each=4), request_id="the same request")


# -- each durable step --------------------------------------------------------------------------

STEPS = (
    *("spool.create", "spool.origin", "spool.write", "spool.flush", "spool.sync", "spool.synced"),
    *("spool.recover", "spool.delete", "accept.insert", "record.update"),
    *("pointer.replace", "replace.write", "replace.rename"),
)
"""From the upload to the published version, in the server."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ENOSPC", ResourceExhaustedError),
        ("EDQUOT", ResourceExhaustedError),
        ("EMFILE", ResourceExhaustedError),
        ("ENOMEM", ResourceExhaustedError),
        ("EROFS", UnavailableError),
        ("EIO", UnavailableError),
    ],
)
def test_an_error_at_each_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[StatusError]
) -> None:
    """Each step fails once, so that each attempt gets a little further than the last."""
    assert hasattr(errno, name)
    monkeypatch.setenv(VARIABLE, ", ".join(f"{step}={name}*1" for step in STEPS))
    failures: list[StatusError] = []
    with running_server(folder, QUICK) as server, unharmed(server) as client:
        while True:
            try:
                task = learn(client)
                break
            except StatusError as error:
                failures.append(error)
        assert client.wait(task).state is TaskState.PUBLISHED
        assert learn(client).name == task.name
        assert [version.number for version in client.versions()] == [2, 1]
        wait_until(lambda: not list((server.store / "spool").iterdir()), client)
    assert {type(error) for error in failures} == {kind}
    assert {error.reason for error in failures} == {failures[0].reason}
    assert 5 <= len(failures) <= len(STEPS)


def wait_until(condition: Callable[[], bool], client: Client) -> None:
    """Ask the server things until ``condition`` holds."""
    while not condition():
        list(client.tasks())


# -- real shortages -----------------------------------------------------------------------------


@contextmanager
def limited(server: RunningServer, kind: int, limit: int) -> Iterator[None]:
    """Set a limit of the running server's process."""
    before = resource.prlimit(server.process.pid, kind)
    resource.prlimit(server.process.pid, kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, kind, before)


def test_too_many_open_files(folder: Path) -> None:
    with running_server(folder, QUICK) as server, unharmed(server) as client:
        list(client.tasks())  # it is connected
        opened = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        with (
            limited(server, resource.RLIMIT_NOFILE, opened),
            pytest.raises(ResourceExhaustedError, match="too many files open"),
        ):
            learn(client)
        assert client.wait(learn(client)).state is TaskState.PUBLISHED


def test_files_that_may_not_grow(folder: Path) -> None:
    """As a quota, which says so only when it is too late to look."""
    data = photos(60)
    # They are noise, which the publish gate would hold back.
    with (
        running_server(folder, [*QUICK, "--gate-accuracy", "off"]) as server,
        unharmed(server) as client,
    ):
        limit = sum(len(image) for image, _ in data) - 200_000
        with (
            limited(server, resource.RLIMIT_FSIZE, limit),
            pytest.raises(ResourceExhaustedError, match="disk is full"),
        ):
            learn(client, data)
        assert client.wait(learn(client, data)).state is TaskState.PUBLISHED


RESERVE = 8 * 2**20


@pytest.fixture
def small_disk(folder: Path) -> Iterator[RunningServer]:
    """A server whose store is on a filesystem of 64 MiB that nobody else sees."""
    store = folder / "store"
    origin = store.rename(folder / "origin")
    store.mkdir()
    script = f"mount -t tmpfs -o size=64m tmpfs {store} && cp -a {origin}/. {store} && "
    prefix = ["unshare", "--mount", "sh", "-c", script + 'exec "$@"', "sh"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no filesystem can be mounted here: {error}")
    options = [*QUICK, "--reserve-bytes", str(RESERVE)]
    with running_server(folder, options, prefix=prefix) as server:
        yield server


def inside(server: RunningServer) -> Path:
    """Return the store as the server's process sees it."""
    return Path(f"/proc/{server.process.pid}/root{server.store}")


@contextmanager
def filled(server: RunningServer, left: int) -> Iterator[None]:
    """Fill the disk until ``left`` bytes are free."""
    filler = inside(server) / "filler"

    def fill() -> bool:
        disk = os.statvfs(inside(server))
        with filler.open("ab") as file:
            size = file.tell() + disk.f_bavail * disk.f_frsize - left
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                # The server wrote something in between, a checkpoint for example.
                if error.errno != errno.ENOSPC:
                    raise
                return False
        return True

    while not fill():
        pass
    try:
        yield
    finally:
        filler.unlink()


def test_a_disk_without_room(small_disk: RunningServer) -> None:
    server = small_disk
    with unharmed(server, inside(server)) as client:
        with filled(server, RESERVE // 2):
            with pytest.raises(ResourceExhaustedError, match="short of"):
                learn(client)
            with pytest.raises(ResourceExhaustedError, match="short of"):
                client.forget("red")
            with pytest.raises(ResourceExhaustedError, match="short of"):
                client.update_class("red", new_label="crimson")
        with filled(server, RESERVE + 3 * 2**20), pytest.raises(ResourceExhaustedError):
            learn(client, photos(40))  # it grows into the reserve
        assert client.wait(learn(client)).state is TaskState.PUBLISHED


def test_a_disk_that_is_full_while_a_task_is_learned(small_disk: RunningServer) -> None:
    server = small_disk
    with unharmed(server, inside(server)) as client:
        task = client.learn(examples(*MORE, each=4), epochs=20, batch_size=2)
        for seen in client.watch(task):
            if seen.stage is TaskStage.TRAINING:
                break
        with filled(server, 0):
            with pytest.raises(ResourceExhaustedError):
                learn(client)
            # That it has failed may be told only once it can be written down.
            wait_until(lambda: "cannot write a task's record" in server.log.read_text(), client)
            assert not client.task(task).ended
        with pytest.raises(TaskFailedError) as caught:
            client.wait(task)
        assert caught.value.task.error is not None
        assert caught.value.task.error.code == "RESOURCE_EXHAUSTED"
        assert client.wait(learn(client)).state is TaskState.PUBLISHED


# -- memory -------------------------------------------------------------------------------------


def written_to(pid: int) -> int:
    """Return the bytes of a process that ``RLIMIT_DATA`` counts."""
    status = Path(f"/proc/{pid}/status").read_text()
    (size,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmData"))
    return int(size) * 1024


def test_a_batch_that_takes_more_memory_than_there_is(folder: Path) -> None:
    """It is taken in parts, and the next task in parts that are known to fit."""
    with running_server(folder, QUICK) as server, connect(server) as client:
        client.wait(learn(client))
        enough = written_to(server.worker_pid()) + 100 * 2**20
    limited = [*QUICK, "--learn-memory-bytes", str(enough), "--task-attempts", "1"]
    with running_server(folder, limited) as server, unharmed(server, server.store) as client:
        few = examples("cyan", "magenta", each=8)
        done = client.wait(client.learn(few * 512, batch_size=4096))
        assert done.state is TaskState.PUBLISHED
        assert "4096 images at a time do not fit in memory" in server.log.read_text()
        assert client.wait(client.learn(few)).state is TaskState.PUBLISHED


# -- kill -9 ------------------------------------------------------------------------------------


class Replayed:
    """Examples that can be iterated over again, and call the test before the last of them.

    Attributes:
        begun: How often the iteration began.
    """

    def __init__(self, data: list[Example], pause: Callable[[], None]) -> None:
        self._data = data
        self._pause = pause
        self.begun = 0

    def __iter__(self) -> Iterator[Example]:
        self.begun += 1
        yield from self._data[:-5]
        if self.begun == 1:
            self._pause()
        yield from self._data[-5:]


def test_a_client_continues_when_the_server_is_killed_and_comes_back(folder: Path) -> None:
    data = photos(2 * STEP_BYTES // 120_000 + 5)
    reached, killed = threading.Event(), threading.Event()

    def pause() -> None:
        reached.set()
        assert killed.wait(60)

    replayed = Replayed(data, pause)
    with (
        running_server(folder, QUICK, stop=False) as server,
        ThreadPoolExecutor(1) as pool,
        Client(server.address) as client,
    ):
        # A worker that still imports would notice too late that its server is gone.
        client.wait(client.update_class("red", add_aliases="crimson"))
        learning = pool.submit(client.learn, replayed, request_id="r")
        assert reached.wait(60)
        wait_until(lambda: grown(server.store) >= STEP_BYTES, client)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        killed.set()
        port = server.address.rpartition(":")[2]
        with running_server(folder, [*QUICK, "--port", port]) as again:
            task = learning.result()
            assert task.example_count == len(data)
            assert client.learn(data, request_id="r").name == task.name
            assert client.cancel(task).state is TaskState.CANCELLED
            log = again.log.read_text()
    assert "1 uploads that broke off can be continued" in log
    assert replayed.begun == 2


def grown(store: Path) -> int:
    """Return how many bytes of images lie in spools."""
    return sum(path.stat().st_size for path in store.glob("spool/*/images.bin"))
