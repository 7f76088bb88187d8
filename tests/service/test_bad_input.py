"""Bad input: a clear status, the field named, nothing left behind, and the next call works."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from PIL import Image

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.config import Limits
from inflora_core.store import Store
from tests.service.conftest import GREEN, RED, Running, Script, fails, png, upload
from tests.service.mean_colour import publish_colours

INVALID = ("INVALID_ARGUMENT", "INVALID_INPUT")
BROKEN_OFF = ("INVALID_ARGUMENT", "BROKEN_OFF")
IMAGE = ("INVALID_ARGUMENT", "INVALID_IMAGE")
LIMIT = ("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED")
STATE = ("FAILED_PRECONDITION", "WRONG_STATE")
NOT_FOUND = ("NOT_FOUND", "NOT_FOUND")


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _bomb() -> bytes:
    """Return a small PNG file of 20000 x 20000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(20000 * 2501), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def _animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    return _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


IMAGES: dict[str, Callable[[], bytes]] = {
    "zero bytes": lambda: b"",
    "truncated": lambda: png()[:-20],
    "not an image": lambda: b"what is this?" * 10,
    "animated": _animated,
    "a gif": lambda: _saved(Image.new("RGB", (8, 8)), "GIF"),
    "CMYK": lambda: _saved(Image.new("CMYK", (8, 8)), "JPEG"),
    "16 bits": lambda: _saved(Image.new("I;16", (8, 8)), "PNG"),
    "1 x 1": lambda: png(size=(1, 1)),
    "20000 x 20000": _bomb,
}


@pytest.fixture(autouse=True)
def _learner_holds(script: Script) -> None:
    script.hold("DECODING")  # accepted tasks stay where they are


async def assert_unharmed(running: Running) -> None:
    """Assert that nothing is left of what was refused, and that a good task is accepted."""
    response = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert not response.tasks
    assert not list((running.settings.store / "spool").iterdir())
    task = await running.learn({"a good class": [png()]})
    assert task.example_count == 1


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
async def test_images_that_are_not_learned(running: Running, make: Callable[[], bytes]) -> None:
    spec, *begun, _ = upload({"a": [png()] * 40})
    _, *more = upload({"b": [png(), make(), png()]})
    batches = [spec, *begun, *more]
    with fails(*IMAGE, field="examples[41].image"):
        await running.learner.LearnTask(batches)
    await assert_unharmed(running)


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
async def test_images_that_are_not_predicted(
    start: Callable[..., Any], settings: Any, make: Callable[[], bytes]
) -> None:
    publish(settings.store, red=RED, green=GREEN)
    running = await start()
    with fails(*IMAGE, field="images[1]"):
        await running.predictor.Predict(predictor_pb.PredictRequest(images=[png(), make(), png()]))
    request = predictor_pb.PredictStreamRequest(
        request=predictor_pb.PredictRequest(images=[make()])
    )
    with fails(*IMAGE, field="request.images[0]"):
        _ = [answer async for answer in running.predictor.PredictStream(iter([request]))]
    answer = await running.predictor.Predict(predictor_pb.PredictRequest(images=[png(GREEN)]))
    assert answer.predictions[0].scores[0].label == "green"


def publish(path: Any, **colours: tuple[int, int, int]) -> int:
    """Publish a version and make it current, as if it had been learned before."""
    store = Store.open(path)
    scaled = {name: [part / 255 for part in colour] for name, colour in colours.items()}
    number = publish_colours(store, f"task-{store.next_number()}", scaled, store.current())
    store.set_current(number)
    return number


