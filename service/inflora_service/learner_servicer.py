"""``LearnerService``: decode, call ``TaskQueue``, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from inflora.v1 import learner_service_pb2 as pb
from inflora.v1 import learner_service_pb2_grpc
from inflora_core.config import LearnConfig, Limits
from inflora_service import codec, names, receiving
from inflora_service.access import caller
from inflora_service.errors import Context, fields_under
from inflora_service.tasks import TaskQueue


class LearnerServicer(learner_service_pb2_grpc.LearnerServiceServicer):
    """Handlers; ``ErrorInterceptor`` turns what they raise into a status."""

    def __init__(self, tasks: TaskQueue, config: LearnConfig, limits: Limits) -> None:
        self._tasks = tasks
        self._config = config
        self._limits = limits

    async def LearnTask(
        self, request_iterator: AsyncIterator[pb.LearnTaskRequest], context: Context
    ) -> pb.LearnTaskResponse:
        """Take an upload, and answer once it is a task."""
        first = await receiving.first_message(request_iterator, self._limits)
        with fields_under("spec."):
            request = codec.decode_spec(first.spec, self._config)
        async with self._tasks.upload(request, caller(context)) as upload:
            await receiving.receive(request_iterator, upload, self._limits)
            task = await self._tasks.accept(upload, caller(context))
        return pb.LearnTaskResponse(task=codec.encode_task(await self._tasks.get(task.id)))

    async def QueryUpload(
        self, request: pb.QueryUploadRequest, context: Context
    ) -> pb.QueryUploadResponse:
        """Say how far an upload has come."""
        found = await self._tasks.query_upload(codec.decode_upload_query(request))
        return codec.encode_upload(found)

    async def ForgetClasses(
        self, request: pb.ForgetClassesRequest, context: Context
    ) -> pb.ForgetClassesResponse:
        """Queue a task that forgets classes."""
        task = await self._tasks.edit(codec.decode_forget(request, self._limits), caller(context))
        return pb.ForgetClassesResponse(task=codec.encode_task(await self._tasks.get(task.id)))

    async def UpdateClass(
        self, request: pb.UpdateClassRequest, context: Context
    ) -> pb.UpdateClassResponse:
        """Queue a task that changes what a class is called."""
        task = await self._tasks.edit(codec.decode_update(request, self._limits), caller(context))
        return pb.UpdateClassResponse(task=codec.encode_task(await self._tasks.get(task.id)))

    async def WatchTask(
        self, request: pb.WatchTaskRequest, context: Context
    ) -> AsyncIterator[pb.WatchTaskResponse]:
        """Stream the task until it has ended."""
        task = names.parse_task(request.name, field="name")
        async with aclosing(self._tasks.watch(task)) as snapshots:
            async for snapshot in snapshots:
                yield pb.WatchTaskResponse(task=codec.encode_task(snapshot))

    async def GetTask(self, request: pb.GetTaskRequest, context: Context) -> pb.GetTaskResponse:
        """Return a task."""
        snapshot = await self._tasks.get(names.parse_task(request.name, field="name"))
        return pb.GetTaskResponse(task=codec.encode_task(snapshot))

    async def ListTasks(
        self, request: pb.ListTasksRequest, context: Context
    ) -> pb.ListTasksResponse:
        """Return a page of tasks."""
        names.check_model(request.parent, field="parent")
        page = names.Page.of("tasks", request.page_size, request.page_token)
        rows, token = page.cut(await self._tasks.page(page.before, page.size + 1))
        return pb.ListTasksResponse(
            tasks=[codec.encode_task(snapshot, report=False) for snapshot in rows],
            next_page_token=token,
        )

    async def CancelTask(
        self, request: pb.CancelTaskRequest, context: Context
    ) -> pb.CancelTaskResponse:
        """Give a task up."""
        task = names.parse_task(request.name, field="name")
        snapshot = await self._tasks.cancel(task, caller(context))
        return pb.CancelTaskResponse(task=codec.encode_task(snapshot))

    async def RetryTask(
        self, request: pb.RetryTaskRequest, context: Context
    ) -> pb.RetryTaskResponse:
        """Try a task again that was set aside."""
        task = names.parse_task(request.name, field="name")
        snapshot = await self._tasks.retry(task, caller(context))
        return pb.RetryTaskResponse(task=codec.encode_task(snapshot))
