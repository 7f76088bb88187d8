"""MLServer: a custom runtime, asked over gRPC; copies of the model are parallel workers."""

from __future__ import annotations

import asyncio

from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from model import Model


class Classify(MLModel):
    async def load(self) -> bool:
        self.model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (content,) = payload.inputs[0].data
        label = await asyncio.to_thread(self._label, content)
        return InferenceResponse(
            model_name=self.name, outputs=[StringCodec.encode_output("label", [label])]
        )

    def _label(self, content: bytes) -> str:
        return self.model.labels(self.model.prepare(content))[0]