SPECS: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "epochs 0": ({"epochs": 0}, INVALID, "spec.epochs"),
    "epochs over": ({"epochs": 10_001}, INVALID, "spec.epochs"),
    "negative rate": ({"learning_rate": -0.1}, INVALID, "spec.learning_rate"),
    "rate not a number": ({"learning_rate": math.nan}, INVALID, "spec.learning_rate"),
    "infinite rate": ({"learning_rate": math.inf}, INVALID, "spec.learning_rate"),
    "rank 0": ({"rank": 0}, INVALID, "spec.rank"),
    "negative batch": ({"batch_size": -1}, INVALID, "spec.batch_size"),
    "negative seed": ({"seed": -1}, INVALID, "spec.seed"),
    "share over": ({"held_out_share": 0.6}, INVALID, "spec.held_out_share"),
    "share not a number": ({"held_out_share": math.nan}, INVALID, "spec.held_out_share"),
    "long display name": ({"display_name": "x" * 201}, INVALID, "spec.display_name"),
    "long request id": ({"request_id": "x" * 129}, INVALID, "spec.request_id"),
    "no model's name": ({"parent": "default"}, INVALID, "spec.parent"),
    "unknown model": ({"parent": "models/other"}, NOT_FOUND, "spec.parent"),
    "a negative start": ({"resume_from": -1, "request_id": "a"}, INVALID, "spec.resume_from"),
    "a start of nothing": ({"resume_from": 1}, INVALID, "spec.request_id"),
    "a start after nothing": ({"resume_from": 1, "request_id": "a"}, STATE, "spec.resume_from"),
}


@pytest.mark.parametrize(("spec", "status", "field"), SPECS.values(), ids=SPECS)
async def test_specs(
    running: Running, spec: dict[str, Any], status: tuple[str, str], field: str
) -> None:
    with fails(*status, field=field):
        await running.learn({"a": [png()]}, **spec)
    await assert_unharmed(running)


