"""Classify what a camera drops into a folder, with a model that follows a server.

python camera.py learner.example:50051 /var/lib/model /var/spool/camera
"""

import sys
import time
from pathlib import Path

from inflora_edge import Device, EdgeError, ImageError, Server

UPDATE_SECONDS = 60


def main(address: str, folder: str, camera: str) -> None:
    """Update now and then, and classify each file once, until the process is ended."""
    seen: set[Path] = set()
    next_update = 0.0
    with Device(Server(address), Path(folder)) as device:
        while True:
            if time.monotonic() >= next_update:
                next_update = time.monotonic() + UPDATE_SECONDS
                try:
                    device.update()
                except (EdgeError, OSError) as error:
                    print(f"no update: {error}", file=sys.stderr)  # what there is goes on answering
            for path in sorted(set(Path(camera).iterdir()) - seen) if device.has_model else ():
                seen.add(path)
                try:
                    answer = device.model.predict(path)
                except ImageError as error:
                    print(f"{path.name}: {error}", file=sys.stderr)
                    continue
                new = ", unlike anything learned" if answer.novelty > 0.95 else ""
                print(f"{path.name}: {answer.label} {answer.probabilities[0]:.0%}{new}", flush=True)
            time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
