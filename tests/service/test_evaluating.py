"""Evaluate: figures that Predict confirms, bad input, and that predictions do not wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from inflora.v1 import evaluator_service_pb2 as pb
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2
from inflora_core.config import Limits
from inflora_service.evaluating import BATCH, MOST_AT_ONCE
from inflora_service.server import Settings
from tests.service.conftest import BLUE, GREEN, RED, WHITE, Running, fails, png
from tests.service.holding import gate
from tests.service.test_bad_input import (
    BROKEN_OFF,
    IMAGE,
    IMAGES,
    INVALID,
    LABELS,
    LIMIT,
    NOT_FOUND,
    publish,
)

Example = tuple[bytes, str]

VERSIONS = ({"red": RED, "white": WHITE}, {"green": GREEN}, {"blue": BLUE})


@pytest.fixture
async def running(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with three versions."""
    for classes in VERSIONS:
        publish(settings.store, **classes)
    running: Running = await start()
    return running


def version(number: int) -> str:
    return f"models/default/versions/{number}"


def messages(
    examples: Sequence[Example], batches: Sequence[int] = (), **spec: Any
) -> list[pb.EvaluateRequest]:
    """Return the messages of an evaluation; ``batches`` says where each but the first begins."""
    sent = [task_pb2.Example(image=image, label=label) for image, label in examples]
    bounds = [0, *batches, len(sent)]
    parts = [sent[a:b] for a, b in itertools.pairwise(bounds) if a < b]
    return [
        pb.EvaluateRequest(spec=pb.EvaluationSpec(**spec)),
        *(pb.EvaluateRequest(examples=task_pb2.ExampleBatch(examples=part)) for part in parts),
        pb.EvaluateRequest(end=learner_pb.UploadEnd(example_count=len(sent))),
    ]


async def evaluate(running: Running, examples: Sequence[Example], **spec: Any) -> pb.Evaluation:
    response = await running.evaluator.Evaluate(messages(examples, **spec))
    evaluation: pb.Evaluation = response.evaluation
    return evaluation


def mixed(count: int) -> list[Example]:
    """Return images of all colours there are between, some mislabelled, some of no class."""
    rng = np.random.default_rng(7)
    labels = ["red", "white", "green", "blue", "grey", "brown"]
    colours = {"red": RED, "white": WHITE, "green": GREEN, "blue": BLUE}
    examples = []
    for _ in range(count):
        label = labels[rng.integers(len(labels))]
        base = np.array(colours.get(label, (128, 128, 128)), float)
        colour = 0.25 * base + 0.75 * rng.uniform(0, 255, 3)
        examples.append((png(tuple(int(part) for part in colour), (9, 11)), label))
    return examples


async def predicted(
    running: Running, examples: Sequence[Example], **fields: Any
) -> list[predictor_pb.Prediction]:
    """Return what Predict says of each image."""
    answers = []
    for image, _ in examples:
        request = predictor_pb.PredictRequest(images=[image], top_k=100, **fields)
        answers += (await running.predictor.Predict(request)).predictions
    return answers


