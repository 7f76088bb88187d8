"""Predict: which classes compete, which version answers, and that swaps lose nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from inflora.v1 import predictor_service_pb2 as pb
from inflora_core.errors import UnavailableError
from inflora_service import serving
from inflora_service.predictor_servicer import STREAM_AHEAD
from inflora_service.server import Settings
from tests.service.conftest import BLUE, GREEN, RED, WHITE, Running, fails, png
from tests.service.holding import Watched, gate
from tests.service.test_bad_input import publish

VERSIONS = ({"red": RED, "white": WHITE}, {"green": GREEN}, {"blue": BLUE})


@pytest.fixture
async def running(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with three versions, whose model runs twice at a time."""
    for classes in VERSIONS:
        publish(settings.store, **classes)
    running: Running = await start(predict_threads=2)
    return running


async def predict(running: Running, *images: bytes, **fields: Any) -> pb.PredictResponse:
    request = pb.PredictRequest(images=images, **fields)
    response: pb.PredictResponse = await running.predictor.Predict(request)
    return response


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("onnxruntime is out of sorts")


def best(response: pb.PredictResponse) -> list[str]:
    return [prediction.scores[0].label for prediction in response.predictions]


async def test_images_of_any_size_are_answered_in_their_order(running: Running) -> None:
    colours = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    sizes = [(2, 3), (8, 8), (300, 200), (33, 64)]
    for labels in itertools.islice(itertools.permutations(colours), 6):
        images = [png(colours[c], size) for c, size in zip(labels, sizes, strict=True)]
        assert best(await predict(running, *images)) == list(labels)


async def test_scores_are_probabilities_best_first(running: Running) -> None:
    response = await predict(running, png((200, 100, 50)), top_k=100, model="models/default")
    (prediction,) = response.predictions
    scores = [score.probability for score in prediction.scores]
    assert len(scores) == 4  # all there are
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)
    assert prediction.novelty == pytest.approx(1 - scores[0])
    assert len((await predict(running, png(), top_k=2)).predictions[0].scores) == 2


async def test_a_caller_who_knows_the_task(running: Running) -> None:
    for number, labels in ((1, {"red", "white"}), (2, {"green"})):
        response = await predict(running, png(BLUE), task=f"models/default/tasks/task-{number}")
        scores = response.predictions[0].scores
        assert {score.label for score in scores} == labels
        assert sum(score.probability for score in scores) == pytest.approx(1)


async def test_a_task_that_the_version_does_not_know(running: Running) -> None:
    task = await running.ended((await running.learn({"grey": [png((99, 99, 99))]})).name)
    response = await predict(running, png(), task=task.name)
    assert best(response) == ["grey"]
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "task"):
        await predict(running, png(), task=task.name, version="models/default/versions/1")


async def test_a_version_that_is_asked_for_by_number(running: Running) -> None:
    for number, expected in ((1, "white"), (2, "green"), (3, "green")):
        name = f"models/default/versions/{number}"
        response = await predict(running, png((0, 255, 40)), version=name)
        assert response.version == name
        assert best(response) == [expected] if number > 1 else best(response)


async def test_the_current_version_by_its_name(running: Running) -> None:
    name = "models/default/versions/current"
    assert (await predict(running, png(), version=name)).version == "models/default/versions/3"
    await running.server.host.promote(2, "a test")
    assert (await predict(running, png(), version=name)).version == "models/default/versions/2"


async def test_versions_are_loaded_one_at_a_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, loading, most = running.server.host, 0, 0
    load = host._load

    def counted(number: int) -> serving.Loaded:
        nonlocal loading, most
        loading += 1
        most = max(most, loading)
        time.sleep(0.05)  # time enough for another
        loaded = load(number)
        loading -= 1
        return loaded

    monkeypatch.setattr(host, "_load", counted)
    names = [f"models/default/versions/{number}" for number in (1, 2, 1)]
    answers = await asyncio.gather(*(predict(running, png(), version=name) for name in names))
    assert [answer.version for answer in answers] == names
    assert most == 1


