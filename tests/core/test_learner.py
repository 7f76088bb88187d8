"""``learn_task`` on a tiny ViT: what it promises for every task, and what may go wrong."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inflora_core.backbone import Backbone, state_of
from inflora_core.config import LEAST_STEPS, MOST_STEPS, PRESETS, LearnConfig, preset
from inflora_core.errors import CancelledError, InvalidInputError, StateError
from inflora_core.learner import (
    FEW_OF_A_CLASS,
    learn_task,
    some_of_each,
    tasks_left,
    threshold_after,
)
from inflora_core.merge import merge, product
from inflora_core.model import (
    Array,
    ContinualModel,
    HeldOut,
    LabelledImages,
    Learned,
    Progress,
    Stage,
    TaskReport,
)
from inflora_core.moments import record_moments
from inflora_core.progress import Tracker
from inflora_core.training import PATIENCE, Watch, learning_rate_at, random_head, split
from tests.core import tiny

CPU = torch.device("cpu")
CONFIG = LearnConfig(
    rank=4,
    epochs=3,
    batch_size=8,
    learning_rate=5e-3,
    held_out_share=0.25,
    threshold_first=0.5,
    threshold_last=0.8,
)
FIRST, SECOND, THIRD = ("red", "green"), ("blue", "yellow", "white"), ("cyan", "magenta")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """One for all tests: whatever a task leaves in it must not matter to the next."""
    return tiny.make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def blank(backbone: Backbone) -> ContinualModel:
    return tiny.untaught(backbone)


def learn(
    before: ContinualModel,
    backbone: Backbone,
    data: LabelledImages,
    task: str = "task",
    config: LearnConfig = CONFIG,
    on_progress: Any = None,
    **changes: Any,
) -> Learned:
    config = config.updated(**changes)
    return learn_task(before, backbone, data, task, config, Tracker(on_progress))


@pytest.fixture(scope="module")
def stream(blank: ContinualModel, backbone: Backbone) -> list[Learned]:
    """Three tasks, one after the other."""
    model, done = blank, []
    for number, labels in enumerate((FIRST, SECOND, THIRD)):
        done.append(learn(model, backbone, tiny.images(labels, 12), f"task-{number}"))
        model = done[-1].model
    return done


def states(blank: ContinualModel, stream: list[Learned]) -> list[ContinualModel]:
    return [blank, *(learned.model for learned in stream)]


def bytes_of(learned: Learned) -> list[bytes]:
    """All that was learned, without what was measured on the clock."""
    model = learned.model
    arrays = [model.head_weight, model.head_bias, model.class_means, model.class_scatter]
    for layer in model.layers.values():
        arrays += [layer.key_value, layer.basis, layer.moment, np.array(layer.protected)]
    for factors in learned.factors.values():
        arrays += [factors.expansion, factors.reduction]
    report = repr(replace(learned.report, stage_seconds={}))
    return [*(array.tobytes() for array in arrays), report.encode()]


def assert_untouched(backbone: Backbone) -> None:
    """Assert that no branch was left beside a layer, and no hook on it."""
    for attention in backbone.layers.values():
        qkv = attention.get_submodule("qkv")
        assert type(qkv) is nn.Linear
        assert not qkv._forward_pre_hooks
        assert not qkv.weight.requires_grad
        assert qkv.weight.grad is None


# -- two tasks and more -------------------------------------------------------------------------


def test_classes_are_told_apart(backbone: Backbone, stream: list[Learned]) -> None:
    model = stream[-1].model
    assert [entry.label for entry in model.classes] == [*FIRST, *SECOND, *THIRD]
    assert [entry.task for entry in model.classes] == [
        "task-0", "task-0", "task-1", "task-1", "task-1", "task-2", "task-2",
    ]  # fmt: skip
    assert model.tasks == 3
    new = tiny.images([entry.label for entry in model.classes], 5, first=100)
    answers = model.logits(features_of(backbone, model, new.images)).argmax(1)
    assert (answers == new.labels).mean() >= 0.9


def set_weights(backbone: Backbone, model: ContinualModel) -> None:
    for name, layer in model.layers.items():
        weight = backbone.qkv(name).get_parameter("weight")
        weight.data[len(weight) // 3 :] = torch.from_numpy(layer.key_value)


def features_of(backbone: Backbone, model: ContinualModel, images: Array) -> Array:
    """Return what ``model`` makes of images (n, S, S', 3), (n, e)."""
    set_weights(backbone, model)
    with torch.inference_mode():
        features: Tensor = backbone.module(backbone.normalise(torch.from_numpy(images)))
    return features.numpy()


def test_an_update_does_not_touch_what_is_protected(
    blank: ContinualModel, stream: list[Learned]
) -> None:
    for before, learned in zip(states(blank, stream), stream, strict=False):
        for name, factors in learned.factors.items():
            layer = before.layers[name]
            update = product(factors)
            assert np.linalg.norm(update) > 1e-3, "something was learned"
            leak = np.linalg.norm(update @ layer.basis[:, : layer.protected])
            assert leak / np.linalg.norm(update) < 1e-5
            scale = factors.reduction @ factors.reduction.T
            assert np.allclose(scale, np.eye(len(scale)) / 3, atol=1e-6)
        assert learned.report.leak < 1e-5
    assert all(layer.leak > 0 for learned in stream[1:] for layer in learned.report.layers)
    assert all(0 < layer.interference < 1 for done in stream[1:] for layer in done.report.layers)
    assert stream[0].report.interference == 0


def test_ranks_and_free_dimensions_add_up(blank: ContinualModel, stream: list[Learned]) -> None:
    for before, learned in zip(states(blank, stream), stream, strict=False):
        assert [layer.layer for layer in learned.report.layers] == list(before.layers)
        for row in learned.report.layers:
            old, new = before.layers[row.layer], learned.model.layers[row.layer]
            assert row.dimension == tiny.WIDTH
            assert row.free_before == row.dimension - old.protected
            assert row.free_after == row.dimension - new.protected
            assert row.free_after <= row.free_before
            factors = learned.factors[row.layer]
            assert factors.reduction.shape == (row.rank, tiny.WIDTH)
            assert factors.expansion.shape == (2 * tiny.WIDTH, row.rank)
            assert 1 <= row.rank <= min(CONFIG.rank, row.free_before)
        capacity = np.mean([row.free_after / row.dimension for row in learned.report.layers])
        assert learned.report.capacity == pytest.approx(capacity)
    assert stream[-1].report.capacity < 1


def test_the_memory_only_grows(blank: ContinualModel, stream: list[Learned]) -> None:
    for before, after in itertools.pairwise(states(blank, stream)):
        for name, old in before.layers.items():
            new = after.layers[name]
            assert new.protected >= old.protected
            kept = new.basis[:, : old.protected]
            assert np.allclose(kept, old.basis[:, : old.protected], atol=1e-6)
            assert np.allclose(new.basis.T @ new.basis, np.eye(tiny.WIDTH), atol=1e-5)
            assert new.tokens > old.tokens
            assert np.allclose(new.moment, new.moment.T, atol=1e-4)


def test_weights_are_the_factors_merged_in_order(
    blank: ContinualModel, stream: list[Learned]
) -> None:
    for name, layer in blank.layers.items():
        key_value = layer.key_value
        for learned in stream:
            key_value = merge(key_value, learned.factors[name])
            assert np.array_equal(learned.model.layers[name].key_value, key_value)


def test_the_state_before_stays_as_it_was(blank: ContinualModel, backbone: Backbone) -> None:
    before = repr(blank)
    arrays = [layer.key_value.copy() for layer in blank.layers.values()]
    learn(blank, backbone, tiny.images(FIRST, 6))
    assert repr(blank) == before
    for layer, array in zip(blank.layers.values(), arrays, strict=True):
        assert np.array_equal(layer.key_value, array)


def test_nothing_but_key_and_value_rows_changes(tmp_path: Path) -> None:
    backbone = tiny.make_backbone(tmp_path)
    frozen = state_of(backbone)
    learned = learn(tiny.untaught(backbone), backbone, tiny.images(FIRST, 6))
    for name, array in state_of(backbone).items():
        layer = name.removesuffix(".qkv.weight")
        if layer == name:
            assert np.array_equal(array, frozen[name]), name
        else:
            assert np.array_equal(array[: tiny.WIDTH], frozen[name][: tiny.WIDTH]), "Q rows"
            assert np.array_equal(array[tiny.WIDTH :], learned.model.layers[layer].key_value)
            assert not np.array_equal(array, frozen[name])


@pytest.mark.parametrize("task", [0, 1, 2])
def test_what_is_kept_of_the_images_is_of_the_merged_model(
    backbone: Backbone, blank: ContinualModel, stream: list[Learned], task: int
) -> None:
    before, learned = states(blank, stream)[task].layers, stream[task]
    labels = (FIRST, SECOND, THIRD)[task]
    data = tiny.images(labels, 12)
    train, _ = split(data.images, data.labels, CONFIG.held_out_share, CONFIG.seed, CPU)
    set_weights(backbone, learned.model)
    layers = {name: backbone.qkv(name) for name in backbone.config.layers}
    with torch.inference_mode(), record_moments(layers) as moments:
        backbone.module(backbone.normalise(train.loaded()))
    with torch.inference_mode():
        features = backbone.module(backbone.normalise(torch.from_numpy(data.images)))
    columns = [i for i, entry in enumerate(learned.model.classes) if entry.task == f"task-{task}"]
    for column, label in zip(columns, range(len(labels)), strict=True):
        mean = features[torch.from_numpy(data.labels) == label].mean(0).numpy()
        assert np.allclose(learned.model.class_means[column], mean, atol=1e-4)
        assert learned.model.class_counts[column] == 12, "held-out images count here"
    for name, layer in learned.model.layers.items():
        old, new = before[name], moments[name]
        assert layer.tokens == old.tokens + new.tokens
        total = old.tokens * old.moment + new.tokens * new.mean.numpy()
        assert np.allclose(layer.moment, total / layer.tokens, atol=1e-4)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_merged_weights_answer_as_the_branches_did(
    backbone: Backbone, blank: ContinualModel, stream: list[Learned], task: int
) -> None:
    before, learned = states(blank, stream)[task], stream[task]
    data = tiny.images((FIRST, SECOND, THIRD)[task], 12)
    held_out = Counter(data.labels.tolist()) - Counter(data.labels[learned.rows].tolist())
    assert set(held_out.values()) == {int(12 * CONFIG.held_out_share)}
    some = data.images[learned.rows]
    merged = features_of(backbone, learned.model, some)
    assert merged.shape == learned.features.shape
    assert np.allclose(merged, learned.features, atol=1e-5)
    old = features_of(backbone, before, some)
    assert not np.allclose(old, learned.features, atol=1e-3), "without the task it sees otherwise"


def test_the_report_tells_what_was_done(stream: list[Learned]) -> None:
    report: TaskReport = stream[1].report
    assert len(report.epoch_losses) == CONFIG.epochs
    assert all(np.isfinite(loss) for loss in report.epoch_losses)
    assert report.epoch_losses[-1] < report.epoch_losses[0]
    assert report.threshold == threshold_after(1, CONFIG)
    assert LearnConfig.model_validate(report.settings) == CONFIG
    assert report.device == "cpu"
    assert report.warnings == ()
    assert report.training_accuracy >= 0.9
    assert report.held_out_accuracy_task_known is not None
    assert report.held_out_accuracy is not None
    assert report.held_out_accuracy <= report.held_out_accuracy_task_known
    assert list(report.stage_seconds) == [Stage.DESIGNING, Stage.TRAINING, Stage.EXTENDING]


def test_thirty_tasks(backbone: Backbone, blank: ContinualModel) -> None:
    """The memory stays orthonormal, nothing leaks, and something is free at the end."""
    model = blank
    config = CONFIG.updated(epochs=1, threshold_first=0.9, threshold_last=1.0)
    for task in range(30):
        label = f"{tiny.COLOURS[task % 8]} {task}"
        data = tiny.images([label, f"{label}'"], 4)
        learned = learn(model, backbone, data, f"task-{task}", config, held_out_share=0)
        assert learned.report.leak < 1e-5
        for name, layer in learned.model.layers.items():
            identity = layer.basis.astype(np.float64).T @ layer.basis
            assert np.abs(identity - np.eye(tiny.WIDTH)).max() < 1e-5
            assert layer.protected >= model.layers[name].protected
            assert np.isfinite(layer.moment).all()
        model = learned.model
    assert model.tasks == 30
    assert len(model.classes) == len(model.head_weight) == 60
    assert all(0 < layer.protected < tiny.WIDTH for layer in model.layers.values())


# -- the same again -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"augmentation": "flip"}, {"head": "trained", "criterion": "paper"}], ids=str
)
def test_a_seed_decides_everything(
    backbone: Backbone, blank: ContinualModel, changes: dict[str, Any]
) -> None:
    data = tiny.images(FIRST, 8)
    first = learn(blank, backbone, data, seed=1, **changes)
    torch.manual_seed(12345)
    np.random.seed(54321)
    assert bytes_of(learn(blank, backbone, data, seed=1, **changes)) == bytes_of(first)
    other = learn(blank, backbone, data, seed=2, **changes)
    for left, right in zip(first.factors.values(), other.factors.values(), strict=True):
        assert not np.array_equal(left.expansion, right.expansion)