@pytest.mark.parametrize(("number", "asked"), [(1, version(1)), (2, version(2)), (3, "")])
async def test_figures_are_those_of_counting_predictions(
    running: Running, number: int, asked: str
) -> None:
    examples = mixed(BATCH + 20)
    found = await evaluate(running, examples, version=asked)
    known = {name: i for i, classes in enumerate(VERSIONS[:number], 1) for name in classes}
    answers = await predicted(running, examples, version=asked)
    rows = [
        (label, answer.scores[0], answer)
        for (_, label), answer in zip(examples, answers, strict=True)
        if label in known
    ]
    assert found.version == version(number)
    assert (found.images, found.unknown_images) == (len(rows), len(examples) - len(rows))
    assert found.unknown_images > 20
    assert found.accuracy == np.mean([label == best.label for label, best, _ in rows])
    assert 0 < found.accuracy < 1
    for figures in found.classes:
        own = [(best, answer) for label, best, answer in rows if label == figures.label]
        assert figures.task == f"models/default/tasks/task-{known[figures.label]}"
        assert figures.images == len(own)
        assert figures.accuracy == np.mean([best.label == figures.label for best, _ in own])
        probabilities = [
            next(score.probability for score in answer.scores if score.label == figures.label)
            for _, answer in own
        ]
        assert figures.mean_probability == pytest.approx(np.mean(probabilities), abs=1e-6)
    assert [c.label for c in found.classes] == [c for c in known if c in {r[0] for r in rows}]
    for part in found.tasks:
        own_examples = [e for e in examples if part.task.endswith(f"-{known.get(e[1])}")]
        within = await predicted(running, own_examples, version=asked, task=part.task)
        right = [
            p.scores[0].label == label for p, (_, label) in zip(within, own_examples, strict=True)
        ]
        assert (part.images, part.accuracy_task_known) == (len(right), np.mean(right))
    assert len(found.tasks) == number
    for error in found.confusions:
        count = sum((label, best.label) == (error.truth, error.answer) for label, best, _ in rows)
        assert error.images == count
        assert error.share == count / sum(label == error.truth for label, _, _ in rows)
    wrong = sum(label != best.label for label, best, _ in rows)
    assert sum(error.images for error in found.confusions) == wrong
    confidence = [best.probability for _, best, _ in rows]
    assert found.calibration.expected_error > 0
    bins = found.calibration.bins
    assert sum(part.images for part in bins) == len(rows)
    assert sum(part.images * part.mean_confidence for part in bins) == pytest.approx(
        sum(confidence)
    )
    old = [answer.novelty for _, _, answer in rows]
    new = [p.novelty for p, (_, label) in zip(answers, examples, strict=True) if label not in known]
    pairs = [(b > a) + (b == a) / 2 for a in old for b in new]
    assert found.novelty.auroc == pytest.approx(np.mean(pairs))
    for share in found.novelty.shares:
        assert share.known == np.mean([x > share.threshold for x in old])
        assert share.unknown == np.mean([x > share.threshold for x in new])
    counts = {entry.label: entry.images for entry in found.unknown_labels}
    labels = [label for _, label in examples]
    assert counts == {label: labels.count(label) for label in labels if label not in known}


async def test_messages_may_be_cut_anywhere(running: Running) -> None:
    examples = mixed(40)
    whole = await evaluate(running, examples)
    for batches in (range(1, 40), [7], [39]):
        response = await running.evaluator.Evaluate(messages(examples, batches))
        assert response.evaluation == whole


async def test_only_unknown_classes(running: Running) -> None:
    found = await evaluate(running, [(png(), "pink"), (png(), "grey"), (png(), "pink")])
    assert (found.images, found.unknown_images) == (0, 3)
    assert {entry.label: entry.images for entry in found.unknown_labels} == {"pink": 2, "grey": 1}
    assert not found.classes
    for field in ("accuracy", "accuracy_task_known", "mean_class_accuracy", "calibration"):
        assert not found.HasField(field)
    assert not found.novelty.HasField("auroc")
    for share in found.novelty.shares:
        assert not share.HasField("known")
        assert share.HasField("unknown")


async def test_as_many_confusions_as_asked_for(running: Running) -> None:
    examples = mixed(60)
    everything = await evaluate(running, examples, confusions=10_000, model="models/default")
    assert len(everything.confusions) > 3, "so that two are some of them"
    some = await evaluate(running, examples, confusions=2)
    assert list(some.confusions) == list(everything.confusions)[:2]


