"""What `tritonclient` sees of a server. A program of its own, in an environment without ours.

python triton.py ADDRESS IMAGE...: prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def tensor(name: str, datatype: str, values: np.ndarray) -> triton.InferInput:
    made = triton.InferInput(name, values.shape, datatype)
    made.set_data_from_numpy(values)
    return made


def plain(array: np.ndarray) -> Any:
    """Return what JSON can hold."""
    return (np.vectorize(bytes.decode)(array) if array.dtype == np.object_ else array).tolist()


def main(address: str, contents: list[bytes]) -> dict[str, Any]:
    client = triton.InferenceServerClient(address)
    files = np.array(contents, np.object_)
    encoded = tensor("encoded_images", "BYTES", files)
    white = tensor("images", "UINT8", np.full((2, 20, 30, 3), 255, np.uint8))

    def infer(*inputs: Any, outputs: Any = None, model: str = "default", **more: Any) -> Any:
        names = outputs and [triton.InferRequestedOutput(name) for name in outputs]
        return client.infer(model, list(inputs), outputs=names, **more)

    def seen(result: Any) -> dict[str, Any]:
        answer = result.get_response()
        values = {output.name: result.as_numpy(output.name) for output in answer.outputs}
        return {
            "id": answer.id,
            "model": answer.model_name,
            "version": answer.model_version,
            **{name: plain(array) for name, array in values.items()},
        }

    def refusal(*inputs: Any, **more: Any) -> list[str]:
        try:
            infer(*inputs, **more)
        except InferenceServerException as error:
            return [error.status().removeprefix("StatusCode."), error.message()]
        return ["OK", ""]

    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": {name: client.is_model_ready(name) for name in ("default", "other")},
        "versions": {number: client.is_model_ready("default", number) for number in "123"},
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("default", as_json=True),
        "encoded": seen(infer(encoded, request_id="a", parameters={"top_k": 2})),
        "pixels": seen(infer(white, outputs=["novelty", "labels"], model_version="1")),
        "refused": {
            "model": refusal(encoded, model="other"),
            "version": refusal(encoded, model_version="9"),
            "input": refusal(tensor("INPUT0", "BYTES", files)),
            "datatype": refusal(tensor("images", "FP32", np.zeros((1, 8, 8, 3), np.float32))),
            "shape of bytes": refusal(tensor("encoded_images", "BYTES", files.reshape(1, -1))),
            "shape of pixels": refusal(tensor("images", "UINT8", np.zeros((1, 3, 8, 8), np.uint8))),
            "output": refusal(encoded, outputs=["labels", "OUTPUT0"]),
            "image": refusal(tensor("encoded_images", "BYTES", np.array([b"?"], np.object_))),
            "images": refusal(tensor("images", "UINT8", np.zeros((300, 8, 8, 3), np.uint8))),
        },
    }


if __name__ == "__main__":
    images = [Path(path).read_bytes() for path in sys.argv[2:]]
    print(json.dumps(main(sys.argv[1], images)))