def test_the_global_generators_are_left_alone(backbone: Backbone, blank: ContinualModel) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    learn(blank, backbone, tiny.images(FIRST, 6), augmentation="flip")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


def test_what_was_learned_before_on_this_backbone_does_not_matter(
    backbone: Backbone, blank: ContinualModel, tmp_path: Path
) -> None:
    data = tiny.images(FIRST, 6)
    learn(blank, backbone, tiny.images(SECOND, 6))
    fresh = tiny.make_backbone(tmp_path)
    assert bytes_of(learn(blank, backbone, data)) == bytes_of(learn(blank, fresh, data))


# -- held-out images ----------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 2**63 - 1),
)
def test_held_out_images_are_apart_from_training(
    counts: list[int], share: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(0).permutation(labels)
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    train, held_out = split(pixels, labels, share, seed, CPU)
    left, right = (set(part.loaded()[:, 0, 0, 0].tolist()) for part in (train, held_out))
    assert not left & right
    assert left | right == set(range(len(labels)))
    assert Counter(held_out.labels.tolist()) == Counter(
        {i: int(share * count) for i, count in enumerate(counts) if int(share * count)}
    )
    assert set(train.labels.tolist()) == set(range(len(counts))), "each class is trained on"
    for part in (train, held_out):
        assert part.labels.tolist() == labels[part.loaded()[:, 0, 0, 0].numpy()].tolist()


def test_held_out_images_influence_nothing_but_the_statistics(
    backbone: Backbone, blank: ContinualModel
) -> None:
    data = tiny.images(FIRST, 8)
    first = learn(blank, backbone, data)
    _, held_out = split(data.images, data.labels, CONFIG.held_out_share, CONFIG.seed, CPU)
    hidden = [
        i
        for i, image in enumerate(data.images)
        if (held_out.loaded().numpy() == image).all((1, 2, 3)).any()
    ]
    assert len(hidden) == len(held_out) == 4
    changed = data.images.copy()
    changed[hidden] = 255 - changed[hidden]
    other = learn(blank, backbone, replace(data, images=changed))
    for name, factors in first.factors.items():
        assert factors.expansion.tobytes() == other.factors[name].expansion.tobytes()
        assert factors.reduction.tobytes() == other.factors[name].reduction.tobytes()
    for name, layer in first.model.layers.items():
        assert layer.basis.tobytes() == other.model.layers[name].basis.tobytes()
        assert layer.protected == other.model.layers[name].protected
    assert first.report.epoch_losses == other.report.epoch_losses
    assert first.report.held_out_method is HeldOut.HELD_OUT
    assert other.report.held_out_accuracy != first.report.held_out_accuracy
    assert first.report.held_out_counts == {"red": 2, "green": 2}
    # Once they have been asked for, they are as good as any: 8 images, not 6.
    assert first.model.class_counts.tolist() == [8, 8]
    assert not np.allclose(first.model.class_means, other.model.class_means)


def test_nothing_is_held_out_on_request(backbone: Backbone, blank: ContinualModel) -> None:
    report = learn(blank, backbone, tiny.images(FIRST, 6), held_out_share=0.0).report
    assert report.held_out_counts == {}
    assert report.held_out_method is HeldOut.LEAVE_ONE_OUT
    assert report.held_out_accuracy is not None
    report = learn(
        blank, backbone, tiny.images(FIRST, 6), held_out_share=0.0, head="trained"
    ).report
    assert report.held_out_method is HeldOut.NONE
    assert report.held_out_accuracy is None
    assert report.held_out_accuracy_task_known is None


@pytest.mark.parametrize("each", [1, 2, 5])
def test_with_few_images_each_is_left_out_in_turn(
    backbone: Backbone, blank: ContinualModel, each: int
) -> None:
    learned = learn(blank, backbone, tiny.images(FIRST, each), held_out_share=0.1)
    assert_finite(learned)
    report = learned.report
    assert report.held_out_counts == {}
    if each == 1:
        assert report.held_out_method is HeldOut.NONE, "a class without images is no class"
        assert report.held_out_accuracy is None
    else:
        assert report.held_out_method is HeldOut.LEAVE_ONE_OUT
        assert 0 <= report.held_out_accuracy <= 1  # type: ignore[operator]
        assert any("flatter" in warning for warning in report.warnings)


# -- unusual tasks ------------------------------------------------------------------------------


def full(model: ContinualModel, *names: str) -> ContinualModel:
    """``model`` without a free dimension in some layers."""
    layers = {
        name: replace(layer, protected=tiny.WIDTH) if name in names else layer
        for name, layer in model.layers.items()
    }
    return replace(model, layers=layers)


@pytest.mark.parametrize("which", [0, 1])
def test_a_full_layer_gets_no_adapter_and_the_others_learn(
    backbone: Backbone, stream: list[Learned], which: int
) -> None:
    names = list(backbone.config.layers)
    closed, open_ = names[which], names[1 - which]
    before = full(stream[0].model, closed)
    learned = learn(before, backbone, tiny.images(SECOND, 8), "second")
    assert list(learned.factors) == [open_]
    old, new = before.layers[closed], learned.model.layers[closed]
    assert new.key_value.tobytes() == old.key_value.tobytes()
    assert new.protected == tiny.WIDTH
    assert not np.array_equal(learned.model.layers[open_].key_value, before.layers[open_].key_value)
    row = learned.report.layers[which]
    assert (row.layer, row.rank, row.free_before, row.free_after) == (closed, 0, 0, 0)
    assert row.leak == row.interference == 0
    assert learned.report.layers[1 - which].rank > 0
    (warning,) = (line for line in learned.report.warnings if "not adapted" in line)
    assert closed in warning
    assert open_ not in warning
    assert learned.report.training_accuracy >= 0.9
    merged = features_of(backbone, learned.model, tiny.images(SECOND, 8).images[learned.rows])
    assert np.allclose(merged, learned.features, atol=1e-5)


def test_with_every_layer_full_the_head_still_learns(
    backbone: Backbone, stream: list[Learned]
) -> None:
    before = full(stream[0].model, *backbone.config.layers)
    for head in ("statistics", "trained"):
        learned = learn(before, backbone, tiny.images(SECOND, 8), "second", head=head)
        assert learned.factors == {}
        for name, layer in learned.model.layers.items():
            assert np.array_equal(layer.key_value, before.layers[name].key_value)
        assert all(name in learned.report.warnings[0] for name in backbone.config.layers)
        assert "0% of all directions are free" in learned.report.warnings[1]
        assert learned.report.capacity == 0
        assert len(learned.model.head_weight) == len(FIRST) + len(SECOND)
        unseen = tiny.images(SECOND, 9, first=40)
        if head == "statistics":
            assert asked(backbone, learned.model, unseen) > 0.8
        else:
            assert learned.report.epoch_losses[-1] < learned.report.epoch_losses[0]


def test_a_task_of_one_class_adapts_the_backbone(
    backbone: Backbone, blank: ContinualModel, stream: list[Learned]
) -> None:
    """Against what is known, or, if it is the first class of all, against itself upside down."""
    for before in (blank, stream[0].model):
        learned = learn(before, backbone, tiny.images(["blue"], 8), "one")
        assert_finite(learned)
        assert [entry.label for entry in learned.model.classes[-1:]] == ["blue"]
        assert len(learned.model.head_weight) == len(before.classes) + 1
        assert learned.model.class_counts[-1] == 8, "its images upside down are not kept"
        for name, layer in learned.model.layers.items():
            assert np.linalg.norm(product(learned.factors[name])) > 1e-3
            assert layer.protected > before.layers[name].protected
        assert learned.report.leak < 1e-5


def test_one_class_leaves_published_heads_without_a_gradient(
    backbone: Backbone, blank: ContinualModel, stream: list[Learned]
) -> None:
    learned = learn(blank, backbone, tiny.images(["blue"], 8), "one", head="trained")
    assert any("one class" in warning for warning in learned.report.warnings)
    assert learned.report.epoch_losses == (0.0,) * CONFIG.epochs
    for name, layer in learned.model.layers.items():
        assert np.array_equal(layer.key_value, blank.layers[name].key_value)


def test_a_known_class_gets_better_where_it_is_shown_anew(
    backbone: Backbone, stream: list[Learned]
) -> None:
    """New images of a known class beside a new class: one row, better for both kinds of images."""
    before = stream[0].model
    old = tiny.images(FIRST, 12)
    inverted = LabelledImages(255 - old.images, old.labels, old.names)
    fresh = tiny.images(["white"], 12)
    mixed = LabelledImages(
        np.concatenate([inverted.images, fresh.images]),
        np.concatenate([inverted.labels, fresh.labels + len(FIRST)]),
        (*FIRST, "white"),
    )
    learned = learn(before, backbone, mixed, "mixed", epochs=10)
    assert [entry.label for entry in learned.model.classes] == [*FIRST, "white"]
    assert [entry.task for entry in learned.model.classes] == ["task-0", "task-0", "mixed"]
    assert learned.model.class_counts.tolist() == [24, 24, 12]
    unseen = tiny.images(FIRST, 20, first=50)
    shifted = replace(unseen, images=255 - unseen.images)
    assert asked(backbone, learned.model, shifted) > asked(backbone, before, shifted) + 0.3
    assert asked(backbone, learned.model, unseen) >= asked(backbone, before, unseen) - 0.05


def asked(backbone: Backbone, model: ContinualModel, data: LabelledImages) -> float:
    """Return the accuracy of ``model`` on ``data``."""
    position = {entry.label: i for i, entry in enumerate(model.classes)}
    truth = np.array([position[name] for name in data.names])[data.labels]
    answers = model.logits(features_of(backbone, model, data.images)).argmax(1)
    return float((answers == truth).mean())


@pytest.mark.parametrize("labels", [["red"], FIRST, tiny.COLOURS])
def test_one_image_of_each_class(
    backbone: Backbone, blank: ContinualModel, labels: tuple[str, ...]
) -> None:
    learned = learn(blank, backbone, tiny.images(labels, 1))
    assert_finite(learned)
    assert learned.report.held_out_counts == {}
    assert learned.report.held_out_accuracy is None
    assert learned.model.class_counts.tolist() == [1] * len(labels)
    again = learn(learned.model, backbone, tiny.images(["red x", "blue x"], 1), "second")
    assert_finite(again)


def test_equal_images_under_two_names(backbone: Backbone, blank: ContinualModel) -> None:
    """Nothing can tell them apart, but nothing may break either."""
    image = tiny.images(["red"], 1).images
    data = LabelledImages(image.repeat(8, 0), np.arange(8) % 2, ("a", "b"))
    assert_finite(learn(blank, backbone, data))
    black = replace(data, images=np.zeros_like(data.images))
    assert_finite(learn(blank, backbone, black))


def assert_finite(learned: Learned) -> None:
    model = learned.model
    for array in (model.head_weight, model.head_bias, model.class_means, model.class_scatter):
        assert np.isfinite(array).all()
    for layer in model.layers.values():
        assert np.isfinite(layer.key_value).all()
        assert np.isfinite(layer.moment).all()
        assert np.allclose(layer.basis.T @ layer.basis, np.eye(tiny.WIDTH), atol=1e-5)
    assert np.isfinite(learned.report.epoch_losses).all()


# -- what is refused ----------------------------------------------------------------------------


def test_published_heads_refuse_a_known_class_by_name(
    backbone: Backbone, stream: list[Learned]
) -> None:
    data = tiny.images(["white x", "yellow"], 3)
    with pytest.raises(StateError, match="'yellow'") as caught:
        learn(stream[-1].model, backbone, data, "again", head="trained")
    assert caught.value.field == "examples"
    assert_untouched(backbone)


def test_a_task_without_images_is_refused(backbone: Backbone, blank: ContinualModel) -> None:
    with pytest.raises(InvalidInputError, match="no images") as caught:
        learn(blank, backbone, tiny.images([], 0))
    assert caught.value.field == "examples"


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 4), (2, 4), (2, 100)])
def test_training_that_diverges_is_refused(
    backbone: Backbone, blank: ContinualModel, epochs: int, batch_size: int
) -> None:
    """Beyond what a spec may ask for, because layer norms forgive everything below."""
    data = tiny.images(FIRST, 8)
    before = bytes_of(learn(blank, backbone, data))
    state = repr(blank)
    values = {**CONFIG.model_dump(), "epochs": epochs, "batch_size": batch_size}
    absurd = LearnConfig.model_construct(**{**values, "learning_rate": 1e30})
    with pytest.raises(InvalidInputError, match="diverged") as caught:
        learn_task(blank, backbone, data, "task", absurd, Tracker())
    assert caught.value.field == "learning_rate"
    assert repr(blank) == state
    assert_untouched(backbone)
    assert bytes_of(learn(blank, backbone, data)) == before