def contents(folder: Path) -> Mapping[str, tuple[int, str]]:
    """Return every file with when it was written, and its hash."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


async def test_nothing_is_kept_but_figures(running: Running) -> None:
    store = running.settings.store
    before = contents(store)
    with fails(*IMAGE, field="examples[1].image"):
        await evaluate(running, [(png(), "red"), (b"", "red")])
    assert contents(store) == before, "of what is refused, nothing at all"
    examples = [*mixed(BATCH + 3), (png(), "a class of nobody")]
    await evaluate(running, examples, version=version(2))
    after = contents(store)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    kept = [Path(name) for name in changed]
    assert {path.name for path in kept} <= {"tasks.sqlite-wal", "tasks.sqlite-shm"}
    for path in kept:
        content = path.read_bytes()
        assert not [label for label in ("grey", "nobody", "white") if label.encode() in content]
        assert b"IDAT" not in content
    listed = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert not listed.tasks


# -- bad input ----------------------------------------------------------------------------------


async def assert_unharmed(running: Running) -> None:
    assert (await evaluate(running, [(png(GREEN), "green")])).accuracy == 1


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
async def test_images_that_are_refused(running: Running, make: Callable[[], bytes]) -> None:
    examples = [*[(png(), "red")] * 40, (make(), "nobody knows"), (png(), "red")]
    with fails(*IMAGE, field="examples[40].image"):
        await running.evaluator.Evaluate(messages(examples, [30]))
    await assert_unharmed(running)


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
async def test_labels_that_are_refused(running: Running, label: str) -> None:
    with fails(*INVALID, field="examples[1].label"):
        await evaluate(running, [(png(), "red"), (png(), label)])
    await assert_unharmed(running)


SPEC = pb.EvaluateRequest(spec=pb.EvaluationSpec())
_, EXAMPLES, END = messages([(png(), "red")])
NO_EXAMPLES = pb.EvaluateRequest(examples=task_pb2.ExampleBatch())
END_OF_NONE = pb.EvaluateRequest(end=learner_pb.UploadEnd())

SEQUENCES: dict[str, tuple[list[pb.EvaluateRequest], str]] = {
    "nothing at all": ([], "spec"),
    "no examples": ([SPEC, END_OF_NONE], "examples"),
    "an upload that broke off": ([SPEC, EXAMPLES], "end"),
    "an upload that lost a message": ([SPEC, EXAMPLES, EXAMPLES, END], "end.example_count"),
    "examples after the end": ([SPEC, EXAMPLES, END, EXAMPLES], "payload"),
    "an empty batch": ([SPEC, NO_EXAMPLES, EXAMPLES], "examples"),
    "examples first": ([EXAMPLES, SPEC], "spec"),
    "an empty message": ([SPEC, EXAMPLES, pb.EvaluateRequest(), END], "payload"),
    "a second spec": ([SPEC, EXAMPLES, SPEC, END], "spec"),
}


@pytest.mark.parametrize(("sent", "field"), SEQUENCES.values(), ids=SEQUENCES)
async def test_sequences_of_messages(
    running: Running, sent: list[pb.EvaluateRequest], field: str
) -> None:
    with fails(*(BROKEN_OFF if field == "end" else INVALID), field=field):
        await running.evaluator.Evaluate(iter(sent))
    await assert_unharmed(running)


SPECS: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "no version's name": ({"version": "3"}, INVALID, "spec.version"),
    "unknown version": ({"version": version(9)}, NOT_FOUND, "spec.version"),
    "a version of another model": ({"version": "models/b/versions/1"}, NOT_FOUND, "spec.version"),
    "no model's name": ({"model": "default"}, INVALID, "spec.model"),
    "unknown model": ({"model": "models/other"}, NOT_FOUND, "spec.model"),
    "fewer than no confusions": ({"confusions": -1}, INVALID, "spec.confusions"),
    "too many confusions": ({"confusions": 10_001}, INVALID, "spec.confusions"),
}


@pytest.mark.parametrize(("spec", "status", "field"), SPECS.values(), ids=SPECS)
async def test_specs(
    running: Running, spec: dict[str, Any], status: tuple[str, str], field: str
) -> None:
    async def nothing_else() -> AsyncIterator[pb.EvaluateRequest]:
        # A message that is being sent when the call ends hides the status from grpc.aio's clients.
        yield messages([], **spec)[0]
        await asyncio.Event().wait()

    with fails(*status, field=field):
        await running.evaluator.Evaluate(nothing_else())
    await assert_unharmed(running)


LIMITS: dict[str, tuple[dict[str, int], list[Example], str]] = {
    "image": ({"image_bytes": 200}, [(bytes(201), "red")], "examples[0].image"),
    "images": ({"task_images": 3}, [(png(), "red")] * 4, "examples"),
    "bytes": ({"task_bytes": 200}, [(png(), "red")] * 3, "examples"),
    "unknown classes": ({"task_classes": 2}, [(png(), c) for c in "abac"], "examples[3].label"),
    "message": ({"message_bytes": 1024}, [(bytes(1025), "red")], "examples"),
}


@pytest.mark.parametrize(("limits", "examples", "field"), LIMITS.values(), ids=LIMITS)
async def test_an_evaluation_over_its_limits(
    start: Callable[..., Any],
    settings: Settings,
    limits: dict[str, int],
    examples: list[Example],
    field: str,
) -> None:
    publish(settings.store, **VERSIONS[0], **VERSIONS[1])
    running = await start(limits=Limits(**limits))
    with fails(*LIMIT, field=field):
        await evaluate(running, examples)
    await assert_unharmed(running)


async def test_before_the_first_version(start: Callable[..., Any]) -> None:
    running = await start()
    service = "inflora.v1.EvaluatorService"
    assert await running.serving(service) == "NOT_SERVING"
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await evaluate(running, [(png(), "red")])
    await running.ended((await running.learn({"red": [png()]})).name)
    assert await running.serving(service) == "SERVING"
    assert (await evaluate(running, [(png(), "red")])).accuracy == 1


# -- beside other calls -------------------------------------------------------------------------


@pytest.fixture
async def two_runs(start: Callable[..., Any], settings: Settings) -> Running:
    """A server whose model runs twice at a time, however many processors there are."""
    for classes in VERSIONS:
        publish(settings.store, **classes)
    running: Running = await start(predict_threads=2)
    return running


async def test_predictions_do_not_wait_for_evaluations(
    two_runs: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, examples = two_runs, [(png(GREEN), "green")] * (BATCH + 1)
    host, asked, all_asked = running.server.host, 0, asyncio.Event()
    in_bulk = host.classify_in_bulk

    async def counted(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:
            all_asked.set()
        return await in_bulk(*arguments)

    monkeypatch.setattr(host, "classify_in_bulk", counted)
    with gate(monkeypatch, png(GREEN)) as held:
        calls = [asyncio.create_task(evaluate(running, examples)) for _ in range(4)]
        await all_asked.wait()
        assert await asyncio.to_thread(held.arrived.wait, 60)
        for _ in range(3):
            answers = await predicted(running, [(png((0, 250, 0)), "")])
            assert answers[0].scores[0].label == "green"
        assert not any(call.done() for call in calls)
        held.open.set()
        assert [found.accuracy for found in await asyncio.gather(*calls)] == [1] * 4
    assert held.most == 1


async def test_the_version_of_the_beginning_is_used_to_the_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3, which knows blue; 1 does not."""
    promoted = asyncio.Event()
    spec, first, second, end = messages([(png(BLUE), "blue")] * (BATCH + 9), [BATCH])

    async def requests() -> AsyncIterator[pb.EvaluateRequest]:
        yield spec
        yield first
        await promoted.wait()
        yield second
        yield end

    with gate(monkeypatch, png(BLUE)) as held:
        call = running.evaluator.Evaluate(requests())
        assert await asyncio.to_thread(held.arrived.wait, 60)
        await running.server.host.promote(1, "a test")
        promoted.set()
        held.open.set()
        found = (await call).evaluation
    assert (found.version, found.images, found.accuracy) == (version(3), BATCH + 9, 1)
    assert (await evaluate(running, [(png(BLUE), "blue")])).version == version(1)


