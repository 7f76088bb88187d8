"""A learner that publishes, and predictors that follow it, each a server of its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from inflora.oip.v2 import open_inference_pb2 as oip_pb
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_core.errors import FencedError, InvalidInputError
from inflora_core.mirror import Mirror
from inflora_core.replica import Replica
from inflora_core.store import Store
from inflora_service import publishing
from inflora_service.server import CURRENT, PREDICTOR
from tests.service.conftest import BLUE, GREEN, RED, Running, fails, png
from tests.service.scraping import scrape

NEVER = 3600.0
"""Seconds from one look to the next: tests say when to look."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "shared").as_uri()


@pytest.fixture
async def learner(start: Callable[..., Any], url: str) -> Running:
    """A server that learns, and publishes."""
    running: Running = await start(role="learner", shared=url)
    return running


@pytest.fixture
async def follow(start: Callable[..., Any], url: str, tmp_path: Path) -> Callable[..., Any]:
    """Starts servers that follow it."""

    async def begin(name: str = "predictor", **changes: Any) -> Running:
        more = {"role": "predictor", "shared": url, "poll_seconds": NEVER, **changes}
        running: Running = await start(store=tmp_path / name, **more)
        return running

    return begin


async def predict(server: Running, version: str = "") -> predictor_pb.PredictResponse:
    """Ask what a red image is."""
    request = predictor_pb.PredictRequest(images=[png(RED)], version=version, top_k=100)
    return await server.predictor.Predict(request)


async def followed(learner: Running, *predictors: Running) -> None:
    """Have what was learned be published, and looked at."""
    await learner.server.publisher.settled()
    for predictor in predictors:
        await predictor.server.follower.look()


async def teach(learner: Running, colours: dict[str, tuple[int, int, int]]) -> None:
    """Teach a task, and wait until it is published."""
    task = await learner.ended(
        (await learner.learn({k: [png(v)] for k, v in colours.items()})).name
    )
    assert task.version, task
    await learner.server.publisher.settled()


def labels(answer: predictor_pb.PredictResponse) -> set[str]:
    """Return the classes of an answer."""
    return {score.label for score in answer.predictions[0].scores}


async def test_predictors_answer_with_what_is_published(learner: Running, follow: Any):
    early = await follow("early")
    assert await early.serving() == "SERVING"
    assert await early.serving(PREDICTOR) == "NOT_SERVING"
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await predict(early)
    await teach(learner, {"red": RED, "green": GREEN})
    await followed(learner, early)
    answer = await predict(early)
    assert answer.version == "models/default/versions/1"
    assert [score.label for score in answer.predictions[0].scores] == ["red", "green"]
    assert await early.serving(PREDICTOR) == "SERVING"
    late = await follow("late")
    assert await predict(late) == answer
    await teach(learner, {"blue": BLUE})
    await followed(learner, early, late)
    second = await predict(early)
    assert second.version == "models/default/versions/2"
    assert await predict(late) == second
    assert await predict(late, "models/default/versions/1") == answer
    assert await late.serving(CURRENT) == "SERVING"


async def test_it_looks_again_and_again(learner: Running, follow: Any):
    predictor = await follow(poll_seconds=0.01)
    request = health_pb2.HealthCheckRequest(service=PREDICTOR)
    watching = predictor.health.Watch(request)
    states = [await watching.read()]
    await teach(learner, {"red": RED})
    while states[-1].status != health_pb2.HealthCheckResponse.SERVING:
        states.append(await asyncio.wait_for(watching.read(), 60))
    assert labels(await predict(predictor)) == {"red"}
    watching.cancel()


