"""A device under faults: its line is cut, its process killed, its disk damaged, at random."""

from __future__ import annotations

import argparse
import hashlib
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from inflora_client import Client
from inflora_core.store import Store
from inflora_edge import Device, EdgeError, Model, Server
from tests.edge.lineage import PARENTS, learned
from tests.running_server import running_server

PATIENCE = 60.0
"""Seconds in which a device has to come to the current version, once nothing is in its way."""

KINDS = ("cut", "kill", "damage")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Let faults happen; see the module."""
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = learned(folder)
        hashes = {n: hashlib.sha256(store.onnx(n)).hexdigest() for n in PARENTS}
        Store.existing(store.root).set_current(1)
        with (
            running_server(folder) as server,
            Client(server.address) as client,
            Proxy(server.address) as proxy,
        ):
            scene = Scene(client, proxy, folder / "device", hashes, chance)
            with scene:
                for number in range(options.faults):
                    scene.suffer(KINDS[number % len(KINDS)])
    for failure in scene.failures:
        print(failure, flush=True)
    return {
        "follow_faults": sum(scene.happened.values()),
        "follow_failures": len(scene.failures),
        "follow_kinds": dict(scene.happened),
        "follow_updates": scene.updates,
    }


class Proxy:
    """Passes bytes on to a server, and breaks connections after as many as it is told.

    Args:
        target: ``host:port``.

    Attributes:
        cut_after: Bytes of the server, on each connection.
        cut_asked_after: Likewise bytes of the client.
        cuts: How often it did.
    """

    def __init__(self, target: str) -> None:
        self.lead_to(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None
        self.cut_asked_after: int | None = None
        self.cuts = 0

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def lead_to(self, target: str) -> None:
        """Lead new connections to a server at ``host:port``."""
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        # Where there is no server now, there is none here either.
        with near, suppress(OSError), socket.create_connection(self._target) as far:
            back = threading.Thread(target=self._pass, args=(far, near, True), daemon=True)
            back.start()
            self._pass(near, far, False)
            back.join()

    def _pass(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        passed = 0
        with suppress(OSError):
            while content := one.recv(1024):
                other.sendall(content)
                passed += len(content)
                most = self.cut_after if answers else self.cut_asked_after
                if most is not None and passed >= most:
                    self.cuts += 1
                    break
        for end in (one, other):
            # Wakes the thread of the other direction, which ``close`` would not.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Follower:
    """``inflora-edge follow`` as a process of its own."""

    def __init__(self, address: str, folder: Path) -> None:
        command = [sys.executable, "-m", "inflora_edge", "follow", address]
        command += ["--folder", str(folder), "--poll-seconds", "0.05"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._said: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"version (\d+):", line):
                self._said.put(int(found[1]))

    def come_to(self, version: int) -> bool:
        """Wait until it says that it has a version."""
        try:
            while self._said.get(timeout=PATIENCE) != version:
                pass
        except queue.Empty:
            return False
        return True

    def end(self, how: signal.Signals) -> None:
        """End it."""
        self.process.send_signal(how)
        self.process.wait(30)


class Scene:
    """A device, what happens to it, and what went wrong."""

    def __init__(
        self,
        client: Client,
        proxy: Proxy,
        folder: Path,
        hashes: dict[int, str],
        chance: random.Random,
    ) -> None:
        self._client, self._proxy, self._folder = client, proxy, folder
        self._hashes, self._chance = hashes, chance
        self._current = 1
        self.happened: Counter[str] = Counter()
        self.failures: list[str] = []
        self.updates = 0

    def __enter__(self) -> Scene:
        self._follower = Follower(self._proxy.address, self._folder)
        self._expect("the first model")
        return self

    def __exit__(self, *error: object) -> None:
        self._follower.end(signal.SIGKILL)

    def suffer(self, kind: str) -> None:
        """Let one fault happen while another version becomes current; see what comes of it."""
        what = f"fault {sum(self.happened.values())}, {kind}"
        self.happened[kind] += 1
        if kind == "cut":
            self._proxy.cut_after = self._chance.choice((0, 500, 3000, 10_000, 30_000))
            cuts = self._proxy.cuts
            self._promote()
            # Connections break again and again until one has.
            self._wait_for_cut(cuts)
            self._check(what)
            self._proxy.cut_after = None
        elif kind == "kill":
            self._promote()
            # At any moment: while it asks, fetches, applies, tests or has nothing to do.
            threading.Event().wait(self._chance.uniform(0, 0.15))
            self._follower.end(signal.SIGKILL)
            self._check(what)
            self._follower = Follower(self._proxy.address, self._folder)
        else:
            self._follower.end(signal.SIGKILL)
            self._damage()
            self._check(what)
            self._promote()
            self._follower = Follower(self._proxy.address, self._folder)
        self._expect(what)

    def _promote(self) -> None:
        self._current = self._chance.choice([n for n in self._hashes if n != self._current])
        self._client.promote(self._current)

    def _wait_for_cut(self, before: int) -> None:
        over = threading.Event()
        for _ in range(int(PATIENCE / 0.02)):
            if self._proxy.cuts > before:
                return
            over.wait(0.02)

    def _damage(self) -> None:
        """Change a byte of a file, or lose its end."""
        files = [path for path in sorted(self._folder.iterdir()) if path.stat().st_size]
        path = self._chance.choice(files)
        content = bytearray(path.read_bytes())
        place = self._chance.randrange(len(content))
        if self._chance.random() < 0.5:
            content[place] ^= 1 << self._chance.randrange(8)
        else:
            del content[place:]
        path.write_bytes(content)

    def _check(self, what: str) -> None:
        """See that there is a model that works, whatever the state of things."""
        if self._follower.process.poll() is None:
            path = Device.active_file(self._folder)
        else:
            # As the next process finds it, and without the server.
            with Device(Server("127.0.0.1:1"), self._folder) as device:
                try:
                    path = next(iter(self._folder.glob(f"{device.model.version}-*.onnx")))
                except EdgeError as error:
                    self.failures.append(f"{what}: {error}")
                    return
        try:
            model = Model(path)
            model.check()
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            if sha256 != self._hashes[model.version]:
                self.failures.append(f"{what}: version {model.version} is not as it was published")
        except (EdgeError, OSError) as error:
            # Replaced in between, by the one after it: that one is looked at next time.
            if Device.active_file(self._folder) == path:
                self.failures.append(f"{what}: {error}")

    def _expect(self, what: str) -> None:
        """See that it comes to the current version, and answers with it as it should."""
        if not self._follower.come_to(self._current):
            self.failures.append(f"{what}: version {self._current} did not arrive")
            return
        self.updates += 1
        self._check(what)
