"""The Open Inference Protocol: what clients of it ask, are answered, and are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from inflora.oip.v2 import open_inference_pb2 as pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_service import tensors
from inflora_service.server import OIP, Settings
from tests.service.conftest import GREEN, RED, WHITE, Running, fails, fault_of, png
from tests.service.holding import Watched, gate
from tests.service.test_bad_input import publish

DARK = 1, 2, 3
HELD = png(DARK)
"""Its classification is held up."""

Tensor = pb.ModelInferRequest.InferInputTensor


@pytest.fixture
async def running(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with two versions; the second knows three classes."""
    publish(settings.store, red=RED, white=WHITE)
    publish(settings.store, grün=GREEN)
    running: Running = await start()
    return running


def encoded(*images: bytes, **fields: Any) -> pb.ModelInferRequest:
    """A request with encoded images, in raw form."""
    tensor = Tensor(name="encoded_images", datatype="BYTES", shape=[len(images)])
    return request(tensor, tensors.pack_bytes(images), **fields)


def listed(*images: bytes, **fields: Any) -> pb.ModelInferRequest:
    """A request with encoded images, as a list."""
    tensor = Tensor(name="encoded_images", datatype="BYTES", shape=[len(images)])
    tensor.contents.bytes_contents.extend(images)
    return request(tensor, **fields)


def raw_pixels(values: np.ndarray, **fields: Any) -> pb.ModelInferRequest:
    """A request with pixels, in raw form."""
    tensor = Tensor(name="images", datatype="UINT8", shape=values.shape)
    return request(tensor, values.tobytes(), **fields)


def request(
    tensor: Tensor, *raw: bytes, outputs: tuple[str, ...] = (), top_k: int = 0, **fields: Any
) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(
        **{"model_name": "default", "inputs": [tensor], "raw_input_contents": raw, **fields}
    )
    for name in outputs:
        made.outputs.add(name=name)
    if top_k:
        made.parameters["top_k"].int64_param = top_k
    return made


