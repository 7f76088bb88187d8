"""A server of two files that sends what a test wants: pieces that are cut, damaged or late."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from inflora.v1 import model_service_pb2 as pb
from inflora.v1 import model_service_pb2_grpc

PIECE = 4096


@dataclass
class ScriptedServer(model_service_pb2_grpc.ModelServiceServicer):
    """Sends ``files``; ``spoil`` may change each message, or raise in its place.

    Attributes:
        files: By artifact; what is not there is NOT_FOUND.
        version: That they are of.
        spoil: Called with the number of bytes sent, and the message.
        requests: What was asked for.
    """

    files: dict[str, bytes]
    version: int = 1
    spoil: Callable[[int, pb.DownloadArtifactResponse], None] = lambda sent, message: None
    requests: list[pb.DownloadArtifactRequest] = field(default_factory=list)

    def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Any
    ) -> Iterator[pb.DownloadArtifactResponse]:
        self.requests.append(request)
        content = self.files.get(request.artifact)
        if content is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such artifact")
            return
        artifact = pb.Artifact(
            name=request.artifact,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        response = pb.DownloadArtifactResponse(
            artifact=artifact, version=f"models/default/versions/{self.version}"
        )
        for position in range(request.offset, max(len(content), request.offset + 1), PIECE):
            response.offset = position
            response.data = content[position : position + PIECE]
            try:
                self.spoil(position - request.offset, response)
            except ConnectionError:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            yield response
            response = pb.DownloadArtifactResponse()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Listen on a free port of this machine; give the address."""
        server = grpc.server(ThreadPoolExecutor(4))
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