LABELS = {
    "none": "",
    "decomposed": "Cafe\u0301",
    "white space": " cat",
    "a control character": "cat\x00",
    "too long": "x" * 201,
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
async def test_labels(running: Running, label: str) -> None:
    with fails(*INVALID, field="examples[1].label"):
        await running.learn({"Caf\u00e9": [png()], label: [png()]})
    await assert_unharmed(running)


SPEC = learner_pb.LearnTaskRequest(spec=pb.TaskSpec())
NO_EXAMPLES = learner_pb.LearnTaskRequest(examples=pb.ExampleBatch())
_, EXAMPLES, END = upload({"a": [png()]})
END_OF_NONE = learner_pb.LearnTaskRequest(end=learner_pb.UploadEnd())

SEQUENCES: dict[str, tuple[list[learner_pb.LearnTaskRequest], str]] = {
    "nothing at all": ([], "spec"),
    "an empty task": ([SPEC, END_OF_NONE], "examples"),
    "an upload that broke off": ([SPEC, EXAMPLES], "end"),
    "an upload that lost a message": ([SPEC, EXAMPLES, EXAMPLES, END], "end.example_count"),
    "examples after the end": ([SPEC, EXAMPLES, END, EXAMPLES], "payload"),
    "two ends": ([SPEC, EXAMPLES, END, END], "payload"),
    "an empty batch": ([SPEC, NO_EXAMPLES, EXAMPLES], "examples"),
    "examples first": ([EXAMPLES, SPEC], "spec"),
    "an empty message first": ([learner_pb.LearnTaskRequest(), SPEC, EXAMPLES], "spec"),
    "an empty message later": ([SPEC, EXAMPLES, learner_pb.LearnTaskRequest(), END], "payload"),
    "a second spec": ([SPEC, EXAMPLES, SPEC, END], "spec"),
}


@pytest.mark.parametrize(("messages", "field"), SEQUENCES.values(), ids=SEQUENCES)
async def test_sequences_of_messages(
    running: Running, messages: list[learner_pb.LearnTaskRequest], field: str
) -> None:
    status = BROKEN_OFF if field == "end" else INVALID
    with fails(*status, field=field):
        await running.learner.LearnTask(iter(messages))
    await assert_unharmed(running)


LIMITS: dict[str, tuple[dict[str, int], dict[str, list[bytes]], str]] = {
    "image": ({"image_bytes": 200}, {"a": [bytes(201)]}, "examples[0].image"),
    "images": ({"task_images": 3}, {"a": [png()] * 4}, "examples"),
    "bytes": ({"task_bytes": 200}, {"a": [png()] * 3}, "examples"),
    "classes": ({"task_classes": 2}, {c: [png()] for c in "abc"}, "examples[2].label"),
}


@pytest.mark.parametrize(("limits", "classes", "field"), LIMITS.values(), ids=LIMITS)
async def test_a_task_over_its_limits(
    start: Callable[..., Any],
    limits: dict[str, int],
    classes: dict[str, list[bytes]],
    field: str,
) -> None:
    running = await start(limits=Limits(**limits))
    with fails(*LIMIT, field=field):
        await running.learn(classes)
    await assert_unharmed(running)


async def test_a_message_over_its_limit(running: Running) -> None:
    image = bytes(2**20)
    predict = predictor_pb.PredictRequest(images=[image])
    with fails(*LIMIT, field="examples"):
        await running.learn({"a": [image]})
    with fails(*LIMIT, field="images"):
        await running.predictor.Predict(predict)
    requests = [predictor_pb.PredictStreamRequest(request=predict)]
    with fails(*LIMIT, field="request.images"):
        async for _ in running.predictor.PredictStream(requests):
            pass
    await assert_unharmed(running)


async def test_a_message_over_twice_its_limit(running: Running) -> None:
    # grpc itself refuses it, unread, with its own status.
    image = bytes(2 * 2**20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.learn({"a": [image]})
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.predictor.Predict(predictor_pb.PredictRequest(images=[image]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await assert_unharmed(running)


async def test_a_message_that_cannot_be_decoded(running: Running) -> None:
    predict = running.channel.unary_unary("/inflora.v1.PredictorService/Predict")
    watch = running.channel.unary_stream("/inflora.v1.LearnerService/WatchTask")
    learn = running.channel.stream_unary("/inflora.v1.LearnerService/LearnTask")
    with fails(*INVALID):
        await predict(b"\xff")
    with fails(*INVALID):
        await watch(b"\xff").read()
    with fails(*INVALID):
        await learn([b"\xff"])
    await assert_unharmed(running)


async def test_a_full_queue(running: Running, script: Script) -> None:
    for label in "abcd":  # one is being learned, three wait
        await running.learn({label: [png()]})
        await script.reached("DECODING")
    with fails(*LIMIT):
        await running.learn({"e": [png()]})
    assert len(list((running.settings.store / "spool").iterdir())) == 4


async def test_a_client_that_is_gone_in_mid_upload(running: Running) -> None:
    call = running.learner.LearnTask()
    for message in upload({"a": [png()]}, request_id="once")[:-1]:
        await call.write(message)
    assert call.cancel()
    task = await running.learn({"a": [png()]}, request_id="once")
    await running.server.stop()  # waits for both calls to end
    (spool,) = (running.settings.store / "spool").iterdir()
    assert task.name.endswith(f"/{spool.name}")


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("", INVALID),
        ("models/default", INVALID),
        ("models/default/tasks/../x", INVALID),
        ("models/default/tasks/unknown", NOT_FOUND),
        ("models/other/tasks/a", NOT_FOUND),
    ],
)
async def test_names_of_tasks(running: Running, name: str, status: tuple[str, str]) -> None:
    with fails(*status, field="name"):
        await running.get(name)
    with fails(*status, field="name"):
        await running.watched(name)
    with fails(*status, field="name"):
        await running.learner.CancelTask(learner_pb.CancelTaskRequest(name=name))
    await assert_unharmed(running)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("", INVALID),
        ("models/default/versions/0", INVALID),
        ("models/default/versions/../1", INVALID),
        ("models/default/versions/7", NOT_FOUND),
        ("models/other/versions/1", NOT_FOUND),
    ],
)
async def test_names_of_versions(running: Running, name: str, status: tuple[str, str]) -> None:
    with fails(*status, field="name"):
        await running.model.GetVersion(model_pb.GetVersionRequest(name=name))
    with fails(*status, field="name"):
        await running.model.PromoteVersion(model_pb.PromoteVersionRequest(name=name))
    with fails(*status, field="name"):
        await download(running, name=name)
    await assert_unharmed(running)


