"""``inference.GRPCInferenceService``, the Open Inference Protocol: decode, call, encode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from inflora.oip.v2 import open_inference_pb2 as pb
from inflora.oip.v2 import open_inference_pb2_grpc
from inflora_core.config import Limits
from inflora_core.errors import DamagedError, InfloraError
from inflora_core.predictor import Answers
from inflora_core.store import MODEL, Store
from inflora_service import codec, names, tensors
from inflora_service.errors import Context, fields_under
from inflora_service.predictor_servicer import deadline
from inflora_service.serving import Host
from inflora_service.turns import Source

SERVER_NAME = "inflora-server"

PLATFORM = "onnx_onnxv1"
"""The protocol's word for a model in ONNX, run by onnxruntime."""

EXTENSIONS = ("parameters",)


class OipServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Handlers; ``ErrorInterceptor`` turns what they raise into a status."""

    def __init__(self, store: Store, host: Host, limits: Limits) -> None:
        self._store = store
        self._host = host
        self._limits = limits

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """Say that the server answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Say whether the current version answers."""
        try:
            return pb.ServerReadyResponse(ready=self._host.current is not None)
        except DamagedError:
            return pb.ServerReadyResponse(ready=False)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Say whether a version can answer."""
        try:
            await self._host.answering(_asked(request.name, request.version))
        except InfloraError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Say what the server is."""
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=version(SERVER_NAME), extensions=EXTENSIONS
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Say what a version takes and gives."""
        with _naming_fields():
            number = _asked(request.name, request.version)
            with fields_under("", name="version"):
                loaded = await self._host.answering(number)
        predictor = loaded.predictor
        # Of a version that nobody named, the next call may meet another, which knows more.
        classes = -1 if number is None else len(predictor.card.classes)
        return pb.ModelMetadataResponse(
            name=MODEL,
            versions=await asyncio.to_thread(self._versions),
            platform=PLATFORM,
            inputs=tensors.describe_inputs(),
            outputs=tensors.describe_outputs(classes, predictor.embedding_size),
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Classify images."""
        until = deadline(context)
        with _naming_fields():
            codec.check_size(request, self._limits, field="inputs")
            with fields_under("model_"):
                number = _asked(request.model_name, request.model_version)
            top_k, outputs = tensors.decode_top_k(request), tensors.decode_outputs(request)
            images = await self._images(request)
            with fields_under("", name="model_version"):
                loaded = await self._host.answering(number)
            raw = bool(request.raw_input_contents)

            def finish(answers: Answers) -> pb.ModelInferResponse:
                card = loaded.predictor.card
                return tensors.encode_answer(answers, card, outputs, top_k, raw=raw)

            with fields_under("encoded_"):  # raw pixels are not at fault by now
                response = await self._host.classify(loaded, images, finish, until)
        response.model_name, response.id = MODEL, request.id
        response.model_version = str(loaded.version.number)
        return response

    async def _images(self, request: pb.ModelInferRequest) -> list[Source]:
        if request.raw_input_contents:
            return tensors.decode_images(request, self._limits)
        # A list of pixels is gone through one by one, for seconds if there are millions.
        return await asyncio.to_thread(tensors.decode_images, request, self._limits)

    def _versions(self) -> list[str]:
        """Return the numbers of the versions that can be asked for."""
        known = (self._store.version(each.number) for each in self._store.manifests())
        return [str(each.number) for each in known if not each.state.stripped]


def _asked(name: str, number: str) -> int | None:
    """Return the number of the version that is asked for, None for the current one."""
    names.check_model_id(name, field="name")
    return names.parse_number(number, field="version")


@contextmanager
def _naming_fields() -> Iterator[None]:
    """Have messages begin with the field: clients of the protocol do not show the details."""
    try:
        yield
    except InfloraError as error:
        if not error.field:
            raise
        raise error.renamed(f"{error.field}: {error.message}", error.field) from error