def plain(*colours: tuple[int, int, int], height: int = 12, width: int = 16) -> np.ndarray:
    """Images of one colour each, (n, height, width, 3)."""
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def arrays(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Return what was answered in raw form, by name."""
    found: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            size = int(np.prod(output.shape))
            texts = [text.decode() for text in tensors.unpack_bytes(raw, size, field="")]
            found[output.name] = np.array(texts).reshape(output.shape).tolist()
        else:
            found[output.name] = np.frombuffer(raw, "<f4").reshape(output.shape)
    return found


# -- what the server says of itself ---------------------------------------------------------------


async def test_a_server_without_a_version_is_live_and_not_ready(
    start: Callable[..., Any], settings: Settings
) -> None:
    running = await start()
    assert (await running.oip.ServerLive(pb.ServerLiveRequest())).live
    assert not (await running.oip.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await running.oip.ModelReady(pb.ModelReadyRequest(name="default"))).ready
    assert await running.serving(OIP) == "NOT_SERVING"
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await running.oip.ModelInfer(encoded(png()))
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await running.oip.ModelMetadata(pb.ModelMetadataRequest(name="default"))
    await running.ended((await running.learn({"a": [png()]})).name)
    assert (await running.oip.ServerReady(pb.ServerReadyRequest())).ready
    assert (await running.oip.ModelReady(pb.ModelReadyRequest(name="default"))).ready
    assert await running.serving(OIP) == "SERVING"


@pytest.mark.parametrize(
    ("name", "number", "ready"),
    [
        ("default", "", True),
        ("default", "1", True),
        ("default", "2", True),
        ("default", "3", False),
        ("default", "current", False),
        ("default", "01", False),
        ("default", "-1", False),
        ("models/default", "", False),
        ("other", "", False),
        ("", "", False),
    ],
)
async def test_which_models_are_ready(
    running: Running, name: str, number: str, ready: bool
) -> None:
    asked = pb.ModelReadyRequest(name=name, version=number)
    assert (await running.oip.ModelReady(asked)).ready is ready


async def test_a_version_in_place_of_a_damaged_one_is_ready_and_the_server_is_not(
    start: Callable[..., Any], settings: Settings
) -> None:
    for classes in ({"red": RED}, {"green": GREEN}):
        publish(settings.store, **classes)
    damaged = settings.store / "models/default/versions/00000002/head.safetensors"
    damaged.write_bytes(b"damaged")
    running = await start()
    assert not (await running.oip.ServerReady(pb.ServerReadyRequest())).ready
    for number, ready in (("", True), ("1", True), ("2", False)):
        asked = pb.ModelReadyRequest(name="default", version=number)
        assert (await running.oip.ModelReady(asked)).ready is ready
    assert (await running.oip.ModelInfer(encoded(png()))).model_version == "1"
    with fails("DATA_LOSS", "DAMAGED"):
        await running.oip.ModelInfer(encoded(png(), model_version="2"))
    await running.server.host.promote(1, "a test")
    assert (await running.oip.ServerReady(pb.ServerReadyRequest())).ready


async def test_metadata_of_the_server(running: Running) -> None:
    found = await running.oip.ServerMetadata(pb.ServerMetadataRequest())
    assert found.name == "inflora-server"
    assert found.version == version("inflora-server")
    assert list(found.extensions) == ["parameters"]


@pytest.mark.parametrize(("number", "classes"), [("", -1), ("1", 2), ("2", 3)])
async def test_metadata_of_the_model(running: Running, number: str, classes: int) -> None:
    found = await running.oip.ModelMetadata(pb.ModelMetadataRequest(name="default", version=number))
    assert (found.name, found.platform) == ("default", "onnx_onnxv1")
    assert list(found.versions) == ["1", "2"]
    inputs = {each.name: (each.datatype, list(each.shape)) for each in found.inputs}
    assert inputs == {
        "encoded_images": ("BYTES", [-1]),
        "images": ("UINT8", [-1, -1, -1, 3]),
    }
    outputs = {each.name: (each.datatype, list(each.shape)) for each in found.outputs}
    assert outputs == {
        "labels": ("BYTES", [-1, -1]),
        "probabilities": ("FP32", [-1, classes]),
        "logits": ("FP32", [-1, classes]),
        "novelty": ("FP32", [-1]),
        "embedding": ("FP32", [-1, 3]),
        "classes": ("BYTES", [classes]),
    }


async def test_versions_that_are_gone_are_not_in_the_metadata(running: Running) -> None:
    running.store.retire(1)
    asked = pb.ModelMetadataRequest(name="default")
    assert list((await running.oip.ModelMetadata(asked)).versions) == ["2"]


@pytest.mark.parametrize(
    ("name", "number", "code", "field"),
    [
        ("other", "", "NOT_FOUND", "name"),
        ("", "", "INVALID_ARGUMENT", "name"),
        ("default", "7", "NOT_FOUND", "version"),
        ("default", "newest", "INVALID_ARGUMENT", "version"),
    ],
)
async def test_metadata_of_what_is_not_there(
    running: Running, name: str, number: str, code: str, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f'details = "{field}: ') as caught:
        await running.oip.ModelMetadata(pb.ModelMetadataRequest(name=name, version=number))
    assert (caught.value.code().name, fault_of(caught.value).field) == (code, field)


async def test_reflection_knows_the_service(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=OIP)
    (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
    (file,) = answer.file_descriptor_response.file_descriptor_proto
    assert file == pb.DESCRIPTOR.serialized_pb


# -- what is answered -----------------------------------------------------------------------------


async def test_encoded_images_and_their_pixels_have_the_answers_of_predict(
    running: Running,
) -> None:
    colours = [RED, WHITE, GREEN, (200, 100, 50)]
    images = [png(colour) for colour in colours]
    predicted = await running.predictor.Predict(
        predictor_pb.PredictRequest(images=images, top_k=3, return_embedding=True)
    )
    outputs = tensors.OUTPUTS
    for asked in (
        encoded(*images, top_k=3, outputs=outputs),
        raw_pixels(plain(*colours), top_k=3, outputs=outputs),
    ):
        response = await running.oip.ModelInfer(asked)
        assert [output.name for output in response.outputs] == list(outputs)
        found = arrays(response)
        assert found["classes"] == ["red", "white", "grün"]
        for i, prediction in enumerate(predicted.predictions):
            assert found["labels"][i] == [score.label for score in prediction.scores]
            by_label = dict(zip(found["classes"], found["probabilities"][i], strict=True))
            assert by_label == {score.label: score.probability for score in prediction.scores}
            assert found["novelty"][i] == prediction.novelty
            assert found["embedding"][i].tolist() == list(prediction.embedding)
            assert found["classes"][found["logits"][i].argmax()] == found["labels"][i][0]


async def test_images_of_mixed_sizes(running: Running) -> None:
    images = [png(RED, (2, 3)), png(GREEN, (300, 200)), png(WHITE, (33, 64))]
    found = arrays(await running.oip.ModelInfer(encoded(*images)))
    assert found["labels"] == [["red"], ["grün"], ["white"]]


async def test_a_request_with_a_list_is_answered_with_lists(running: Running) -> None:
    response = await running.oip.ModelInfer(listed(png(GREEN), png(RED), top_k=2))
    assert not response.raw_output_contents
    contents = {output.name: output.contents for output in response.outputs}
    assert set(contents) == {"labels", "probabilities", "logits", "novelty"}
    labels = [label.decode() for label in contents["labels"].bytes_contents]
    assert (labels[0], labels[2]) == ("grün", "red")
    assert len(contents["probabilities"].fp32_contents) == 6
    assert len(contents["novelty"].fp32_contents) == 2


async def test_a_column_of_images(running: Running) -> None:
    asked = encoded(png(RED), png(WHITE))
    asked.inputs[0].shape[:] = [2, 1]
    assert arrays(await running.oip.ModelInfer(asked))["labels"] == [["red"], ["white"]]


async def test_the_answer_names_its_request_and_version(running: Running) -> None:
    for number, answered in (("", "2"), ("1", "1"), ("2", "2")):
        response = await running.oip.ModelInfer(encoded(png(), id="a", model_version=number))
        assert response.model_name == "default"
        assert (response.id, response.model_version) == ("a", answered)
        assert arrays(response)["logits"].shape == (1, 2 if answered == "1" else 3)


@pytest.mark.parametrize(("top_k", "count"), [(0, 1), (1, 1), (2, 2), (3, 3), (1000, 3)])
async def test_how_many_labels(running: Running, top_k: int, count: int) -> None:
    found = arrays(await running.oip.ModelInfer(encoded(png(), png(), top_k=top_k)))
    assert [len(set(row)) for row in found["labels"]] == [count, count]


async def test_outputs_come_as_they_were_asked_for(running: Running) -> None:
    asked = encoded(png(), outputs=("novelty", "labels"))
    response = await running.oip.ModelInfer(asked)
    assert [output.name for output in response.outputs] == ["novelty", "labels"]
    assert len(response.raw_output_contents) == 2


async def test_parameters_that_change_nothing_are_passed_over(running: Running) -> None:
    asked = encoded(png(), outputs=("labels",))
    asked.parameters["priority"].uint64_param = 1
    asked.inputs[0].parameters["binary_data_size"].int64_param = 9
    asked.outputs[0].parameters["binary_data"].bool_param = True
    assert arrays(await running.oip.ModelInfer(asked))["labels"] == [["red"]]


# -- what is refused ------------------------------------------------------------------------------


def with_input(**fields: Any) -> pb.ModelInferRequest:
    """A request whose raw input is changed."""
    asked = encoded(png())
    asked.inputs[0].MergeFrom(Tensor(**fields))
    return asked


def shaped(*shape: int, pixels: bool = False) -> pb.ModelInferRequest:
    """A request whose shape is another than its content's."""
    asked = raw_pixels(plain(RED)) if pixels else encoded(png())
    asked.inputs[0].shape[:] = shape
    return asked


def without_raw(asked: pb.ModelInferRequest) -> pb.ModelInferRequest:
    asked.ClearField("raw_input_contents")
    return asked


def changed(asked: pb.ModelInferRequest, change: Callable[[Any], Any]) -> pb.ModelInferRequest:
    change(asked)
    return asked


def asking(name: str, parameter: str = "") -> pb.ModelInferRequest:
    """A request for an output, with a parameter."""
    asked = encoded(png(), outputs=("labels", name))
    if parameter:
        asked.outputs[1].parameters[parameter].int64_param = 1
    return asked


def top(**value: Any) -> pb.ModelInferRequest:
    """A request for some labels."""
    asked = encoded(png())
    asked.parameters["top_k"].MergeFrom(pb.InferParameter(**value))
    return asked


RAW, CONTENTS, SHAPE = "raw_input_contents[0]", "inputs[0].contents", "inputs[0].shape"

REFUSED: dict[str, tuple[pb.ModelInferRequest, str]] = {
    "no model": (encoded(png(), model_name=""), "model_name"),
    "a version that is no number": (encoded(png(), model_version="one"), "model_version"),
    "version 0": (encoded(png(), model_version="0"), "model_version"),
    "a version in other digits": (encoded(png(), model_version="١"), "model_version"),
    "no input": (encoded(png(), inputs=[]), "inputs"),
    "both inputs": (
        changed(encoded(png()), lambda asked: asked.inputs.extend(raw_pixels(plain(RED)).inputs)),
        "inputs",
    ),
    "an unknown input": (with_input(name="INPUT0"), "inputs[0].name"),
    "a name like another's": (with_input(name="image"), "inputs[0].name"),
    "bytes for pixels": (with_input(name="images"), "inputs[0].datatype"),
    "pixels for bytes": (with_input(datatype="UINT8"), "inputs[0].datatype"),
    "no datatype": (
        changed(encoded(png()), lambda asked: asked.inputs[0].ClearField("datatype")),
        "inputs[0].datatype",
    ),
    "floating-point pixels": (
        changed(raw_pixels(plain(RED)), lambda a: setattr(a.inputs[0], "datatype", "FP32")),
        "inputs[0].datatype",
    ),
    "no shape": (shaped(), SHAPE),
    "no image": (shaped(0), SHAPE),
    "fewer than no images": (shaped(-1), SHAPE),
    "two columns": (shaped(1, 2), SHAPE),
    "three sides": (shaped(1, 1, 1), SHAPE),
    "sides without end": (shaped(*[1] * 1000), SHAPE),
    "no pixels": (shaped(0, 12, 16, 3, pixels=True), SHAPE),
    "one image without the first side": (shaped(12, 16, 3, pixels=True), SHAPE),
    "channels first": (shaped(1, 3, 12, 16, pixels=True), SHAPE),
    "four channels": (shaped(1, 12, 12, 4, pixels=True), SHAPE),
    "a side that varies": (shaped(1, -1, 16, 3, pixels=True), SHAPE),
    "more images than content": (shaped(2), RAW),
    "more pixels than content": (shaped(2, 12, 16, 3, pixels=True), RAW),
    "fewer pixels than content": (shaped(1, 11, 16, 3, pixels=True), RAW),
    "content that is cut short": (
        changed(encoded(png()), lambda a: a.raw_input_contents.__setitem__(0, b"\x09\0\0\0ab")),
        RAW,
    ),
    "content without lengths": (
        changed(encoded(png()), lambda asked: asked.raw_input_contents.__setitem__(0, png())),
        RAW,
    ),
    "no content": (without_raw(encoded(png())), CONTENTS),
    "content twice": (
        changed(listed(png()), lambda asked: asked.raw_input_contents.append(b"")),
        CONTENTS,
    ),
    "content for two": (
        changed(encoded(png()), lambda asked: asked.raw_input_contents.append(b"")),
        "raw_input_contents",
    ),
    "a list that is too long": (
        changed(listed(png(), png()), lambda asked: asked.inputs[0].shape.__setitem__(0, 1)),
        CONTENTS,
    ),
    "a list of another type": (
        changed(listed(png()), lambda asked: asked.inputs[0].contents.uint_contents.append(1)),
        CONTENTS,
    ),
    "an unknown output": (asking("output"), "outputs[1].name"),
    "an output without a name": (asking(""), "outputs[1].name"),
    "an output twice": (asking("labels"), "outputs[1].name"),
    "classification": (
        asking("logits", "classification"),
        "outputs[1].parameters[classification]",
    ),
    "shared memory": (
        asking("logits", "shared_memory_region"),
        "outputs[1].parameters[shared_memory_region]",
    ),
    "no label": (top(int64_param=0), "parameters[top_k]"),
    "fewer than no labels": (top(int64_param=-1), "parameters[top_k]"),
    "labels as a text": (top(string_param="2"), "parameters[top_k]"),
    "labels yes or no": (top(bool_param=True), "parameters[top_k]"),
    "labels unsaid": (top(), "parameters[top_k]"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_requests_that_are_refused(running: Running, case: str) -> None:
    asked, field = REFUSED[case]
    with fails("INVALID_ARGUMENT", "INVALID_INPUT", field):
        await running.oip.ModelInfer(asked)
    assert arrays(await running.oip.ModelInfer(encoded(png())))["labels"] == [["red"]]


async def test_messages_begin_with_the_field(running: Running) -> None:
    """Clients of the protocol show nothing else."""
    for asked, field in (*REFUSED.values(), (encoded(png(), b"?"), "encoded_images[1]")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.oip.ModelInfer(asked)
        assert str(caught.value.details()).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model_name": "other"}, "model_name"),
        ({"model_name": "models/default"}, "model_name"),
        ({"model_version": "3"}, "model_version"),
        ({"model_version": "999999999"}, "model_version"),
    ],
)
async def test_models_that_are_not_there(
    running: Running, fields: dict[str, str], field: str
) -> None:
    with fails("NOT_FOUND", "NOT_FOUND", field):
        await running.oip.ModelInfer(encoded(png(), **fields))


@pytest.mark.parametrize("content", [b"", b"no image", png()[:40], png((1, 1, 1), (1, 1))])
@pytest.mark.parametrize("make", [encoded, listed])
async def test_images_that_are_refused_are_named(
    running: Running, make: Callable[..., pb.ModelInferRequest], content: bytes
) -> None:
    with fails("INVALID_ARGUMENT", "INVALID_IMAGE", "encoded_images[1]"):
        await running.oip.ModelInfer(make(png(), content, png()))


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (0, 8), (1, 50), (2, 201), (500, 501)], ids=str
)
async def test_pixels_have_the_limits_of_images(
    start: Callable[..., Any], settings: Settings, height: int, width: int
) -> None:
    publish(settings.store, red=RED)
    limits = settings.limits.model_copy(update={"image_pixels": 250_000})
    running = await start(limits=limits)
    with fails("INVALID_ARGUMENT", "INVALID_IMAGE", SHAPE):
        await running.oip.ModelInfer(raw_pixels(plain(RED, height=height, width=width)))
    assert await running.oip.ModelInfer(raw_pixels(plain(RED, height=2, width=200)))


