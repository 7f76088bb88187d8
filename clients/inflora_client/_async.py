"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from inflora_client import _calls as calls
from inflora_client import _channel as channel
from inflora_client import _upload as upload
from inflora_client._base import DEFAULT_ARTIFACT, ClientBase
from inflora_client._bridge import Bridge
from inflora_client._images import ImageSource, read_image_async
from inflora_client._names import TaskRef, VersionRef
from inflora_client._resume import Resumable
from inflora_client._sync import Client
from inflora_client.errors import UnavailableError, error_of_call
from inflora_client.resources import Download, Evaluation, PredictResult, Task, Version

T = TypeVar("T")


class AsyncClient(ClientBase):
    """Talks to an InfLoRA server from asyncio.

    Has the methods of ``Client``, with the same arguments, results and errors, as coroutines and
    asynchronous iterators. Belongs to the event loop it is first used in. ``learn``, ``evaluate``
    and ``predict_stream`` each use a thread and a connection of their own, where they also iterate
    over what they send, unless that is an asynchronous iterable.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that are running end as cancelled."""
        await self._channel.close()

    async def learn(
        self, examples: upload.AnyExamples, **options: Unpack[upload.LearnOptions]
    ) -> Task:
        """As ``Client.learn``; the examples may come from an asynchronous iterable, too."""
        async with self._bridge() as bridge:
            source = bridge.source(examples)
            return await bridge.run(lambda client: client.learn(source, **options))

    async def forget(
        self, labels: str | Iterable[str], *, purge: bool = False, request_id: str = ""
    ) -> Task:
        """As ``Client.forget``."""
        return await self._unary(calls.forget_classes(self._names, labels, purge, request_id))

    async def update_class(
        self,
        label: str,
        *,
        new_label: str | None = None,
        add_aliases: str | Iterable[str] = (),
        remove_aliases: str | Iterable[str] = (),
        request_id: str = "",
    ) -> Task:
        """As ``Client.update_class``."""
        return await self._unary(
            calls.update_class(
                self._names, label, new_label, add_aliases, remove_aliases, request_id
            )
        )

    async def watch(self, task: TaskRef) -> AsyncIterator[Task]:
        """As ``Client.watch``."""
        async with aclosing(self._resume(self._watch(task))) as states:
            async for state in states:
                yield state

    async def wait(self, task: TaskRef) -> Task:
        """As ``Client.wait``."""
        watch = self._watch(task)
        await self._drain(watch)
        return watch.result()

    async def task(self, task: TaskRef) -> Task:
        """As ``Client.task``."""
        return await self._unary(calls.get_task(self._names, task))

    def tasks(self) -> AsyncIterator[Task]:
        """As ``Client.tasks``."""
        return self._pages(calls.list_tasks(self._names))

    async def cancel(self, task: TaskRef) -> Task:
        """As ``Client.cancel``."""
        return await self._unary(calls.cancel_task(self._names, task))

    async def retry(self, task: TaskRef) -> Task:
        """As ``Client.retry``."""
        return await self._unary(calls.retry_task(self._names, task))

    async def predict(
        self,
        images: Sequence[ImageSource],
        top_k: int = 5,
        version: VersionRef | None = None,
        task: TaskRef | None = None,
        return_embedding: bool = False,
    ) -> PredictResult:
        """As ``Client.predict``."""
        question = self._question(top_k, version, task, return_embedding)
        return await self._unary(question.call([await read_image_async(i) for i in images]))

    async def predict_stream(
        self,
        requests: Iterable[Sequence[ImageSource]] | AsyncIterable[Sequence[ImageSource]],
        top_k: int = 5,
        version: VersionRef | None = None,
        task: TaskRef | None = None,
        return_embedding: bool = False,
    ) -> AsyncIterator[PredictResult]:
        """As ``Client.predict_stream``; the requests may come asynchronously, too."""
        async with self._bridge() as bridge:
            source = bridge.source(requests)
            results = bridge.iterate(
                lambda client: client.predict_stream(source, top_k, version, task, return_embedding)
            )
            async with aclosing(results):
                async for result in results:
                    yield result

    async def evaluate(
        self,
        examples: upload.AnyExamples,
        version: VersionRef | None = None,
        confusions: int = 20,
    ) -> Evaluation:
        """As ``Client.evaluate``; the examples may come from an asynchronous iterable, too."""
        async with self._bridge() as bridge:
            source = bridge.source(examples)
            return await bridge.run(lambda client: client.evaluate(source, version, confusions))

    def versions(self) -> AsyncIterator[Version]:
        """As ``Client.versions``."""
        return self._pages(calls.list_versions(self._names))

    async def version(self, version: VersionRef = "current") -> Version:
        """As ``Client.version``."""
        return await self._unary(calls.get_version(self._names, version))

    async def promote(self, version: VersionRef, *, force: bool = False) -> Version:
        """As ``Client.promote``."""
        return await self._unary(calls.promote_version(self._names, version, force))

    async def pin(self, version: VersionRef) -> Version:
        """As ``Client.pin``."""
        return await self._unary(calls.pin_version(self._names, version))

    async def unpin(self, version: VersionRef) -> Version:
        """As ``Client.unpin``."""
        return await self._unary(calls.unpin_version(self._names, version))

    async def download(
        self,
        version: VersionRef = "current",
        artifact: str = DEFAULT_ARTIFACT,
        *,
        held: Sequence[str] = (),
        to: str | Path = ".",
    ) -> Download:
        """As ``Client.download``."""
        with self._transfer(version, artifact, held, to) as transfer:
            await self._drain(transfer)
            return await asyncio.to_thread(transfer.finish)

    def _bridge(self) -> Bridge:
        return Bridge(
            Client(
                self._target,
                model=self._model,
                timeout=self._timeout,
                wait_for_ready=self._wait_for_ready,
                retry=self._retry,
                **self._access.arguments(),
            )
        )

    def _connect(self) -> None:
        """Look at what is given; a grpc.aio channel must not be made before the loop runs."""
        self._metadata = self._access.metadata()
        self._access.check(self._target)

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        opened: grpc.aio.Channel = self._open_channel(grpc.aio)
        return opened

    @cached_property
    def _stubs(self) -> channel.Stubs:
        return channel.Stubs(self._channel, self._metadata)

    async def _unary(self, call: calls.Call[T]) -> T:
        try:
            response = await self._stubs[call.rpc](
                call.request, timeout=self._timeout, wait_for_ready=self._wait_for_ready
            )
        except grpc.RpcError as error:
            raise error_of_call(error) from error
        return call.parse(response)

    async def _pages(self, page_call: calls.PageCall[T]) -> AsyncIterator[T]:
        token = ""
        while True:
            page = await self._unary(page_call(token))
            for item in page.items:
                yield item
            if not (token := page.next_token):
                return

    async def _stream(self, rpc: channel.Rpc, request: object) -> AsyncGenerator[Any, None]:
        call = self._stubs[rpc](request, wait_for_ready=self._wait_for_ready)
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise error_of_call(error) from error
        finally:
            call.cancel()  # without effect on a call that has ended

    async def _resume(self, stream: Resumable[T]) -> AsyncGenerator[T, None]:
        while not stream.complete:
            try:
                async with aclosing(self._stream(stream.rpc, stream.request())) as responses:
                    async for response in responses:
                        if (item := stream.accept(response)) is not None:
                            yield item
                stream.end_of_stream()
            except UnavailableError as error:
                await asyncio.sleep(stream.delay_after(error))

    async def _drain(self, stream: Resumable[Any]) -> None:
        async for _ in self._resume(stream):
            pass