def test_the_highest_learning_rate_breaks_nothing(
    backbone: Backbone, blank: ContinualModel
) -> None:
    assert_finite(learn(blank, backbone, tiny.images(FIRST, 8), learning_rate=10.0))


# -- how long, and how much is left -------------------------------------------------------------


@given(images=st.integers(1, 10**6), batch_size=st.integers(1, 4096))
def test_epochs_suit_the_number_of_images(images: int, batch_size: int) -> None:
    config = LearnConfig(batch_size=batch_size)
    epochs, steps = config.epochs_for(images), -(-images // batch_size)
    assert epochs >= 1
    assert epochs * steps >= min(LEAST_STEPS, MOST_STEPS)
    assert epochs * steps <= max(MOST_STEPS, steps)
    assert config.updated(epochs=7).epochs_for(images) == 7


def test_training_ends_when_held_out_images_get_no_better(
    backbone: Backbone, blank: ContinualModel
) -> None:
    data = tiny.images(FIRST, 40)
    steady = LearnConfig(rank=4, batch_size=64, learning_rate=1e-30, held_out_share=0.25)
    learned = learn(blank, backbone, data, config=steady)
    assert steady.epochs_for(60) == 10
    assert len(learned.report.epoch_losses) == 1 + PATIENCE
    assert learned.report.settings["epochs"] == 10
    assert learned.report.kept_epoch == 1
    given_epochs = learn(blank, backbone, data, config=steady, epochs=6)
    assert len(given_epochs.report.epoch_losses) == 6, "what was asked for is done"
    assert given_epochs.report.kept_epoch == 6


def test_the_best_epoch_is_kept() -> None:
    watch, parameter = Watch(on=True), [nn.Parameter(torch.zeros(2))]
    ends = list[bool]()
    for value, loss in enumerate([3.0, 2.0, 2.5, 2.1, 2.0]):
        parameter[0].data.fill_(value)
        watch.note(loss, parameter)
        ends.append(watch.over)
    assert ends == [False, False, False, False, True]
    assert watch.restore(parameter) == 2
    assert parameter[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("capacity", "left"),
    [
        ([0.9], None),
        ([0.9, 0.8], 8.0),
        ([0.9, 0.8, 0.8], 16.0),
        ([0.9, 0.8, 0.6, 0.5, 0.4], 3.0),
        ([0.9, 0.4, 0.4, 0.4, 0.4], None),
        ([0.9, 0.5, 0.0], 0.0),
    ],
)
def test_how_many_more_tasks_fit(capacity: list[float], left: float | None) -> None:
    assert tasks_left(np.array(capacity)) == (None if left is None else pytest.approx(left))


def test_little_room_is_warned_of(backbone: Backbone, stream: list[Learned]) -> None:
    roomy, full_ = stream[0].model, full(stream[0].model, *backbone.config.layers)
    assert not any("free" in line for line in stream[0].report.warnings)
    learned = learn(replace(full_, capacity=np.array([0.5, 0.3])), backbone, tiny.images(SECOND, 6))
    assert learned.model.capacity.tolist() == [0.5, 0.3, 0.0]
    assert learned.report.tasks_left == 0
    assert any("about 0.0 more tasks" in line for line in learned.report.warnings)
    assert len(roomy.capacity) == 1


# -- progress and cancelling --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "batch_size", "epochs"), [(12, 8, 3), (5, 32, 1), (1, 4096, 2), (7, 1, 1)]
)
def test_progress_never_falls(
    backbone: Backbone, blank: ContinualModel, each: int, batch_size: int, epochs: int
) -> None:
    seen: list[Progress] = []
    learn(
        blank,
        backbone,
        tiny.images(FIRST, each),
        on_progress=seen.append,
        batch_size=batch_size,
        epochs=epochs,
    )
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] < 1
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == [Stage.DESIGNING, Stage.TRAINING, Stage.EXTENDING, Stage.MERGING]
    training = [progress for progress in seen if progress.stage is Stage.TRAINING]
    assert [progress.epoch for progress in training] == sorted(p.epoch for p in training)
    assert training[-1].epoch == epochs
    assert {progress.epochs for progress in seen} == {epochs}
    assert training[-1].loss > 0