async def test_a_call_that_is_given_up_leaves_the_turn_to_others(
    two_runs: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, examples = two_runs, [(png(GREEN), "green")] * BATCH
    with gate(monkeypatch, png(GREEN)) as held:
        given_up = running.evaluator.Evaluate(messages(examples))
        assert await asyncio.to_thread(held.arrived.wait, 60)
        assert given_up.cancel()
        other = asyncio.create_task(evaluate(running, examples))
        (answer,) = await predicted(running, [(png((0, 250, 0)), "")])
        assert answer.scores[0].label == "green"
        held.open.set()
        assert (await other).accuracy == 1
    assert held.most == 1


async def test_no_more_run_at_once_than_there_is_memory_for(running: Running) -> None:
    end = asyncio.Event()

    async def idle() -> AsyncIterator[pb.EvaluateRequest]:
        spec, first, last = messages([(png(RED), "red")], version=version(1))
        yield spec
        yield first
        await end.wait()
        yield last

    calls = [running.evaluator.Evaluate(idle()) for _ in range(MOST_AT_ONCE + 1)]
    done, waiting = await asyncio.wait(
        [asyncio.ensure_future(anext_failure(call)) for call in calls],
        return_when=asyncio.FIRST_COMPLETED,
    )
    assert len(done) == 1
    with fails(*LIMIT):
        raise done.pop().result()
    end.set()
    assert [await call for call in waiting] == [None] * MOST_AT_ONCE
    assert (await evaluate(running, [(png(RED), "red")])).images == 1


async def anext_failure(call: Any) -> Exception | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_what_was_forgotten_meanwhile_is_not_named(running: Running) -> None:
    forgotten = asyncio.Event()

    async def requests() -> AsyncIterator[pb.EvaluateRequest]:
        spec, first, last = messages([(png(RED), "red")])
        yield spec
        yield first
        await forgotten.wait()
        yield last

    call = running.evaluator.Evaluate(requests())
    task = await running.learner.ForgetClasses(learner_pb.ForgetClassesRequest(labels=["green"]))
    await running.ended(task.task.name)
    forgotten.set()
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="version"):
        await call
    assert (await evaluate(running, [(png(RED), "red")])).accuracy == 1
    # Of a version that knew it, and answers without it now.
    found = await evaluate(running, [(png(RED), "red"), (png(GREEN), "green")], version=version(3))
    assert (found.images, found.unknown_images, found.accuracy) == (1, 1, 1)
    purge = learner_pb.ForgetClassesRequest(labels=["green"], purge=True)
    await running.ended((await running.learner.ForgetClasses(purge)).task.name)
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="spec.version"):
        await evaluate(running, [(png(RED), "red")], version=version(3))
