"""The page, as a plain web server hands it out, and the folder of models beside it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "worker-src 'self'; connect-src 'self'; img-src 'self' blob:"
)

DIST = Path(__file__).parents[2] / "clients" / "web" / "dist"


@dataclass(frozen=True)
class Site:
    """A folder that is handed out.

    Attributes:
        folder: Of the page; models are in ``models``.
        origin: ``http://host:port``.
        asked: Paths that were asked for.
    """

    folder: Path
    origin: str
    asked: list[str] = field(default_factory=list)

    @property
    def models(self) -> Path:
        """What a device keeps."""
        return self.folder / "models"


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, asked: list[str], **named: Any) -> None:
        self._asked = asked
        super().__init__(*arguments, **named)

    def end_headers(self) -> None:
        """Send the policy that docs/edge.md says, which holds for the page's threads, too."""
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Remember who asked, and print nothing."""
        self._asked.append(self.path)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing of what was not found: it is part of the tests."""


@contextmanager
def served(folder: Path) -> Iterator[Site]:
    """Hand out a copy of the page that was built, in ``folder``."""
    shutil.copytree(DIST, folder)
    asked: list[str] = []
    handler = partial(_Handler, directory=str(folder), asked=asked)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Site(folder, f"http://127.0.0.1:{server.server_port}", asked)
        finally:
            server.shutdown()
            thread.join()
