"""Parts that fit in memory, losses read late, coarser arithmetic: the same within rounding."""

from __future__ import annotations

import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ImageFile
from torch import Tensor

from inflora_core.backbone import Backbone
from inflora_core.compute import LEAST_ABREAST, Compute, Parts, _threads, halves
from inflora_core.config import Gate, LearnConfig
from inflora_core.errors import CancelledError, InvalidInputError
from inflora_core.learner import learn_task
from inflora_core.merge import product
from inflora_core.model import ContinualModel, Learned
from inflora_core.progress import Tracker
from inflora_core.store import Store
from inflora_core.training import Losses
from inflora_core.worker import Channel, Worker, serve
from tests.core import tiny

CPU = torch.device("cpu")
CONFIG = LearnConfig(rank=4, epochs=2, batch_size=8, learning_rate=5e-3, held_out_share=0.25)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 60))
def test_parts_become_smaller_until_they_fit(
    threads: int, count: int, fits: int, at_most: int
) -> None:
    compute = Compute()
    tried = []

    def run(parts: Parts) -> list[slice]:
        tried.append(parts)

        def one(part: slice) -> slice:
            if (part.stop - part.start) * parts.abreast > fits + parts.abreast - 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return part

        return list(parts.each(one))

    done = compute.in_parts(count, run, at_most)
    assert [i for part in done for i in range(count)[part]] == list(range(count))
    assert torch.get_num_threads() == threads
    parts = tried[-1]
    assert done == parts.slices
    assert parts.abreast <= threads
    together = parts.abreast * max((part.stop - part.start for part in done), default=0)
    assert together <= min(fits, at_most) + parts.abreast - 1
    assert together >= min(fits, at_most, count) // 2, "no fewer than it has to be"


def test_parts_are_taken_abreast_and_come_in_order(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)

    def one(part: slice) -> tuple[slice, int, bool]:
        together.wait()  # for as many others
        return part, torch.get_num_threads(), torch.is_grad_enabled()

    parts = Parts.of(12 * LEAST_ABREAST, 3 * LEAST_ABREAST, threads)
    with torch.no_grad():
        found = list(parts.each(one))
    assert [part for part, _, _ in found] == parts.slices
    assert {of_each for _, of_each, _ in found} == {1}, "together as many as there were"
    assert not any(differentiates for _, _, differentiates in found)
    assert torch.get_num_threads() == threads


def test_a_part_that_fails_leaves_nothing_under_way(threads: int) -> None:
    together, failed = threading.Barrier(threads, timeout=30), threading.Event()
    ended: list[slice] = []

    def one(part: slice) -> None:
        if part.start < threads:
            together.wait()
        if part.start == 0:
            failed.set()
            raise ZeroDivisionError
        failed.wait()
        assert sum(range(10**6))  # it takes longer than the failure takes to be told
        ended.append(part)

    with pytest.raises(ZeroDivisionError):
        list(Parts.of(100, threads, threads).each(one))
    known = len(ended)
    assert threads - 1 <= known <= threads
    assert torch.get_num_threads() == threads
    wait([_threads(threads).submit(lambda: None) for _ in range(threads)])
    assert len(ended) == known, "and nothing comes after it"


def test_nothing_is_under_way_when_who_asked_has_had_enough(threads: int) -> None:
    ended: list[slice] = []

    def one(part: slice) -> slice:
        assert sum(range(10**5 * part.stop))  # each takes longer than the one before
        ended.append(part)
        return part

    def ask() -> None:
        for part in Parts.of(20, threads, threads).each(one):
            if part.start:
                raise CancelledError("on request")

    with pytest.raises(CancelledError):
        ask()
    known = len(ended)
    wait([_threads(threads).submit(lambda: None) for _ in range(threads)])
    assert len(ended) == known < 20


@pytest.mark.parametrize("threads", range(1, 65))
def test_no_thread_is_idle(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for size in (1, 7, 8, 32, 128):
        abreast = Compute()._abreast(size)
        assert threads % abreast == 0
        assert abreast == 1 or size // abreast >= LEAST_ABREAST


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=repr,
)
def test_not_even_one_row_fits(error: Exception) -> None:
    def run(parts: Parts) -> None:
        raise error

    with pytest.raises(type(error)):
        Compute().in_parts(5, run)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    attempts = []

    def run(parts: Parts) -> None:
        attempts.append(parts)
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        Compute().in_parts(5, run)
    assert len(attempts) == 1


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny.make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def before(backbone: Backbone) -> ContinualModel:
    return teach(tiny.untaught(backbone), backbone, ["red", "green"], Compute()).model


def teach(
    model: ContinualModel, backbone: Backbone, labels: list[str], compute: Compute
) -> Learned:
    data = tiny.images(labels, 15)
    return learn_task(model, backbone, data, labels[0], CONFIG, Tracker(), compute=compute)


