"""``ModelService``: decode, call ``Store``, the host and ``TaskQueue``, encode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import islice

from inflora.v1 import model_service_pb2 as pb
from inflora.v1 import model_service_pb2_grpc
from inflora_core import forms
from inflora_core.errors import DamagedError, InvalidInputError, NotFoundError, StateError
from inflora_core.model import Version
from inflora_core.store import ONNX_FILE, Store
from inflora_service import access, codec, names
from inflora_service.access import caller
from inflora_service.artifacts import cut, read_artifact
from inflora_service.derived import DELTAS, Derived, DerivedFile
from inflora_service.errors import Context
from inflora_service.promoting import ModelHost
from inflora_service.serving import Host
from inflora_service.tasks import TaskQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """What changes versions, in a server that makes them."""

    host: ModelHost
    tasks: TaskQueue


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Handlers; ``ErrorInterceptor`` turns what they raise into a status.

    Args:
        store: Where versions are.
        host: What is loaded of them.
        changes: Changes them; None in a server that follows another.
    """

    def __init__(self, store: Store, host: Host, changes: Changes | None) -> None:
        self._store = store
        self._host = host
        self._changes = changes
        self._derived = Derived(store)

    async def ListVersions(
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        """Return a page of versions."""
        names.check_model(request.parent, field="parent")
        page = names.Page.of("versions", request.page_size, request.page_token)
        versions, token = page.cut(await asyncio.to_thread(self._newest, page))
        return pb.ListVersionsResponse(
            versions=[self._encode(version) for version in versions], next_page_token=token
        )

    async def GetVersion(
        self, request: pb.GetVersionRequest, context: Context
    ) -> pb.GetVersionResponse:
        """Return a version."""
        return pb.GetVersionResponse(version=self._encode(await self._version(request.name)))

    async def PromoteVersion(
        self, request: pb.PromoteVersionRequest, context: Context
    ) -> pb.PromoteVersionResponse:
        """Make a version current."""
        number = names.parse_version(request.name, field="name")
        version = await self._changing().tasks.promote(number, caller(context), force=request.force)
        return pb.PromoteVersionResponse(version=self._encode(version))

    async def PinVersion(
        self, request: pb.PinVersionRequest, context: Context
    ) -> pb.PinVersionResponse:
        """Keep a version however old it is."""
        number = names.parse_version(request.name, field="name")
        version = await self._changing().host.pin(number, caller(context))
        return pb.PinVersionResponse(version=self._encode(version))

    async def UnpinVersion(
        self, request: pb.UnpinVersionRequest, context: Context
    ) -> pb.UnpinVersionResponse:
        """Let a version go when it is old."""
        number = names.parse_version(request.name, field="name")
        version = await self._changing().host.unpin(number, caller(context))
        return pb.UnpinVersionResponse(version=self._encode(version))

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """Stream a file of a version."""
        version = await self._version(request.name)
        name = request.artifact or ONNX_FILE
        if request.held and name not in DELTAS:
            raise InvalidInputError(f"it is for {', '.join(DELTAS)} alone", field="held")
        if name in DELTAS:
            made = await self._derived.delta(version.number, name, request.held)
        elif form := forms.form_of(name):
            made = await self._derived.form(version.number, form)
        else:
            made = None
        if made is not None:
            async for response in self._stream(version, made, request.offset):
                yield response
            return
        if name != ONNX_FILE:
            # Statistics of customers' images, and what the next task is learned with.
            access.require(
                "learn",
                f"{name} needs the role 'learn', as {ONNX_FILE}, its forms and deltas do not",
            )
        path = await asyncio.to_thread(self._store.path, version.number, name)
        entry = version.file(name)
        assert entry is not None, "Store.path refuses what the manifest does not list"
        if name == ONNX_FILE and not self._store.has_onnx(version.number):
            await asyncio.to_thread(self._store.rebuild_onnx, version.number)
        position = request.offset
        response = pb.DownloadArtifactResponse(
            artifact=codec.encode_artifact(entry), version=names.version_name(version.number)
        )
        rebuild = partial(self._store.rebuild_onnx, version.number) if name == ONNX_FILE else None
        try:
            async with aclosing(read_artifact(path, entry, position, rebuild)) as chunks:
                async for chunk in chunks:
                    response.data, response.offset = chunk, position
                    yield response
                    position += len(chunk)
                    response = pb.DownloadArtifactResponse()
        except DamagedError:
            # It is not damaged if it was deleted meanwhile, with a class or because it is old.
            await asyncio.to_thread(self._store.path, version.number, name)
            raise

    async def _stream(
        self, version: Version, made: DerivedFile, position: int
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        response = pb.DownloadArtifactResponse(
            artifact=codec.encode_artifact(made.entry), version=names.version_name(version.number)
        )
        for chunk in cut(made.content, made.entry, position):
            # A class may be forgotten while somebody reads slowly.
            await asyncio.to_thread(self._derived.check, version.number)
            response.data, response.offset = chunk, position
            yield response
            position += len(chunk)
            response = pb.DownloadArtifactResponse()

    def _changing(self) -> Changes:
        if self._changes is None:
            raise StateError(
                "this server follows a shared store: versions are promoted and pinned where they "
                "are learned"
            )
        return self._changes

    def _newest(self, page: names.Page) -> list[tuple[int, Version]]:
        return list(islice(self._readable(page.before), page.size + 1))

    def _readable(self, before: int | None) -> Iterator[tuple[int, Version]]:
        """Yield versions, newest first; one whose manifest is damaged hides none of the others."""
        for number in reversed(self._store.numbers()):
            if before is None or number < before:
                try:
                    yield number, self._store.version(number)
                except (DamagedError, NotFoundError) as error:
                    log.warning("version %d is not listed: %s", number, error)

    async def _version(self, name: str) -> Version:
        number = names.parse_version_or_current(name, field="name")
        if number is None:
            number = self._host.stand_in
        if number is None:
            number = await asyncio.to_thread(self._store.current)
        if number is None:
            raise NotFoundError("no version is published yet", field="name")
        return await asyncio.to_thread(self._store.version, number)

    def _encode(self, version: Version) -> pb.Version:
        return codec.encode_version(
            version,
            self._store.artifacts(version),
            self._store.forms(version),
            current=self._host.is_current(version.number),
            provider=self._host.provider(version.number),
            stand_in=version.number == self._host.stand_in,
        )