async def download(running: Running, **request: Any) -> list[model_pb.DownloadArtifactResponse]:
    """Return all messages of a download."""
    stream = running.model.DownloadArtifact(model_pb.DownloadArtifactRequest(**request))
    return [message async for message in stream]


async def test_the_current_version_before_there_is_one(running: Running) -> None:
    name = "models/default/versions/current"
    with fails(*NOT_FOUND, field="name"):
        await running.model.GetVersion(model_pb.GetVersionRequest(name=name))
    with fails(*NOT_FOUND, field="name"):
        await download(running, name=name)
    with fails(*INVALID, field="name"):
        await running.model.PromoteVersion(model_pb.PromoteVersionRequest(name=name))
    with fails(*STATE):
        await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))
    await assert_unharmed(running)


async def test_artifacts(start: Callable[..., Any], settings: Any) -> None:
    name = f"models/default/versions/{publish(settings.store, red=RED)}"
    running = await start()
    for artifact in ("unknown.txt", "manifest.json", "../../CURRENT", "/etc/passwd"):
        with fails(*NOT_FOUND, field="artifact"):
            await download(running, name=name, artifact=artifact)
    with fails(*INVALID, field="offset"):
        await download(running, name=name, offset=-1)
    with fails("OUT_OF_RANGE", "OUT_OF_RANGE", field="offset"):
        await download(running, name=name, offset=2**40)
    known = "0" * 64
    with fails(*INVALID, field="held"):
        await download(running, name=name, held=[known])
    for held, field in (([], "held"), ([known] * 17, "held"), ([known, "ABC"], "held[1]")):
        with fails(*INVALID, field=field):
            await download(running, name=name, artifact="model.delta", held=held)
    with fails(*NOT_FOUND, field="held"):
        await download(running, name=name, artifact="model.delta", held=[known])
    await assert_unharmed(running)


PREDICTS: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "no image": ({"images": []}, INVALID, "images"),
    "too many images": ({"images": [png()] * 5}, LIMIT, "images"),
    "negative top_k": ({"top_k": -1}, INVALID, "top_k"),
    "no model's name": ({"model": "default"}, INVALID, "model"),
    "unknown model": ({"model": "models/other"}, NOT_FOUND, "model"),
    "no version's name": ({"version": "1"}, INVALID, "version"),
    "unknown version": ({"version": "models/default/versions/9"}, NOT_FOUND, "version"),
    "no task's name": ({"task": "a"}, INVALID, "task"),
    "unknown task": ({"task": "models/default/tasks/unknown"}, NOT_FOUND, "task"),
}


@pytest.mark.parametrize(("changes", "status", "field"), PREDICTS.values(), ids=PREDICTS)
async def test_predictions(
    start: Callable[..., Any],
    settings: Any,
    changes: dict[str, Any],
    status: tuple[str, str],
    field: str,
) -> None:
    publish(settings.store, red=RED)
    running = await start()
    with fails(*status, field=field):
        await running.predictor.Predict(
            predictor_pb.PredictRequest(**{"images": [png()], **changes})
        )
    answer = await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))
    assert answer.predictions[0].scores[0].label == "red"


async def test_lists(start: Callable[..., Any], settings: Any) -> None:
    publish(settings.store, red=RED)
    publish(settings.store, green=GREEN)
    running = await start()
    first = await running.model.ListVersions(model_pb.ListVersionsRequest(page_size=1))
    lists = {
        running.learner.ListTasks: learner_pb.ListTasksRequest,
        running.model.ListVersions: model_pb.ListVersionsRequest,
    }
    for call, request in lists.items():
        for changes, status, field in (
            ({"page_size": -1}, INVALID, "page_size"),
            ({"page_size": 1001}, INVALID, "page_size"),
            ({"page_token": "nonsense"}, INVALID, "page_token"),
            ({"parent": "default"}, INVALID, "parent"),
            ({"parent": "models/other"}, NOT_FOUND, "parent"),
        ):
            with fails(*status, field=field):
                await call(request(**changes))
    with fails(*INVALID, field="page_token"):
        await running.learner.ListTasks(
            learner_pb.ListTasksRequest(page_token=first.next_page_token)
        )
    await assert_unharmed(running)
