"""What `kserve`'s client sees of a server. A program of its own, in an environment without ours.

python kserving.py ADDRESS IMAGE...: prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.infer_type import RequestedOutput


def tensor(name: str, datatype: str, values: np.ndarray) -> InferInput:
    made = InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def plain(array: np.ndarray) -> Any:
    """Return what JSON can hold."""
    return (np.vectorize(bytes.decode)(array) if array.dtype == np.object_ else array).tolist()


async def main(address: str, contents: list[bytes]) -> dict[str, Any]:
    logging.disable()  # it logs every refusal, and they are asked for here
    client = InferenceGRPCClient(address)
    files = np.array(contents, np.object_)
    encoded = tensor("encoded_images", "BYTES", files)
    white = tensor("images", "UINT8", np.full((2, 20, 30, 3), 255, np.uint8))
    listed = InferInput("encoded_images", [len(contents)], "BYTES", data=contents)

    async def infer(
        *inputs: InferInput, outputs: Any = (), model: str = "default", **more: Any
    ) -> Any:
        wanted = [RequestedOutput(name) for name in outputs]
        return await client.infer(InferRequest(model, list(inputs), request_outputs=wanted, **more))

    def seen(response: Any) -> dict[str, Any]:
        values = {output.name: output.as_numpy() for output in response.outputs}
        return {
            "id": response.id,
            "model": response.model_name,
            "version": response.model_version,
            **{name: plain(array) for name, array in values.items()},
        }

    async def refusal(*inputs: InferInput, **more: Any) -> list[str]:
        try:
            await infer(*inputs, **more)
        except grpc.RpcError as error:
            return [error.code().name, error.details()]
        return ["OK", ""]

    async with grpc.aio.insecure_channel(address) as channel, client:
        # The client has no method for metadata, but its package has the protocol's.
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        server = await stub.ServerMetadata(pb.ServerMetadataRequest())
        model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="default"))
        versions = {
            number: await stub.ModelReady(pb.ModelReadyRequest(name="default", version=number))
            for number in "123"
        }
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "models": {name: await client.is_model_ready(name) for name in ("default", "other")},
            "versions": {number: answer.ready for number, answer in versions.items()},
            "server": MessageToDict(server),
            "model": MessageToDict(model),
            "encoded": seen(await infer(encoded, request_id="a", parameters={"top_k": 2})),
            "listed": seen(await infer(listed, request_id="a", parameters={"top_k": 2})),
            "pixels": seen(await infer(white, outputs=["novelty", "labels"], model_version="1")),
            "refused": {
                "model": await refusal(encoded, model="other"),
                "version": await refusal(encoded, model_version="9"),
                "input": await refusal(tensor("INPUT0", "BYTES", files)),
                "datatype": await refusal(
                    tensor("images", "FP32", np.zeros((1, 8, 8, 3), np.float32))
                ),
                "shape of bytes": await refusal(
                    tensor("encoded_images", "BYTES", files.reshape(1, -1))
                ),
                "shape of pixels": await refusal(
                    tensor("images", "UINT8", np.zeros((1, 3, 8, 8), np.uint8))
                ),
                "output": await refusal(encoded, outputs=["labels", "OUTPUT0"]),
                "image": await refusal(
                    tensor("encoded_images", "BYTES", np.array([b"?"], np.object_))
                ),
                "images": await refusal(
                    tensor("images", "UINT8", np.zeros((300, 8, 8, 3), np.uint8))
                ),
            },
        }


if __name__ == "__main__":
    images = [Path(path).read_bytes() for path in sys.argv[2:]]
    print(json.dumps(asyncio.run(main(sys.argv[1], images))))
