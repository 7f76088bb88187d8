"""Asking peers, each by the protocol that it is made for, as calls of ``inflora_client._bench``.

Plain HTTP is spoken here over asyncio's streams: nothing is lighter, so what differs is the peers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from inflora_client._bench import Call, CallFailedError

FIELD = descriptor_pb2.FieldDescriptorProto


class Http:
    """POSTs an image and reads ``{"label": ...}``, over connections that stay open.

    Used as an asynchronous context manager.

    Args:
        port: Where the peer listens.
        path: Of the resource.
        images: Taken in turn.
        field: Name of the form's field to upload in; the image is the whole body if empty.
    """

    def __init__(self, port: int, path: str, images: Sequence[bytes], field: str = "") -> None:
        self._port = port
        self._requests = [_request(port, path, image, field) for image in images]
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Call:
        return self._call

    async def __aexit__(self, *error: object) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()

    async def _call(self, number: int, seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                return await self._post(self._requests[number % len(self._requests)])
        except TimeoutError:
            raise CallFailedError("DEADLINE_EXCEEDED") from None
        except (OSError, EOFError) as error:
            raise CallFailedError("UNAVAILABLE") from error

    async def _post(self, request: bytes) -> str:
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        whole = False
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status = head.split(" ", 2)[1]
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await reader.readexactly(int(headers["content-length"]))
            whole = headers.get("connection") != "close"
        finally:
            if whole:
                self._idle.append((reader, writer))
            else:
                writer.close()  # half an answer may still come
        if status != "200":
            raise CallFailedError(f"HTTP {status}")
        label: str = json.loads(body)["label"]
        return label


def _request(port: int, path: str, image: bytes, field: str) -> bytes:
    kind, body = "image/jpeg", image
    if field:
        edge = "inflora-bench-part"
        kind = f"multipart/form-data; boundary={edge}"
        part = [
            f"--{edge}",
            f'Content-Disposition: form-data; name="{field}"; filename="image.jpg"',
            "Content-Type: image/jpeg",
            "",
            "",
        ]
        body = "\r\n".join(part).encode() + image + f"\r\n--{edge}--\r\n".encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class OpenInference:
    """Asks by the Open Inference Protocol over gRPC: an image as BYTES, a label as BYTES.

    Used as an asynchronous context manager.

    Args:
        port: Where the peer listens.
        shape: Of the image's tensor: with a dimension for batches where the peer makes them.
        images: Taken in turn.
    """

    def __init__(self, port: int, shape: Sequence[int], images: Sequence[bytes]) -> None:
        self._port = port
        request, self._response = _messages()
        self._requests = [
            request(
                model_name="classify",
                inputs=[
                    {
                        "name": "image",
                        "datatype": "BYTES",
                        "shape": shape,
                        "contents": {"bytes_contents": [image]},
                    }
                ],
            )
            for image in images
        ]

    async def __aenter__(self) -> Call:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}")
        self._infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self._response.FromString,
        )
        return self._call

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()

    async def _call(self, number: int, seconds: float) -> str:
        try:
            answer = await self._infer(
                self._requests[number % len(self._requests)], timeout=seconds
            )
        except grpc.aio.AioRpcError as error:
            raise CallFailedError(error.code().name) from error
        if answer.raw_output_contents:
            content: bytes = answer.raw_output_contents[0][4:]  # after its length
        else:
            content = answer.outputs[0].contents.bytes_contents[0]
        return content.decode()


def _messages() -> tuple[Any, Any]:
    """Return the protocol's request and response, with the fields that are needed here."""
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference.proto", package="inference", syntax="proto3"
    )

    def message(name: str, *fields: tuple[str, int, Any, str, bool]) -> None:
        described = file.message_type.add(name=name)
        for field, number, kind, of, repeated in fields:
            described.field.add(
                name=field,
                number=number,
                type=kind,
                type_name=of or None,
                label=FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL,
            )

    text, whole, octets, nested = (
        FIELD.TYPE_STRING, FIELD.TYPE_INT64, FIELD.TYPE_BYTES, FIELD.TYPE_MESSAGE,
    )  # fmt: skip
    message("Contents", ("bytes_contents", 8, octets, "", True))
    message(
        "Tensor",
        ("name", 1, text, "", False),
        ("datatype", 2, text, "", False),
        ("shape", 3, whole, "", True),
        ("contents", 5, nested, ".inference.Contents", False),
    )
    message(
        "Request",
        ("model_name", 1, text, "", False),
        ("inputs", 5, nested, ".inference.Tensor", True),
    )
    message(
        "Response",
        ("outputs", 5, nested, ".inference.Tensor", True),
        ("raw_output_contents", 6, octets, "", True),
    )
    pool = descriptor_pool.DescriptorPool()  # of its own: the names are others' too
    pool.Add(file)
    request, response = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))
        for name in ("Request", "Response")
    )
    return request, response