@given(
    steps=st.dictionaries(
        st.sampled_from(list(Stage)), st.lists(st.floats(0, 5), max_size=4), min_size=1
    ),
    epochs=st.integers(1, 1000),
)
def test_a_fraction_stays_between_its_stages(steps: dict[Stage, list[float]], epochs: int) -> None:
    """Also when the last batch is not full and the share comes out above 1."""
    seen: list[Progress] = []
    tracker = Tracker(seen.append)
    tracker.epochs = epochs
    for stage in sorted(steps, key=list(Stage).index):
        tracker.start(stage)
        for share in sorted(steps[stage]):
            tracker.step(share)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)


def test_cancelled_anywhere_leaves_no_trace(
    backbone: Backbone, blank: ContinualModel, stream: list[Learned]
) -> None:
    """At every report of the learner in turn: the next task is as if nothing had been begun."""
    before = stream[0].model
    data, next_data = tiny.images(SECOND, 5), tiny.images(THIRD, 5)
    config = CONFIG.updated(epochs=2)
    expected = bytes_of(learn(before, backbone, next_data, "next", config))
    seen: list[Progress] = []
    learn(before, backbone, data, "given up", config, seen.append)
    stages = [progress.stage for progress in seen]
    # The first and the last report of every stage, and one in the middle of training.
    points = {stages.index(stage) for stage in stages}
    points |= {len(stages) - 1 - stages[::-1].index(stage) for stage in stages}
    points.add(len(stages) // 2)
    assert len(points) >= 6
    for point in sorted(points):
        countdown = itertools.count()

        def cancel(progress: Progress, point: int = point, countdown: Any = countdown) -> None:
            if next(countdown) == point:
                raise CancelledError("cancelled on request")

        with pytest.raises(CancelledError):
            learn(before, backbone, data, "given up", config, cancel)
        assert_untouched(backbone)
        assert bytes_of(learn(before, backbone, next_data, "next", config)) == expected


# -- schedules ----------------------------------------------------------------------------------


def test_the_cosine_falls_from_the_base_rate_towards_zero() -> None:
    config = CONFIG.updated(epochs=4)
    rates = [learning_rate_at(config, e, 4, (e + s / 10) / 4) for e in range(4) for s in range(10)]
    assert rates[0] == config.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01 * config.learning_rate


def test_the_published_schedule_lags_an_epoch() -> None:
    config = CONFIG.updated(schedule="published", epochs=20)
    rates = [learning_rate_at(config, epoch, 20, 0.5) for epoch in range(20)]
    assert rates[0] == rates[1] == config.learning_rate
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] > 0
    assert learning_rate_at(config, 0, 1, 0.5) == config.learning_rate


