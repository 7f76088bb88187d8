"""PyTriton: Triton in front of Python callables, asked over gRPC; a callable for each copy."""

from __future__ import annotations

import numpy as np
from model import MORE_PORTS, PORT, WORKERS, Model
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def classifier():
    model = Model()

    @batch
    def classify(image):
        pixels = np.concatenate([model.prepare(content) for (content,) in image])
        return {"label": np.char.encode(model.labels(pixels), "utf-8")[:, None]}

    return classify


if __name__ == "__main__":
    config = TritonConfig(
        grpc_port=PORT,
        http_port=MORE_PORTS[0],
        grpc_address="127.0.0.1",
        http_address="127.0.0.1",
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classify",
            infer_func=[classifier() for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="label", dtype=bytes, shape=(1,))],
            config=ModelConfig(),  # batches of up to 4 of what waits, as by default
        )
        triton.serve()