async def test_roles_have_the_services_that_are_theirs(learner: Running, follow: Any):
    await teach(learner, {"red": RED})
    with fails("UNIMPLEMENTED", "NOT_FOUND"):
        await predict(learner)
    with pytest.raises(grpc.aio.AioRpcError, match="no such service"):
        await learner.serving(PREDICTOR)
    predictor = await follow()
    with fails("UNIMPLEMENTED", "NOT_FOUND"):
        await predictor.learner.ListTasks(learner_pb.ListTasksRequest())
    ready = await predictor.oip.ModelReady(oip_pb.ModelReadyRequest(name="default"))
    assert ready.ready
    name = "models/default/versions/1"
    request = model_pb.ListVersionsRequest(parent="models/default")
    listed = [(await each.model.ListVersions(request)).versions for each in (learner, predictor)]
    assert [version.name for version in listed[1]] == [name]
    assert listed[0][0].artifacts == listed[1][0].artifacts
    for call, refused in (
        (predictor.model.PromoteVersion, model_pb.PromoteVersionRequest(name=name)),
        (predictor.model.PinVersion, model_pb.PinVersionRequest(name=name)),
        (predictor.model.UnpinVersion, model_pb.UnpinVersionRequest(name=name)),
    ):
        with fails("FAILED_PRECONDITION", "WRONG_STATE"):
            await call(refused)
    for artifact in ("", "head.safetensors", "factors.safetensors"):
        contents = []
        for server in (learner, predictor):
            stream = server.model.DownloadArtifact(
                model_pb.DownloadArtifactRequest(name=name, artifact=artifact)
            )
            contents.append(b"".join([chunk.data async for chunk in stream]))
        assert contents[0] == contents[1]
        assert contents[0]


async def test_rolling_back_and_forgetting_reach_predictors(learner: Running, follow: Any):
    await teach(learner, {"red": RED, "green": GREEN})
    await teach(learner, {"blue": BLUE})
    predictor = await follow()
    assert labels(await predict(predictor)) == {"red", "green", "blue"}
    await learner.model.PromoteVersion(
        model_pb.PromoteVersionRequest(name="models/default/versions/1")
    )
    await followed(learner, predictor)
    assert labels(await predict(predictor)) == {"red", "green"}
    edit = await learner.learner.ForgetClasses(learner_pb.ForgetClassesRequest(labels=["green"]))
    await learner.ended(edit.task.name)
    await followed(learner, predictor)
    assert labels(await predict(predictor)) == {"red"}
    assert labels(await predict(predictor, "models/default/versions/2")) == {"red", "blue"}


async def test_what_answers_is_read_again_where_it_knows_what_is_forgotten(
    learner: Running, follow: Any
):
    """From one look to the next, a class is forgotten, and a version that knew it promoted."""
    await teach(learner, {"red": RED, "green": GREEN})
    predictor = await follow()
    edit = await learner.learner.ForgetClasses(learner_pb.ForgetClassesRequest(labels=["green"]))
    await learner.ended(edit.task.name)
    await learner.model.PromoteVersion(
        model_pb.PromoteVersionRequest(name="models/default/versions/1")
    )
    await followed(learner, predictor)
    answer = await predict(predictor)
    assert answer.version == "models/default/versions/1"
    assert labels(answer) == {"red"}


def take_away(folder: Path) -> Callable[[], None]:
    """Have a shared folder be away; return what brings it back."""
    away = folder.with_name("away")
    shutil.move(folder, away)
    folder.write_bytes(b"not a folder")

    def bring_back() -> None:
        folder.unlink()
        shutil.move(away, folder)

    return bring_back


