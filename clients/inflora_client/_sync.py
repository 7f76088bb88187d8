"""The client for ordinary code."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack, cast

import grpc
from google.protobuf.message import Message

from inflora_client import _calls as calls
from inflora_client import _channel as channel
from inflora_client import _parse as parse
from inflora_client import _upload as upload
from inflora_client._base import DEFAULT_ARTIFACT, ClientBase
from inflora_client._images import ImageSource, read_image
from inflora_client._names import TaskRef, VersionRef
from inflora_client._resume import Resumable, UploadRetry, breaks_off
from inflora_client.errors import StatusError, UnavailableError, error_of_call
from inflora_client.resources import Download, Evaluation, PredictResult, Task, Version

T = TypeVar("T")


class Client(ClientBase):
    """Talks to an InfLoRA server. Thread-safe; one is enough for a whole program.

    Takes the arguments of ``ClientBase``. Every method raises ``StatusError`` when the server
    refuses or cannot be reached. A task may be given as its id, its full name or a ``Task``; a
    version as ``3``, ``"3"``, ``"current"``, its full name or a ``Version``.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are running end as cancelled."""
        self._channel.close()

    def learn(self, examples: upload.Examples, **options: Unpack[upload.LearnOptions]) -> Task:
        """Upload a task; returns once it is stored durably and queued.

        Images given as paths are read one by one, so a task need not fit into memory. If the
        upload breaks off, it goes on with the first example that the server does not have; the
        examples before it are taken once more, but not read. An iterator, a generator for example,
        cannot be taken from again: the error is raised, and the server removes what it has after a
        time.

        Args:
            examples: Labelled images, as ``Example`` or ``(image, label)``. Whoever iterates over
                them again must get the same ones in the same order.
            **options: See ``LearnOptions``.

        Returns:
            The task, QUEUED.

        Raises:
            StatusError: The server refused the task, and nothing is kept of it, or could not be
                reached any more.
            OSError: An image cannot be read.
        """
        return self._upload(upload.learn(self._names, options), examples)

    def forget(
        self, labels: str | Iterable[str], *, purge: bool = False, request_id: str = ""
    ) -> Task:
        """Queue a task that forgets classes for good; no version will know them any more.

        Args:
            labels: Labels or aliases of the classes; at least one.
            purge: Whether to delete the data of all older versions that know them, which can then
                never be used again.
            request_id: At most 128 characters. The same id with the same content returns the task
                that exists. By default, or empty, a new random one.

        Returns:
            The task, QUEUED; ``wait`` for it.
        """
        return self._unary(calls.forget_classes(self._names, labels, purge, request_id))

    def update_class(
        self,
        label: str,
        *,
        new_label: str | None = None,
        add_aliases: str | Iterable[str] = (),
        remove_aliases: str | Iterable[str] = (),
        request_id: str = "",
    ) -> Task:
        """Queue a task that changes what a class is called. At least one change is asked for.

        The label changes first, then aliases are removed, then added.

        Args:
            label: What the class is called now: its label, or an alias.
            new_label: Its label from now on; None keeps it.
            add_aliases: More names under which examples of it may arrive.
            remove_aliases: Aliases that it has no more.
            request_id: As in ``forget``.

        Returns:
            The task, QUEUED; ``wait`` for it.
        """
        return self._unary(
            calls.update_class(
                self._names, label, new_label, add_aliases, remove_aliases, request_id
            )
        )

    def watch(self, task: TaskRef) -> Iterator[Task]:
        """Yield the task as it is, then again whenever it changes, until it has ended."""
        yield from self._resume(self._watch(task))

    def wait(self, task: TaskRef) -> Task:
        """Wait until the task is published, and return it with its report.

        Raises:
            TaskHeldBackError: It ended as HELD_BACK; ``task.report.checks`` say why.
            TaskFailedError: It ended as FAILED or CANCELLED.
        """
        watch = self._watch(task)
        self._drain(watch)
        return watch.result()

    def task(self, task: TaskRef) -> Task:
        """Return a task as it is now."""
        return self._unary(calls.get_task(self._names, task))

    def tasks(self) -> Iterator[Task]:
        """Yield all tasks, newest first, without their reports."""
        yield from self._pages(calls.list_tasks(self._names))

    def cancel(self, task: TaskRef) -> Task:
        """Give a task up that has not ended; return it, CANCELLED."""
        return self._unary(calls.cancel_task(self._names, task))

    def retry(self, task: TaskRef) -> Task:
        """Put a task that is SET_ASIDE into the queue again; return it, QUEUED."""
        return self._unary(calls.retry_task(self._names, task))

    def predict(
        self,
        images: Sequence[ImageSource],
        top_k: int = 5,
        version: VersionRef | None = None,
        task: TaskRef | None = None,
        return_embedding: bool = False,
    ) -> PredictResult:
        """Classify images.

        Args:
            images: At least one, of any and mixed sizes; by default the server takes
                up to 256, and 32 MiB in all.
            top_k: Classes to return for each image, best first.
            version: The version to answer; None or ``"current"`` for the current one.
            task: Where it is known: only the classes of this task compete.
            return_embedding: Whether predictions have embeddings.

        Raises:
            StatusError: The server refused an image, or has no version yet.
            OSError: An image cannot be read.
        """
        question = self._question(top_k, version, task, return_embedding)
        return self._unary(question.call(map(read_image, images)))

    def predict_stream(
        self,
        requests: Iterable[Sequence[ImageSource]],
        top_k: int = 5,
        version: VersionRef | None = None,
        task: TaskRef | None = None,
        return_embedding: bool = False,
    ) -> Iterator[PredictResult]:
        """Classify a stream of requests of some images each; answers come in the same order.

        The requests are taken in a thread of their own, so that the next can be on its way while
        an answer is awaited. An error ends the stream; it is not retried.
        """
        question = self._question(top_k, version, task, return_embedding)
        outgoing = _Outgoing(
            question.stream_request(map(read_image, images)) for images in requests
        )
        for response in self._stream(channel.PREDICT_STREAM, outgoing):
            yield parse.predict_result(response.response)
        outgoing.raise_error()

    def evaluate(
        self,
        examples: upload.Examples,
        version: VersionRef | None = None,
        confusions: int = 20,
    ) -> Evaluation:
        """Measure a version on labelled images; the server keeps nothing of them.

        Images of classes that the version does not know are counted apart, and show how well
        ``novelty`` finds them. Images given as paths are read one by one. If the server becomes
        unavailable, they are uploaded again from the first; an iterator cannot be.

        Args:
            examples: Labelled images, as ``Example`` or ``(image, label)``.
            version: The version to measure; None or ``"current"`` for the one that is current at
                the beginning.
            confusions: Kinds of errors to return at most, 1 to 10000.

        Raises:
            StatusError: The server refused an image, or has no such version.
            OSError: An image cannot be read.
        """
        return self._upload(upload.evaluate(self._names, version, confusions), examples)

    def versions(self) -> Iterator[Version]:
        """Yield all versions, newest first."""
        yield from self._pages(calls.list_versions(self._names))

    def version(self, version: VersionRef = "current") -> Version:
        """Return a version."""
        return self._unary(calls.get_version(self._names, version))

    def promote(self, version: VersionRef, *, force: bool = False) -> Version:
        """Make a version current; return it. Rolling back is promoting an older one.

        Args:
            version: Which; ``"current"`` is refused.
            force: Take a candidate, which the publish gate held back, too.
        """
        return self._unary(calls.promote_version(self._names, version, force))

    def pin(self, version: VersionRef) -> Version:
        """Keep a version however old it is; return it. A purge deletes it all the same."""
        return self._unary(calls.pin_version(self._names, version))

    def unpin(self, version: VersionRef) -> Version:
        """Let a pinned version go when it is old; return it."""
        return self._unary(calls.unpin_version(self._names, version))

    def download(
        self,
        version: VersionRef = "current",
        artifact: str = DEFAULT_ARTIFACT,
        *,
        held: Sequence[str] = (),
        to: str | Path = ".",
    ) -> Download:
        """Download a file of a version and verify its SHA-256.

        After a break it goes on where it was. The destination is replaced in one step at the end,
        so there is never half a file.

        Args:
            version: The version.
            artifact: File name as listed in ``Version.artifacts``, smaller forms among them; or
                ``model.delta``, ``model.fp16.delta`` or ``model.int8.delta``, which lead to one
                from one of the files ``held`` (docs/edge.md).
            held: For deltas: SHA-256 of that file of other versions, as far as there are any.
            to: The file to write, or an existing directory, where it keeps its name.

        Raises:
            CorruptDownloadError: What arrived is not what the server announced.
            NotFoundError: There is no such file, or no delta smaller than the whole file.
            OSError: The file cannot be written.
        """
        with self._transfer(version, artifact, held, to) as transfer:
            self._drain(transfer)
            return transfer.finish()

    def _connect(self) -> None:
        self._channel: grpc.Channel = self._open_channel(grpc)
        self._stubs = channel.Stubs(self._channel, self._access.metadata())

    def _unary(self, call: calls.Call[T]) -> T:
        try:
            response = self._stubs[call.rpc](
                call.request, timeout=self._timeout, wait_for_ready=self._wait_for_ready
            )
        except grpc.RpcError as error:
            raise error_of_call(error) from error
        return call.parse(response)

    def _pages(self, page_call: calls.PageCall[T]) -> Iterator[T]:
        token = ""
        while True:
            page = self._unary(page_call(token))
            yield from page.items
            if not (token := page.next_token):
                return

    def _stream(self, rpc: channel.Rpc, request: object) -> Generator[Any, None, None]:
        call = self._stubs[rpc](request, wait_for_ready=self._wait_for_ready)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_of_call(error) from error
        finally:
            # Without effect on a call that has ended. What OpenTelemetry's instrumentation makes of
            # it is a generator, which was closed by now, and the call with it.
            if (cancel := getattr(call, "cancel", None)) is not None:
                cancel()

    def _resume(self, stream: Resumable[T]) -> Iterator[T]:
        while not stream.complete:
            try:
                with closing(self._stream(stream.rpc, stream.request())) as responses:
                    for response in responses:
                        if (item := stream.accept(response)) is not None:
                            yield item
                stream.end_of_stream()
            except UnavailableError as error:
                time.sleep(stream.delay_after(error))

    def _drain(self, stream: Resumable[Any]) -> None:
        for _ in self._resume(stream):
            pass

    def _upload(self, what: upload.Upload[T], examples: upload.Examples) -> T:
        retry = UploadRetry(self._retry)
        while True:
            outgoing = _Outgoing(what.messages(examples, retry.start))
            try:
                return what.parse(self._upload_once(what.rpc, outgoing))
            except StatusError as error:
                again = upload.repeatable(examples)
                # What was all taken may have arrived, though its answer did not.
                if not breaks_off(error) or not (again or (what.own_id and outgoing.ended)):
                    raise
                time.sleep(retry.delay_after(error, outgoing.taken))
                found = self._uploaded(what, retry)
                if found.task and what.own_id:
                    return cast(T, self.task(found.task))
                if not again:
                    raise
                # A task under an id that others may have used is compared by the server.
                retry.go_on_from(0 if found.task else found.count)

    def _uploaded(self, what: upload.Upload[T], retry: UploadRetry) -> calls.Uploaded:
        """Return how much of an upload the server has."""
        while what.request_id:
            try:
                return self._unary(calls.query_upload(self._names, what.request_id))
            except UnavailableError as error:
                time.sleep(retry.delay_after(error))
            except StatusError as error:
                if error.code not in ("NOT_FOUND", "UNIMPLEMENTED"):  # the latter of older servers
                    raise
                break
        return calls.Uploaded(0, "")

    def _upload_once(self, rpc: channel.Rpc, outgoing: _Outgoing[Message]) -> Any:
        # After an error on this side the upload has no end, and nothing is learned of it.
        call = self._stubs[rpc].future(outgoing, wait_for_ready=self._wait_for_ready)
        try:
            return call.result()
        except grpc.RpcError as error:
            outgoing.raise_error()
            raise error_of_call(error) from error
        finally:
            call.cancel()  # for KeyboardInterrupt; without effect on a call that has ended


class _Outgoing(Generic[T]):
    """An iterator that gRPC may consume in its own thread, which would swallow its errors.

    An error ends the iteration; whoever made the call gets it from ``raise_error``.

    Args:
        items: What to iterate over.

    Attributes:
        taken: How many were.
        ended: Whether there were no more.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._error: Exception | None = None
        self.taken = 0
        self.ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            item = next(self._items)
        except StopIteration:
            self.ended = True
            raise
        except Exception as error:
            self._error = error
            raise StopIteration from None
        self.taken += 1
        return item

    def raise_error(self) -> None:
        """Raise the error that ended the iteration, if one did."""
        if self._error is not None:
            raise self._error