async def test_too_many_images(running: Running) -> None:
    for asked in (encoded(*[png()] * 5), listed(*[png()] * 5), raw_pixels(plain(*[RED] * 5))):
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED", SHAPE):
            await running.oip.ModelInfer(asked)
    # Said before the content is looked at.
    with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED", SHAPE):
        await running.oip.ModelInfer(shaped(2**62))
    assert await running.oip.ModelInfer(encoded(*[png()] * 4))


async def test_a_message_over_its_limit(running: Running) -> None:
    asked = raw_pixels(plain(RED, height=600, width=600))
    with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED", "inputs"):
        await running.oip.ModelInfer(asked)


async def test_a_message_that_is_none(running: Running) -> None:
    call = running.channel.unary_unary(f"/{OIP}/ModelInfer")
    with fails("INVALID_ARGUMENT", "INVALID_INPUT"):
        await call(b"\xff\xff\xff")


async def test_a_method_of_another_server(running: Running) -> None:
    call = running.channel.unary_unary(f"/{OIP}/ModelStatistics")
    with fails("UNIMPLEMENTED", "NOT_FOUND"):
        await call(b"")


async def test_versions_that_are_gone_cannot_be_asked(running: Running) -> None:
    running.store.retire(1)
    assert not (
        await running.oip.ModelReady(pb.ModelReadyRequest(name="default", version="1"))
    ).ready
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "model_version"):
        await running.oip.ModelInfer(encoded(png(), model_version="1"))


# -- waiting --------------------------------------------------------------------------------------


async def test_deadlines_and_the_queue_are_those_of_predict(
    start: Callable[..., Any], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(settings.store, red=RED, white=WHITE)
    watched = Watched(monkeypatch)
    limits = settings.limits.model_copy(update={"predict_waiting_images": 4})
    running = await start(limits=limits)
    with gate(monkeypatch, HELD) as held:
        waiting = [running.oip.ModelInfer(encoded(HELD)) for _ in range(2)]
        # Held as well: whoever's image is decoded first would take a run and be answered.
        waiting.append(running.oip.ModelInfer(raw_pixels(plain(DARK, DARK))))
        await watched.until(lambda: watched.images == 4)
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await running.oip.ModelInfer(encoded(png()))
        waiting.pop().cancel()
        await watched.until(lambda: watched.images == 2)
        running.server.host._batcher._turns._pace.image = 1000.0
        with fails("DEADLINE_EXCEEDED", "DEADLINE"):
            await running.oip.ModelInfer(encoded(png()), timeout=60)
        held.open.set()
        await asyncio.gather(*waiting)
    assert await running.oip.ModelInfer(encoded(png()), timeout=60)
    await watched.until(lambda: watched.idle)
