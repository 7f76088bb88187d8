"""Makes the store of this release's format that later releases must open.

    python -m tests.e2e.make_store

Run it once, when a format is released, and never again: what it wrote is in ``tests/e2e/stores``.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path

from inflora_client import Client
from inflora_core.store import FORMAT
from tests.core import tiny
from tests.running_server import running_server

STORES = Path(__file__).parent / "stores"
SIDE = 24
PROBES = ("red", "green", "blue", "yellow")
OPTIONS = ("--epochs", "3", "--batch-size", "4", "--gate-accuracy", "off", "--gate-canary", "off")


def probe(colour: str) -> bytes:
    """Return the image of a colour that answers are recorded of."""
    return tiny.png(colour, 7000, SIDE)


def taught(*colours: str) -> list[tuple[bytes, str]]:
    """Return the examples of a task."""
    return [(tiny.png(colour, i, SIDE), colour) for colour in colours for i in range(8)]


def answers(client: Client) -> dict[str, dict[str, float]]:
    """Return what the current version says of the probes: probabilities by colour and label."""
    found = client.predict([probe(colour) for colour in PROBES], top_k=100)
    return {
        colour: {score.label: score.probability for score in prediction.scores}
        for colour, prediction in zip(PROBES, found.predictions, strict=True)
    }


def main() -> None:
    """Lead a short life, and pack the store with what it answered."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [*OPTIONS, "--backbone", str(tiny.write_backbone(folder))]
        options += ["--keep-onnx", "1", "--canary-images", "1"]
        with (
            running_server(folder / "server", options) as server,
            Client(server.address) as client,
        ):
            client.wait(client.learn(taught("red", "green"), display_name="first"))
            client.wait(client.learn(taught("blue", "white")))
            client.pin(1)
            client.wait(client.forget("white"))
            client.wait(client.update_class("blue", add_aliases="azure"))
            client.promote(3)
            client.wait(client.learn(taught("yellow")))
            recorded = answers(client)
        path = STORES / f"format-{FORMAT}.tar.gz"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder / "server" / "store", "store")
            content = json.dumps(recorded, indent=1).encode()
            entry = tarfile.TarInfo("answers.json")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