def test_the_step_falls_to_a_tenth_in_the_last_fifth() -> None:
    config = CONFIG.updated(schedule="step", epochs=5, learning_rate=1.0)
    assert [learning_rate_at(config, e, 5, 0.5) for e in range(5)] == [1, 1, 1, 1, 0.1]
    assert learning_rate_at(config, 0, 1, 0.5) == 1


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_head_may_have_a_learning_rate_of_its_own(
    backbone: Backbone, blank: ContinualModel, optimizer: str
) -> None:
    data = tiny.images(FIRST, 6)
    rates = {"optimizer": optimizer, "learning_rate": 1e-3}
    plain = learn(blank, backbone, data, **rates)
    assert (
        bytes_of(learn(blank, backbone, data, **rates, head_learning_rate=1e-3))[:-1]
        == (bytes_of(plain)[:-1])
    )
    other = learn(blank, backbone, data, head="trained", **rates, head_learning_rate=1e-30)
    untrained = random_head(tiny.WIDTH, len(FIRST), CONFIG.seed).weight.detach().numpy()
    assert np.allclose(other.model.head_weight, untrained, atol=1e-8)
    assert other.factors, "the expansions keep theirs"
    assert all(np.abs(factors.expansion).max() > 1e-6 for factors in other.factors.values())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_learns(backbone: Backbone, blank: ContinualModel, name: str) -> None:
    assert preset(name).preset == name
    learned = learn(blank, backbone, tiny.images(FIRST, 6), config=preset(name), epochs=1)
    assert_finite(learned)
    assert learned.factors


