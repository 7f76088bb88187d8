"""Drives a headless Chromium by its own protocol over pipes, with nothing but the browser."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = (
    *(
        "--headless",
        "--no-first-run",
        "--no-default-browser-check",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--disable-gpu", "--disable-dev-shm-usage"),
    # Root has no sandbox in a container; what is loaded is our own.
    "--no-sandbox",
    # Whoever asks for anything but this machine gets an error, which `Page.complaints` has.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
    "--remote-debugging-pipe",
)
_MESSAGES = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

TIMEOUT = 60.0
"""Seconds that anything may take on a machine that others use, too."""


class Page:
    """The one page of a browser, and the workers that it starts.

    Attributes:
        complaints: Errors and warnings on the console, and exceptions that nobody caught.
        requests: Addresses that page and workers have asked for.
    """

    def __init__(self, read: int, write: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._read, self._write = read, write
        self._rest = b""
        self._sent = 0
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # as on a phone
        # Workers wait until their requests are listened to.
        self.call(
            "Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True
        )

    def call(self, method: str, **parameters: Any) -> Any:
        """Run a command of the protocol, and return what it returns.

        Raises:
            RuntimeError: it failed.
            TimeoutError: nothing came back.
        """
        number = self._send(method, parameters, self._session)
        deadline = time.monotonic() + TIMEOUT
        while True:
            message = self._next(deadline, method)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def open(self, address: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """Return what an expression of JavaScript is, or what its promise comes to.

        Raises:
            RuntimeError: it throws.
        """
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Return what an expression is once that is true.

        Raises:
            AssertionError: it does not become true; the message has what the page says.
        """
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            # The page itself looks, each time it has drawn; in slices, so that the wait can end.
            found = self.evaluate(
                f"""new Promise((resolve) => {{
                    const end = performance.now() + 1000;
                    const look = () => {{
                        const found = {condition};
                        if (found || performance.now() > end) resolve(found);
                        else setTimeout(look, 10);
                    }};
                    look();
                }})"""
            )
            if found:
                return found
        text = self.evaluate("document.body.innerText")
        raise AssertionError(f"{condition} is not so after {TIMEOUT} s; the page says:\n{text}")

    def click(self, selector: str) -> None:
        """Click an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Choose files in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, selector: str, file: Path) -> None:
        """Drag a file from outside onto an element, and let it go there."""
        x, y = self.evaluate(
            f"""(() => {{
                const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        said = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **said, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **said)

    def look(self, width: int, height: int, scheme: str, scale: float = 1.0) -> None:
        """Show the page in a window of some size, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=scale, mobile=False,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _send(self, method: str, parameters: dict[str, Any], session: str) -> int:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        content = memoryview(json.dumps(message).encode() + b"\0")
        while content:
            content = content[os.write(self._write, content) :]
        return self._sent

    def _next(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"{waiting_for}: Chromium does not answer")
            more = os.read(self._read, 2**20)
            if not more:
                raise RuntimeError(f"{waiting_for}: Chromium ended")
            self._rest += more
        content, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(content)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        name, said = message.get("method"), message.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif name in _MESSAGES:
            self.complaints.append(json.dumps(said))
        elif name == "Target.attachedToTarget":
            session = said["sessionId"]
            for method in ("Runtime.enable", "Network.enable", "Runtime.runIfWaitingForDebugger"):
                self._send(method, {}, session)


@contextmanager
def chromium(folder: Path, *flags: str) -> Iterator[Page]:
    """Run a browser.

    Args:
        folder: For its profile and its log.
        flags: More of its options.
    """
    assert PROGRAM is not None
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = os.pipe(), os.pipe()
    # It reads commands from 3 and writes answers to 4; numbers above are out of the way of both.
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1]))
    command = [PROGRAM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", *flags]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command],
            pass_fds=(reads, writes), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    for end in (ours[0], theirs[1], reads, writes):
        os.close(end)
    try:
        yield Page(theirs[0], ours[1])
    finally:
        # It ends when nobody is at the other end any more.
        os.close(ours[1])
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(theirs[0])