async def test_few_versions_stay_loaded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PINNED_VERSIONS", 1)
    host = running.server.host
    for number in (1, 2):
        await predict(running, png(), version=f"models/default/versions/{number}")
        assert host.provider(number)
    assert not host.provider(1)
    assert host.provider(3)  # the current one always does


async def test_a_stream_is_answered_in_its_order(running: Running) -> None:
    sent = [("a", RED), ("b", GREEN), ("", BLUE), ("a", WHITE)]

    async def requests() -> AsyncIterator[pb.PredictStreamRequest]:
        for text, colour in sent:
            request = pb.PredictRequest(images=[png(colour)])
            yield pb.PredictStreamRequest(request=request, correlation_id=text)

    answers = [answer async for answer in running.predictor.PredictStream(requests())]
    assert [answer.correlation_id for answer in answers] == [text for text, _ in sent]
    assert [best(answer.response) for answer in answers] == [
        ["red"],
        ["green"],
        ["blue"],
        ["white"],
    ]


async def test_a_stream_ends_with_its_first_error(running: Running) -> None:
    """After the answers to what came before it."""
    images = [png(RED), png(GREEN), b"no image", png(BLUE)]

    async def requests() -> AsyncIterator[pb.PredictStreamRequest]:
        for image in images:
            yield pb.PredictStreamRequest(request=pb.PredictRequest(images=[image]))

    answers = []
    with fails("INVALID_ARGUMENT", "INVALID_IMAGE", "request.images[0]"):
        async for answer in running.predictor.PredictStream(requests()):
            answers += best(answer.response)
    assert answers == ["red", "green"]