def test_an_initial_head_is_where_training_starts(
    backbone: Backbone, blank: ContinualModel
) -> None:
    data = tiny.images(FIRST, 6)
    head = nn.Linear(tiny.WIDTH, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    seen: list[float] = []

    def first_loss(progress: Progress) -> None:
        seen.append(progress.loss)

    config = CONFIG.updated(head="trained")
    learned = learn_task(blank, backbone, data, "task", config, Tracker(first_loss), head)
    assert next(loss for loss in seen if loss) == pytest.approx(np.log(2))
    trained: Tensor = head.weight.detach()
    assert np.array_equal(learned.model.head_weight, trained.numpy())


@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(1, 200))
def test_of_every_class_some_images_are_measured_first(labels: list[int], count: int) -> None:
    positions = np.array(labels)
    few = some_of_each(positions, count)
    assert len(set(few)) == len(few)
    assert sorted(few) == few.tolist()
    for label, number in Counter(labels).items():
        taken = int((positions[few] == label).sum())
        assert taken >= min(number, FEW_OF_A_CLASS)
        assert taken >= min(number, count * number // len(labels))
        assert taken <= max(FEW_OF_A_CLASS, count * number / len(labels) + 1)


def test_with_all_images_measured_first_nothing_is_left_out(
    backbone: Backbone, blank: ContinualModel
) -> None:
    data = tiny.images(FIRST, 30)
    whole = learn(blank, backbone, data, design_images=1000)
    some = learn(blank, backbone, data, design_images=20)
    assert bytes_of(learn(blank, backbone, data, design_images=46))[:-1] == bytes_of(whole)[:-1]
    assert bytes_of(some)[:-1] != bytes_of(whole)[:-1]
    tokens = {layer.tokens for layer in some.model.layers.values()}
    assert tokens == {layer.tokens for layer in whole.model.layers.values()}, "they stand for all"
    assert some.report.training_accuracy >= whole.report.training_accuracy - 0.1
