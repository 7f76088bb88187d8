"""``inflora-edge``: predict with an exported model, and keep a device up to date."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from inflora_edge.device import FORMS, Device
from inflora_edge.errors import EdgeError, ImageError
from inflora_edge.fetching import Server
from inflora_edge.model import Model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        status: int = options.run(options)
    except (EdgeError, OSError, ValueError) as error:
        print(f"inflora-edge: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("inflora-edge", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="classify images with a model")
    predict.set_defaults(run=_predict)
    predict.add_argument("model", type=Path, help="model.onnx, or the folder that `follow` keeps")
    predict.add_argument("images", type=Path, nargs="+", metavar="image")
    predict.add_argument("--top", type=int, default=1, help="classes to show (default: 1)")
    predict.add_argument("--json", action="store_true", help="one JSON object for each image")
    predict.add_argument("--threads", type=int, default=0, help="0: one for each processor")

    follow = commands.add_parser("follow", help="keep the current version of a server's model")
    follow.set_defaults(run=_follow)
    follow.add_argument("server", help="host:port")
    follow.add_argument("--folder", type=Path, required=True, help="where the model is kept")
    follow.add_argument("--model", default="default", help="its name (default: default)")
    follow.add_argument(
        "--form", choices=FORMS[1:], default=FORMS[0], help="a smaller form (default: model.onnx)"
    )
    follow.add_argument("--poll-seconds", type=float, default=60.0, help="(default: 60)")
    follow.add_argument("--once", action="store_true", help="update and end; 2 without a change")
    follow.add_argument("--token-file", type=Path, help="a file with the token to say who asks")
    follow.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for a piece of 256 KiB (default: 60)"
    )
    follow.add_argument("--ca", type=Path, help="certificates that sign the server's; asks for TLS")
    return parser


def _predict(options: argparse.Namespace) -> int:
    path = options.model
    if path.is_dir():
        path = Device.active_file(path)
    model = Model(path, options.threads)
    status = 0
    for image in options.images:
        try:
            found = model.predict(image)
        except ImageError as error:
            print(f"inflora-edge: {image}: {error}", file=sys.stderr)
            status = 1
            continue
        best = list(zip(found.classes, found.probabilities, strict=True))[: options.top]
        if options.json:
            scores = [{"label": label, "probability": share} for label, share in best]
            said = {"image": str(image), "scores": scores, "novelty": found.novelty}
            print(json.dumps(said | {"version": found.version}, ensure_ascii=False), flush=True)
        else:
            scores_text = "  ".join(f"{label} {share:.1%}" for label, share in best)
            print(f"{image}: {scores_text}  (novelty {found.novelty:.2f})", flush=True)
    return status


def _follow(options: argparse.Namespace) -> int:
    token = options.token_file.read_text().strip() if options.token_file else ""
    server = Server(options.server, options.model, token, options.ca, options.timeout)

    def tell(model: Model) -> None:
        print(f"version {model.version}: {len(model.classes)} classes", flush=True)

    with Device(server, options.folder, form=options.form) as device:
        if options.once:
            changed = device.update()
            tell(device.model)
            return 0 if changed else 2
        stop = threading.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: stop.set())
        if device.has_model:
            tell(device.model)
        device.follow(options.poll_seconds, tell, stop)
        return 0


if __name__ == "__main__":
    sys.exit(main())