async def test_predictors_go_on_while_the_store_is_away(
    learner: Running, follow: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    await teach(learner, {"red": RED})
    predictor = await follow()
    expected = await predict(predictor)
    bring_back = take_away(tmp_path / "shared")
    await predictor.server.follower.look()
    assert "not following" in caplog.text
    assert await predict(predictor) == expected
    assert await predictor.serving(CURRENT) == "NOT_SERVING"
    again = await follow("again")
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await predict(again)
    task = await learner.learn({"green": [png(GREEN)]})
    await learner.ended(task.name)
    bring_back()
    await followed(learner, predictor, again)
    assert labels(await predict(predictor)) == {"red", "green"}
    assert await predict(again) == await predict(predictor)
    assert await predictor.serving(CURRENT) == "SERVING"


async def test_a_predictor_starts_with_what_it_had(learner: Running, follow: Any, tmp_path: Path):
    await teach(learner, {"red": RED})
    predictor = await follow()
    expected = await predict(predictor)
    await predictor.server.stop()
    take_away(tmp_path / "shared")
    again = await follow()
    assert await predict(again) == expected
    assert await again.serving(CURRENT) == "NOT_SERVING"


async def test_a_second_learner_does_not_start(
    learner: Running, start: Callable[..., Any], url: str, tmp_path: Path, prepared_store: Path
):
    shutil.copytree(prepared_store, tmp_path / "other")
    with pytest.raises(FencedError, match="one learner publishes"):
        await start(store=tmp_path / "other", shared=url)
    await teach(learner, {"red": RED})


async def test_a_learner_whose_place_is_taken_ends_and_says_why(
    learner: Running, start: Callable[..., Any], url: str, tmp_path: Path
):
    await teach(learner, {"red": RED})
    heir = await start(store=tmp_path / "heir", shared=url, take_over=True)
    assert Store.open(tmp_path / "heir").current() == 1
    await learner.ended((await learner.learn({"green": [png(GREEN)]})).name)
    with pytest.raises(FencedError, match="one learner publishes"):
        await asyncio.wait_for(learner.server.wait_over(), 60)
    await teach(heir, {"blue": BLUE})
    assert labels(await predict(heir)) == {"red", "blue"}


async def test_what_makes_no_sense_is_refused(start: Callable[..., Any], url: str, tmp_path: Path):
    with pytest.raises(InvalidInputError, match="--shared"):
        await start(role="predictor", store=tmp_path / "copy")
    with pytest.raises(InvalidInputError, match="a store of its own"):
        await start(role="predictor", shared=url)
    await start(role="predictor", shared=url, store=tmp_path / "copy")
    with pytest.raises(InvalidInputError, match="copy of a shared store"):
        await start(store=tmp_path / "copy")


async def test_a_predictor_with_a_damaged_copy_starts_while_the_store_is_away(
    learner: Running, follow: Any, tmp_path: Path
):
    await teach(learner, {"red": RED})
    predictor = await follow()
    await predict(predictor)
    await predictor.server.stop()
    for path in (tmp_path / "predictor" / "models/default/versions").glob("*/model.onnx"):
        path.unlink()
    bring_back = take_away(tmp_path / "shared")
    again = await follow()
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await predict(again)
    bring_back()
    await followed(learner, again)
    assert labels(await predict(again)) == {"red"}


async def test_whatever_fails_is_tried_again(
    learner: Running, follow: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    predictor = await follow()
    take, publish = Replica.take, Mirror.publish
    failed: list[str] = []

    def once(name: str, method: Any) -> Any:
        def call(*args: Any) -> Any:
            if name not in failed:
                failed.append(name)
                raise MemoryError(name)
            return method(*args)

        return call

    monkeypatch.setattr(publishing, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(Mirror, "publish", once("publish", publish))
    monkeypatch.setattr(Replica, "take", once("take", take))
    await teach(learner, {"red": RED})
    await predictor.server.follower.look()
    assert await predictor.serving(CURRENT) == "NOT_SERVING"
    await predictor.server.follower.look()
    assert labels(await predict(predictor)) == {"red"}
    assert failed == ["publish", "take"]


async def test_a_retired_version_answers_no_more(learner: Running, follow: Any):
    await teach(learner, {"red": RED})
    await teach(learner, {"green": GREEN})
    await teach(learner, {"blue": BLUE})
    predictor = await follow()
    name = "models/default/versions/1"
    await predict(predictor, name)
    learner.store.retire(1)
    learner.server.publisher.notify()
    await followed(learner, predictor)
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "version"):
        await predict(predictor, name)
    assert labels(await predict(predictor)) == {"red", "green", "blue"}


async def test_metrics_say_how_it_keeps_up(learner: Running, follow: Any):
    predictor = await follow()
    seen = await scrape(predictor)
    assert seen.value("inflora_follow_version") == 0
    await teach(learner, {"red": RED, "green": GREEN})
    before = await scrape(predictor)
    await followed(learner, predictor)
    await predict(predictor)
    seen = await scrape(predictor)
    found = [seen.value(f"inflora_{name}") for name in ("follow_version", "version", "answering")]
    assert found == [1, 1, 1]
    assert (before.value("inflora_follow_lag_seconds") or 0) > 0
    assert seen.value("inflora_swap_seconds_count") == 1
    assert seen.value("inflora_images_total", purpose="predict") == 1
    assert seen.value("inflora_tasks", state="QUEUED") is None
    assert seen.value("inflora_scrape_faults_total") == 0
    assert (await scrape(learner)).value("inflora_follow_version") is None
