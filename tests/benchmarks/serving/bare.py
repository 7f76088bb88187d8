"""A loop that decodes images and runs the model, in one process: what no server can beat alone.

    python -m tests.benchmarks.serving.bare MODEL IMAGES SECONDS WARM_UP THREADS

Prints what ``inflora bench`` reports of a load, as one JSON object. The sessions are those that a
server of ours runs a call with that is alone: all threads, and nothing else between.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from inflora_client import _bench as bench
from inflora_core.config import Limits
from inflora_core.images import picture
from inflora_core.predictor import Predictor, RuntimeOptions, top_classes


def main() -> None:
    """Run the loop."""
    model, folder, seconds, warm_up, threads = sys.argv[1:]
    options = RuntimeOptions(int(threads), "cpu", runs=int(threads))
    predictor = Predictor.load(Path(model), options)
    predictor.open_alone()
    images = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    limits = Limits()

    async def classify(number: int, left: float) -> str:
        pixels = predictor.preprocess(picture(images[number % len(images)], limits))
        answers = predictor.classify(pixels, alone=True)
        return top_classes(answers, predictor.card, 1)[0][0][0]

    load = bench.Closed(1)
    bounds = bench.Bounds(float(seconds), warm_up=float(warm_up))
    tally = asyncio.run(bench.drive(classify, load, bounds))
    print(json.dumps(dataclasses.asdict(bench.report(load, tally, 1))))


if __name__ == "__main__":
    main()