def teach_abreast(model: ContinualModel, backbone: Backbone) -> Learned:
    """In batches that three threads share."""
    config = CONFIG.model_copy(update={"batch_size": 3 * LEAST_ABREAST})
    data = tiny.images(["blue", "white"], 40)
    return learn_task(model, backbone, data, "task", config, Tracker(), compute=Compute())


@pytest.fixture(scope="module")
def whole(before: ContinualModel, backbone: Backbone) -> Learned:
    return teach(before, backbone, ["blue", "white"], Compute())


@contextmanager
def room_for(backbone: Backbone, images: int) -> Iterator[list[int]]:
    """Have the second block run out of memory with more images, when the first is through."""
    tried = []

    def refuse(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = backbone.module.get_submodule("blocks.1").register_forward_pre_hook(refuse)
    try:
        yield tried
    finally:
        handle.remove()


def test_threads_give_the_same_result(
    before: ContinualModel, backbone: Backbone, threads: int
) -> None:
    """The same bits twice, and with another number of threads the same within rounding."""
    one, other = teach_abreast(before, backbone), teach_abreast(before, backbone)
    assert_alike(one, other, 0)
    torch.set_num_threads(1)
    assert_alike(one, teach_abreast(before, backbone), 1e-4)


@pytest.mark.parametrize("images", [1, 3, 7])
def test_little_memory_is_enough_for_parts_abreast(
    before: ContinualModel, backbone: Backbone, threads: int, images: int
) -> None:
    whole = teach_abreast(before, backbone)
    with room_for(backbone, images) as tried:
        learned = teach_abreast(before, backbone)
    assert max(tried) > images, "it was tried"
    assert_alike(learned, whole, 1e-4)


@pytest.mark.parametrize("images", [1, 2, 3, 5, 7])
def test_little_memory_gives_the_same_result(
    before: ContinualModel, backbone: Backbone, whole: Learned, images: int
) -> None:
    compute = Compute()
    with room_for(backbone, images) as tried:
        learned = teach(before, backbone, ["blue", "white"], compute)
    assert max(tried) > images, "it was tried"
    assert max(tried[10:]) <= images, "and remembered"
    assert_alike(learned, whole, 1e-4)


def test_a_task_without_room_for_one_image_ends_with_the_reason(
    before: ContinualModel, backbone: Backbone, whole: Learned
) -> None:
    with room_for(backbone, 0), pytest.raises(torch.OutOfMemoryError):
        teach(before, backbone, ["blue", "white"], Compute())
    assert_alike(teach(before, backbone, ["blue", "white"], Compute()), whole, 0)


def assert_alike(left: Learned, right: Learned, atol: float) -> None:
    """Compare merged weights, memories, statistics and heads."""
    for name, layer in left.model.layers.items():
        other = right.model.layers[name]
        np.testing.assert_allclose(layer.key_value, other.key_value, atol=atol)
        np.testing.assert_allclose(layer.moment, other.moment, atol=atol)
        assert (layer.protected, layer.tokens) == (other.protected, other.tokens)
        kept, also = (x.basis[:, : x.protected] for x in (layer, other))
        np.testing.assert_allclose(kept @ kept.T, also @ also.T, atol=10 * atol)
    np.testing.assert_allclose(left.model.class_means, right.model.class_means, atol=atol)
    np.testing.assert_allclose(
        left.model.head_weight, right.model.head_weight, rtol=10 * atol, atol=10 * atol
    )


def test_bfloat16_learns_nearly_the_same(
    before: ContinualModel, backbone: Backbone, whole: Learned
) -> None:
    learned = teach(before, backbone, ["blue", "white"], Compute(half=True))
    for name, factors in learned.factors.items():
        assert factors.expansion.dtype == np.float32
        mine, theirs = product(factors), product(whole.factors[name])
        cosine = (mine * theirs).sum() / np.linalg.norm(mine) / np.linalg.norm(theirs)
        assert cosine > 0.9
    assert learned.report.leak < 1e-4, "the reduction is not rounded, and the weights are not"
    assert learned.report.training_accuracy >= whole.report.training_accuracy - 0.1
    # What is measured of the images is measured in float32.
    means, theirs = learned.model.class_means, whole.model.class_means
    assert np.abs(means - theirs).max() < 0.05 * np.abs(theirs).max()


def test_what_is_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert halves("bfloat16", CPU)
    assert not halves("float32", CPU)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not halves("auto", CPU)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert halves("auto", CPU)
    assert not halves("auto", CPU, limited=True), "there, want of memory would be its end"
    assert halves("bfloat16", CPU, limited=True)


@given(st.lists(st.floats(0, 100, width=32), max_size=20))
def test_losses_come_in_order(values: list[float]) -> None:
    losses = Losses(2)
    for count, value in enumerate(values, 1):
        losses.add(torch.tensor(value))
        losses.look()
        assert losses.known == values[:count]
    losses.look(wait=True)
    assert losses.known == values


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training(bad: float) -> None:
    losses = Losses(2)
    losses.add(torch.tensor(bad))
    with pytest.raises(InvalidInputError, match=r"diverged: in epoch 3, .* lower learning rate"):
        losses.look()


@pytest.fixture
def cuda(backbone: Backbone) -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    backbone.module.to("cuda")
    yield torch.device("cuda")
    backbone.module.cpu()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("record", [False, True])
def test_a_gpu_is_not_waited_for(
    backbone: Backbone,
    before: ContinualModel,
    cuda: torch.device,
    record: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within an epoch nothing synchronises with the device."""
    from inflora_core import training

    make: Callable[..., Any] = training.recorded
    calls = []

    def watched(*args: Any) -> Callable[[Any], Tensor]:
        differentiate = make(*args)

        def run(batch: Any) -> Tensor:
            calls.append(1)
            # The first is a rehearsal, the second is recorded.
            torch.cuda.set_sync_debug_mode("error" if len(calls) > 2 else "default")
            try:
                return differentiate(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(training, "recorded", watched)
    teach(before, backbone, ["blue", "white"], Compute(cuda, record=record))
    assert len(calls) > 4


@pytest.mark.parametrize("half", [False, True])
def test_steps_that_are_played_back_learn_the_same(
    backbone: Backbone, before: ContinualModel, cuda: torch.device, half: bool
) -> None:
    """The last batch of an epoch is smaller, and computed as it comes."""
    plain, played = (
        teach(before, backbone, ["blue", "white"], Compute(cuda, half, record=record))
        for record in (False, True)
    )
    assert_alike(played, plain, 1e-4)
    np.testing.assert_allclose(
        played.report.epoch_losses, plain.report.epoch_losses, rtol=1e-3, atol=1e-5
    )


def test_images_that_do_not_fit_beside_the_model(
    backbone: Backbone, before: ContinualModel, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay where they are, and each batch is brought when its turn comes."""
    plain = teach(before, backbone, ["blue", "white"], Compute(cuda))
    monkeypatch.setattr("inflora_core.training.DEVICE_SHARE", 0.0)
    assert_alike(teach(before, backbone, ["blue", "white"], Compute(cuda)), plain, 1e-4)


def test_a_step_that_cannot_be_recorded_is_computed(
    backbone: Backbone,
    before: ContinualModel,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = teach(before, backbone, ["blue", "white"], Compute(cuda, record=False))

    def capture(graph: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    compute = Compute(cuda)
    learned = teach(before, backbone, ["blue", "white"], compute)
    assert "steps are not recorded: CUDA out of memory" in caplog.text
    assert compute.most == Compute().most
    assert_alike(learned, plain, 1e-4)


@contextmanager
def no_room_to_decode(worker: Worker) -> Iterator[None]:
    def load(image: Any) -> Any:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", load)
        yield


@pytest.mark.parametrize(
    "shortage", [lambda worker: room_for(worker._load(), 0), no_room_to_decode]
)
def test_the_worker_tells_of_memory_and_takes_the_next_task(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shortage: Callable[[Worker], AbstractContextManager[None]],
) -> None:
    """Not even one image fits: the task fails with the reason, and the process goes on."""
    store = Store.open(tmp_path / "store")
    worker = Worker(store, Compute(), 1)
    worker.prepare(str(tiny.write_backbone(tmp_path)), None)
    commands = [
        {
            "command": "learn",
            "task": f"task-{number}",
            "spool": str(tiny.write_spool(tmp_path / f"spool-{number}", ["red", "green"], 8)),
            "settings": CONFIG.model_dump(mode="json"),
            "gate": Gate().model_dump(mode="json"),
            "parent": None,
        }
        for number in range(2)
    ]
    events = io.StringIO()
    # With the end of its commands a worker ends its process, which is the tests' here.
    monkeypatch.setattr(os, "_exit", lambda status: None)
    channel = Channel(io.StringIO(), events)
    with shortage(worker):
        monkeypatch.setattr(channel, "commands", lambda: iter(commands[:1]))
        serve(worker, channel)
    monkeypatch.setattr(channel, "commands", lambda: iter(commands[1:]))
    serve(worker, channel)
    ends = [json.loads(line) for line in events.getvalue().splitlines()]
    told = [x for x in ends if x["event"] in ("failed", "learned")]
    assert [x["event"] for x in told] == ["failed", "learned"]
    assert (told[0]["task"], told[0]["reason"]) == ("task-0", "LIMIT_EXCEEDED")
    assert "memory" in told[0]["message"]
