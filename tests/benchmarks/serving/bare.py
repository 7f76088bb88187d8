"""A loop that decodes images and runs the model, in one process.

    python -m tests.benchmarks.serving.bare MODEL CLASSIFY IMAGES SECONDS WARM_UP THREADS

Prints what ``inflora bench`` reports of a load, as one JSON object. Images are decoded and resized
by Pillow, and all threads work on one of them. With the file CLASSIFY, the second part of the
model, onnxruntime runs that as it is, as anybody's loop does. Without (""), it runs what a server
of ours makes of MODEL: nothing that serves the same can beat that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import onnxruntime as ort

from inflora_client import _bench as bench
from inflora_core.config import Limits
from inflora_core.graph import OUTPUTS, PIXELS
from inflora_core.images import picture
from inflora_core.predictor import CPU, Answers, Floats, Predictor, RuntimeOptions, top_classes


def main() -> None:
    """Run the loop."""
    model, plain, folder, seconds, warm_up, threads = sys.argv[1:]
    options = RuntimeOptions(int(threads), "cpu", runs=int(threads))
    predictor = Predictor.load(Path(model), options)
    if plain:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = int(threads), 3
        session = ort.InferenceSession(plain, settings, providers=[CPU])

        def run(pixels: Floats) -> Answers:
            return Answers(*session.run(OUTPUTS, {PIXELS: pixels}))

    else:
        predictor.open_alone()
        run = partial(predictor.classify, alone=True)
    images = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    limits = Limits()

    async def classify(number: int, left: float) -> str:
        pixels = predictor.preprocess(picture(images[number % len(images)], limits))
        return top_classes(run(pixels), predictor.card, 1)[0][0][0]

    load = bench.Closed(1)
    bounds = bench.Bounds(float(seconds), warm_up=float(warm_up))
    tally = asyncio.run(bench.drive(classify, load, bounds))
    print(json.dumps(dataclasses.asdict(bench.report(load, tally, 1))))


if __name__ == "__main__":
    main()