async def test_a_stream_that_is_given_up_leaves_nothing_at_work(
    narrow: Running, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def requests() -> AsyncIterator[pb.PredictStreamRequest]:
        while True:
            yield pb.PredictStreamRequest(request=pb.PredictRequest(images=[HELD]))

    with gate(monkeypatch, HELD) as held:
        stream = narrow.predictor.PredictStream(requests())
        reading = asyncio.ensure_future(anext(aiter(stream)))
        await watched.until(lambda: watched.images == STREAM_AHEAD)  # no more are taken
        assert await asyncio.to_thread(held.arrived.wait, 60)
        stream.cancel()
        await watched.until(lambda: watched.images == 0)
        held.open.set()
    await watched.until(lambda: watched.idle)
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_embeddings_on_request(running: Running) -> None:
    """The stand-in's is the mean colour."""
    plain = await running.predictor.Predict(pb.PredictRequest(images=[png(RED)]))
    assert not plain.predictions[0].embedding
    request = pb.PredictRequest(images=[png(RED), png(WHITE)], return_embedding=True)
    answer = await running.predictor.Predict(request)
    found = [list(each.embedding) for each in answer.predictions]
    assert found == [pytest.approx([1, 0, 0], abs=1e-5), pytest.approx([1, 1, 1], abs=1e-5)]


async def test_swaps_under_load_lose_no_call(running: Running) -> None:
    done = asyncio.Event()
    known = {f"models/default/versions/{n}": n for n in (1, 2, 3)}
    seen: set[str] = set()

    async def call() -> int:
        calls = 0
        while not done.is_set():
            response = await predict(running, png(RED), png(WHITE))
            assert best(response) == ["red", "white"]
            assert response.version in known
            seen.add(response.version)
            calls += 1
        return calls

    callers = [asyncio.create_task(call()) for _ in range(4)]
    for number in (1, 2, 3) * 3:
        await running.server.host.promote(number, "a test")
        name = f"models/default/versions/{number}"
        assert (await predict(running, png())).version == name
    done.set()
    assert all(await asyncio.gather(*callers))
    assert len(seen) > 1


async def test_readiness_follows_the_first_version(start: Callable[..., Any]) -> None:
    running = await start()
    service = "inflora.v1.PredictorService"
    assert await running.serving(service) == "NOT_SERVING"
    assert await running.serving("inflora.v1.ModelService") == "SERVING"
    assert await running.serving() == "SERVING"
    await running.ended((await running.learn({"a": [png()]})).name)
    assert await running.serving(service) == "SERVING"
    with fails("NOT_FOUND", "NOT_FOUND", "version"):
        await predict(running, png(), version="models/default/versions/2")


# -- waiting ------------------------------------------------------------------------------------

HELD = png((1, 2, 3))
"""Its classification is held up."""


@pytest.fixture
async def narrow(start: Callable[..., Any], settings: Settings) -> Running:
    """A server whose model runs once at a time, and that lets few images wait."""
    publish(settings.store, red=RED, white=WHITE)
    limits = settings.limits.model_copy(update={"predict_waiting_images": 4})
    running: Running = await start(predict_threads=1, limits=limits)
    return running


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


async def test_a_full_queue_refuses_at_once_and_recovers(
    narrow: Running, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(monkeypatch, HELD) as held:
        # All of them are held: whichever is decoded first keeps the others waiting.
        waiting = [asyncio.create_task(predict(narrow, HELD, HELD)) for _ in range(2)]
        await watched.until(lambda: watched.images == 4)
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await predict(narrow, png(RED))
        held.open.set()
        await asyncio.gather(*waiting)
    assert best(await predict(narrow, *[png(RED)] * 4)) == ["red"] * 4
    await watched.until(lambda: watched.idle)


async def test_a_call_that_is_given_up_leaves_its_place(
    narrow: Running, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(monkeypatch, HELD) as held:
        running = asyncio.create_task(predict(narrow, HELD))
        assert await asyncio.to_thread(held.arrived.wait, 60)
        for _ in range(20):
            call = narrow.predictor.Predict(pb.PredictRequest(images=[png(RED)] * 3))
            await watched.until(lambda: watched.images == 4)
            call.cancel()
            await watched.until(lambda: watched.images == 1)
        held.open.set()
        await running
    await watched.until(lambda: watched.idle)


async def test_what_cannot_be_in_time_is_refused_early(
    narrow: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is held up, by the server's own word, long before the deadline."""
    with gate(monkeypatch, HELD) as held:
        waiting = asyncio.create_task(predict(narrow, HELD, png(RED)))
        assert await asyncio.to_thread(held.arrived.wait, 60)
        narrow.server.host._batcher._turns._pace.image = 1000.0
        request = pb.PredictRequest(images=[png(RED)])
        with fails("DEADLINE_EXCEEDED", "DEADLINE"):
            await narrow.predictor.Predict(request, timeout=60)
        held.open.set()
        await waiting
    assert best(await narrow.predictor.Predict(request, timeout=60)) == ["red"]


async def test_a_model_that_fails_fails_its_calls_alone(
    narrow: Running, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(serving.Predictor, "classify", broken)
        for _ in range(3):
            with fails("INTERNAL", "INTERNAL"):
                await predict(narrow, png(RED), png(WHITE))
    assert best(await predict(narrow, png(RED), png(WHITE))) == ["red", "white"]
    await watched.until(lambda: watched.idle)


async def test_of_several_images_at_fault_the_first_is_named(
    running: Running, watched: Watched
) -> None:
    for _ in range(20):
        with fails("INVALID_ARGUMENT", "INVALID_IMAGE", "images[1]"):
            await predict(running, png(RED, (900, 900)), b"no image", b"", png())
    await watched.until(lambda: watched.idle)


async def test_an_old_version_leaves_the_memory_with_its_last_call(
    running: Running, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = running.server.host
    old = weakref.ref((await host.answering(None)).predictor)
    with gate(monkeypatch, HELD) as held:
        call = asyncio.create_task(predict(running, HELD))
        assert await asyncio.to_thread(held.arrived.wait, 60)
        await host.promote(1, "a test")
        assert best(await predict(running, png(RED))) == ["red"]
        assert old() is not None
        held.open.set()
        assert (await call).version == "models/default/versions/3"
        await watched.until(lambda: watched.idle)
    del call
    # What a lone run takes is opened in a thread of its own, which holds the version until then.
    for thread in threading.enumerate():
        if thread.name == "version-alone":
            await asyncio.to_thread(thread.join, 60)
    gc.collect()
    assert old() is None


async def test_a_call_that_failed_keeps_no_version_in_memory(
    running: Running,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor its images, until Python happens to look for cycles."""
    caplog.set_level(logging.CRITICAL + 1, "inflora_service.errors")  # pytest keeps what is logged
    host = running.server.host
    old = weakref.ref((await host.answering(None)).predictor)
    gc.collect()
    gc.disable()
    try:
        with fails("INVALID_ARGUMENT", "INVALID_IMAGE", "images[0]"):
            await predict(running, b"no image")
        with monkeypatch.context() as patch:
            patch.setattr(serving.Predictor, "preprocess", broken)
            with fails("INTERNAL", "INTERNAL"):
                await predict(running, png(RED))
        with monkeypatch.context() as patch:
            patch.setattr(serving.Predictor, "classify", broken)
            with fails("INTERNAL", "INTERNAL"):
                await predict(running, png(RED))
        with monkeypatch.context() as patch:
            patch.setattr(serving, "top_classes", broken)
            with fails("INTERNAL", "INTERNAL"):
                await predict(running, png(RED))
        await host.promote(1, "a test")
        await predict(running, png(RED))
        await watched.until(lambda: watched.idle)
        assert old() is None
    finally:
        gc.enable()


async def test_a_promotion_never_waits_behind_many_versions(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PINNED_VERSIONS", 1)
    host, begun, go_on = running.server.host, threading.Event(), threading.Event()
    load = host._load

    def held(number: int) -> serving.Loaded:
        begun.set()
        assert go_on.wait(60)
        return load(number)

    monkeypatch.setattr(host, "_load", held)
    first = asyncio.create_task(predict(running, png(), version="models/default/versions/1"))
    assert await asyncio.to_thread(begun.wait, 60)
    with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED", "version"):
        await predict(running, png(), version="models/default/versions/2")
    promotion = asyncio.create_task(host.promote(2, "a test"))
    go_on.set()
    assert (await first).version == "models/default/versions/1"
    assert (await promotion).number == 2


async def test_a_call_after_the_end_is_refused(running: Running) -> None:
    host = running.server.host
    loaded = await host.answering(None)
    host.close()
    with pytest.raises(UnavailableError, match="stopping"):
        await host.classify(loaded, [png()], lambda answers: answers)


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="needs priorities")
@pytest.mark.parametrize(
    ("runs", "gpu", "nicer"),
    [(0, False, True), (2, False, True), (1, False, False), (0, True, False)],
)
async def test_loading_gives_way_where_no_run_inherits_it(
    start: Callable[..., Any],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    runs: int,
    gpu: bool,
    nicer: bool,
) -> None:
    """All runs on a GPU are in one thread, which the first version that is loaded starts."""
    monkeypatch.setattr(serving.RuntimeOptions, "tries_gpu", gpu)
    publish(settings.store, red=RED, white=WHITE)
    running = await start(predict_threads=2, predict_runs=runs)
    await predict(running, png(RED), version="models/default/versions/1")
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    found = {
        thread.name: os.getpriority(os.PRIO_PROCESS, thread.native_id or 0)
        for thread in threading.enumerate()
        if thread.name.startswith(("version-load", "predict-"))
    }
    assert found.pop("version-load_0") == (10 if nicer else usual)
    assert set(found.values()) == {usual}
