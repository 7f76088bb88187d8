"""The publish gate: what it makes of figures, and what of labels that mean nothing."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import stats

from inflora_core import canary, gate
from inflora_core.compute import Compute
from inflora_core.config import Gate, LearnConfig, Limits
from inflora_core.errors import DamagedError
from inflora_core.gate import Canaries
from inflora_core.heads import ClassStatistics, Discriminant, Examined, leave_one_out
from inflora_core.images import decode
from inflora_core.learner import learn_task
from inflora_core.model import (
    Array,
    ContinualModel,
    Evidence,
    GateCheck,
    HeldOut,
    LabelledImages,
    Learned,
    Likeness,
    TaskReport,
    Told,
)
from inflora_core.predictor import Predictor
from inflora_core.progress import Tracker
from inflora_core.spool import SpoolWriter
from inflora_core.store import ONNX_FILE, Store, initial_layer
from inflora_core.worker import Worker
from tests.core import tiny
from tests.core.test_store import LAYERS, REPORT, A, D, E, open_with_backbone
from tests.core.test_store import learned as learned_on

OFF = Gate(**dict.fromkeys(Gate.model_fields))
FOUND = TypeAdapter(tuple[GateCheck, ...])


def learned(**evidence: Any) -> Learned:
    """What a sound task comes to, with some evidence."""
    rng = np.random.default_rng(0)
    layers = {
        name: initial_layer(rng.normal(size=(3 * A, D)).astype(np.float32)) for name in LAYERS
    }
    sound = learned_on(ContinualModel.untaught(layers, E), "first", 1)
    return replace(sound, evidence=Evidence(**evidence))


def found(task: Learned, limits: Gate, canaries: Canaries | None = None) -> dict[str, GateCheck]:
    return {check.name: check for check in gate.checks(task, limits, canaries)}


def features_of(rng: np.random.Generator, classes: int, each: int, apart: float) -> Array:
    """Return features (classes * each, 6), class by class, whose means are so far apart."""
    means = rng.normal(size=(classes, 6)) * apart
    return np.repeat(means, each, 0) + rng.normal(size=(classes * each, 6))


def unseen(features: Array, positions: Array, known: int = 0) -> tuple[Array, Array]:
    """Return what leaving out says of images of new classes, beside ``known`` others."""
    size = features.shape[1]
    empty = ClassStatistics(np.zeros((0, size)), np.zeros(0, int), np.zeros((size, size)), 0)
    if known:
        rng = np.random.default_rng(known)
        old = rng.normal(size=(known, 1, size)) * 3 + rng.normal(size=(known, 20, size))
        empty = empty.with_images(old.reshape(-1, size), np.repeat(np.arange(known), 20), known)
    statistics = empty.with_images(features, positions + known, known + int(positions.max()) + 1)
    logits, _, kept = leave_one_out(statistics, features, positions + known)
    return logits, positions[kept] + known


# -- luck ------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.floats(0, 1))
def test_tails_are_those_of_the_binomial_distribution(trials: int, share: float) -> None:
    expected = stats.binom.sf(np.arange(trials + 1) - 1, trials, min(max(share, 1e-12), 1 - 1e-12))
    np.testing.assert_allclose(gate.binomial_tails(trials, share), expected, rtol=1e-6, atol=1e-12)


@given(st.integers(1, 500), st.floats(0, 0.99), st.sampled_from([0.25, 0.5]))
def test_what_is_asked_for_is_no_luck_and_within_reach(
    images: int, chance: float, typical: float
) -> None:
    told = Told(0, images, chance, typical)
    least = gate.least_right(told)
    assume(least is not None)
    assert least is not None
    assert stats.binom.sf(least - 1, images, chance) <= gate.LUCK * (1 + 1e-6)
    assert least == 0 or stats.binom.sf(least - 2, images, chance) > gate.LUCK * (1 - 1e-6)
    reached = stats.binom.sf(least - 1, images, chance + typical * (1 - chance))
    assert reached >= gate.POWER * (1 - 1e-6)


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.data())
def test_more_right_answers_are_never_worse(images: int, chance: float, data: Any) -> None:
    right = sorted(data.draw(st.lists(st.integers(0, images), min_size=2, max_size=2)))
    checks = [
        found(learned(untrained=Told(count, images, chance, gate.TYPICAL)), Gate())["accuracy"]
        for count in right
    ]
    assert checks[0].passed <= checks[1].passed
    assert (checks[0].value is None) == (checks[1].value is None)
    assert all(check.passed for check in checks if check.value is None)
    perfect = learned(untrained=Told(images, images, chance, gate.TYPICAL))
    assert found(perfect, Gate())["accuracy"].passed


@given(st.integers(2, 6), st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 99))
def test_answers_that_look_at_no_image_are_worth_nothing(
    classes: int, sizes: list[int], seed: int
) -> None:
    positions = np.repeat(np.arange(min(classes, len(sizes))), sizes[:classes])
    same = np.random.default_rng(seed).normal(size=classes) + np.zeros((len(positions), 1))
    told = gate.told(same, positions, np.arange(classes))
    assert told is not None
    assert gate.beyond_chance(told.right, told) == pytest.approx(0, abs=1e-9)
    right = gate.told(np.eye(classes)[positions], positions, np.arange(classes))
    assert right is not None
    assert gate.beyond_chance(right.right, right) == pytest.approx(1)


def test_one_class_alone_competes_with_all_that_are_known() -> None:
    logits = np.tile([0.0, 2.0, 1.0], (10, 1))
    told = gate.told(logits, np.ones(10, int), np.array([1]))
    assert told == Told(10, 10, 1 / 3, gate.TYPICAL_ALONE)
    assert gate.told(logits[:, :1], np.zeros(10, int), np.array([0])) is None
    assert gate.told(logits[:0], np.zeros(0, int), np.array([1])) is None
    # Of two classes, one has an image: there is nothing to tell it from.
    assert gate.told(logits, np.ones(10, int), np.array([1, 2])) is None


def test_labels_that_mean_nothing_pass_as_seldom_as_luck_has_it() -> None:
    rng, passed, measured = np.random.default_rng(0), 0, 0
    for _ in range(400):
        classes, each = rng.integers(3, 8), rng.integers(6, 30)
        positions = rng.permutation(np.repeat(np.arange(classes), each))
        answers = unseen(features_of(rng, classes, each, apart=1.0), positions)
        told = gate.told(*answers, np.arange(classes))
        check = found(learned(untrained=told), Gate())["accuracy"]
        measured += check.value is not None
        passed += check.value is not None and check.passed
    assert measured > 300
    assert passed <= 0.05 * measured


@pytest.mark.parametrize("known", [0, 5])
def test_labels_that_mean_something_pass(known: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        classes, each = rng.integers(3, 8), rng.integers(5, 30)
        positions = np.repeat(np.arange(classes), each)
        answers = unseen(features_of(rng, classes, each, apart=2.0), positions, known)
        told = gate.told(*answers, known + np.arange(classes))
        assert found(learned(untrained=told), Gate())["accuracy"].passed


def test_few_images_are_not_held_against_a_task() -> None:
    for right in range(11):
        check = found(learned(untrained=Told(right, 10, 0.5, gate.TYPICAL)), Gate())["accuracy"]
        assert (check.value, check.passed) == (None, True)
    assert "too few images" in check.message


def test_held_out_images_can_make_up_for_features_that_showed_nothing() -> None:
    nothing, much, little = (Told(right, 100, 0.1, 0.5) for right in (10, 60, 9))
    assert not found(learned(untrained=nothing), Gate())["accuracy"].passed
    both = found(learned(untrained=nothing, held_out=much), Gate())["accuracy"]
    assert both.passed
    assert "held-out" in both.message
    neither = found(learned(untrained=nothing, held_out=little), Gate())["accuracy"]
    assert not neither.passed
    assert neither.value == pytest.approx(0)


def test_what_was_trained_on_is_no_evidence() -> None:
    logits, positions = np.eye(3)[np.repeat(np.arange(3), 20)], np.repeat(np.arange(3), 20)
    nothing = np.zeros((0, 3)), np.zeros(0, int)
    for method in HeldOut:
        examined = Examined(method, logits, positions, np.zeros(60))
        evidence = gate.evidence(nothing, examined, np.arange(3), known=0)
        assert (evidence.held_out is not None) == (method is HeldOut.HELD_OUT)
        assert (evidence.untrained, evidence.likenesses) == (None, ())


# -- classes that look alike -----------------------------------------------------------------------


def test_a_repeated_class_is_named_with_the_one_that_it_repeats() -> None:
    rng = np.random.default_rng(2)
    features, positions = features_of(rng, 4, 40, apart=3.0), np.repeat(np.arange(4), 40)
    features[positions == 3] = features[positions == 1] + rng.normal(size=(40, 6)) * 0.01
    likenesses = list(gate.likenesses(*unseen(features, positions), range(4)))
    assert [(x.position, x.other) for x in likenesses if x.told < 0.6] == [(1, 3), (3, 1)]
    assert all(x.told > 0.9 for x in likenesses if x.position not in (1, 3))
    # Also where what it repeats is not looked at, being known.
    (alone,) = gate.likenesses(*unseen(features, positions), [3])
    assert alone.other == 1


def test_the_share_is_about_that_of_images_told_apart() -> None:
    rng = np.random.default_rng(3)
    features, positions = features_of(rng, 2, 400, apart=0.6), np.repeat(np.arange(2), 400)
    logits, _ = unseen(features, positions)
    for found_like in gate.likenesses(logits, positions, range(2)):
        own = logits[positions == found_like.position]
        counted = (own.argmax(1) == found_like.position).mean()
        assert found_like.told == pytest.approx(counted, abs=0.03)


def test_few_images_and_few_classes_are_like_nothing() -> None:
    logits, positions = np.eye(2)[np.arange(40) % 2], np.arange(40) % 2
    assert len(list(gate.likenesses(logits, positions, range(2)))) == 2
    assert not list(gate.likenesses(logits[:28], positions[:28], range(2)))
    assert not list(gate.likenesses(logits[:, :1], positions * 0, [0]))


def test_identical_answers_are_a_share_all_the_same() -> None:
    for margin, share in ((1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)):
        logits = np.tile([margin, 0.0], (20, 1))
        (only,) = gate.likenesses(logits, np.zeros(20, int), [0])
        assert only.told == pytest.approx(share)


def test_alike_classes_are_warned_of_and_only_held_back_if_asked() -> None:
    likenesses = tuple(Likeness(i % 2, 1 - i % 2, 0.3 + 0.05 * i) for i in range(8))
    task = learned(likenesses=likenesses)
    assert "distinct" not in found(task, Gate())
    check = found(task, Gate(distinct=0.3))["distinct"]
    assert (check.passed, check.value) == (True, 0.3)
    assert not found(task, Gate(distinct=0.31))["distinct"].passed
    assert found(learned(), Gate(distinct=0.9))["distinct"].value is None
    warnings = list(gate.warnings(task, Gate()))
    names = [repr(entry.label) for entry in task.model.classes]
    assert all(name in warnings[0] for name in names)
    assert "30%" in warnings[0]
    assert len(warnings) == gate.MOST_NAMED + 1
    assert "3 more" in warnings[-1]
    assert not list(gate.warnings(task, Gate(similar=None)))
    assert len(list(gate.warnings(task, Gate(similar=0.31)))) == 1


# -- as it is learned ------------------------------------------------------------------------------

CONFIG = LearnConfig(epochs=1, batch_size=16, rank=2)
LABELS = ("red", "green", "blue", "yellow")


class School:
    """Teaches a tiny ViT, each time from the beginning."""

    def __init__(self, folder: Path) -> None:
        self.backbone = tiny.make_backbone(folder)
        self.blank = tiny.untaught(self.backbone)

    def teach(
        self, data: LabelledImages, before: ContinualModel | None = None, **changes: Any
    ) -> Learned:
        config = CONFIG.updated(**changes)
        task = "second" if before else "first"
        return learn_task(before or self.blank, self.backbone, data, task, config, Tracker())


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School(tmp_path_factory.mktemp("school"))


def test_what_was_seen_before_training_does_not_depend_on_it(school: School) -> None:
    data = tiny.images(LABELS, 20)
    once, longer = school.teach(data), school.teach(data, epochs=5, learning_rate=0.01)
    assert once.evidence.untrained == longer.evidence.untrained
    assert once.evidence.likenesses == longer.evidence.likenesses
    told = once.evidence.untrained
    assert told is not None
    assert told.images == 4 * 18
    assert once.report.untrained_accuracy == told.right / told.images
    assert longer.evidence.held_out is not None
    assert longer.evidence.held_out.images == 4 * 2
    published = school.teach(data, head="trained")
    assert published.evidence.untrained == told


def test_shuffled_labels_are_found_and_real_ones_are_not(school: School) -> None:
    data = tiny.images(LABELS, 20)
    real = school.teach(data)
    assert not [check for check in gate.checks(real, Gate()) if not check.passed]
    data.labels = np.random.default_rng(0).permutation(data.labels)
    shuffled = school.teach(data)
    (failed,) = (check for check in gate.checks(shuffled, Gate()) if not check.passed)
    assert failed.name == "accuracy"
    assert "chance" in failed.message


def test_one_class_alone_is_no_evidence_before_there_are_others(school: School) -> None:
    first = school.teach(tiny.images(["red"], 20))
    assert first.evidence == Evidence()
    assert first.report.untrained_accuracy == 1.0
    second = school.teach(tiny.images(["blue"], 40), first.model)
    told = second.evidence.untrained
    assert told is not None
    assert (told.images, told.chance) == (36, 0.5)


@pytest.fixture(scope="module")
def store_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one version, which knows LABELS."""
    folder = tmp_path_factory.mktemp("four")
    worker = Worker(Store.open(folder / "store"), Compute(), 1)
    worker.prepare(str(tiny.write_backbone(folder)), None)
    worker.learn("old", tiny.write_spool(folder / "old", LABELS, 20), CONFIG, None, Tracker())
    return folder / "store"


@pytest.fixture
def store(store_of_four: Path, tmp_path: Path) -> Store:
    return Store.open(shutil.copytree(store_of_four, tmp_path / "store"))


def test_the_worker_makes_a_candidate_of_what_is_held_back(store: Store, tmp_path: Path) -> None:
    worker = Worker(store, Compute(), 1)
    assert not store.version(1).candidate
    with SpoolWriter(tmp_path / "mixed up") as mixed_up:
        order = np.random.default_rng(0).permutation(80)
        for place, number in enumerate(order.tolist()):
            image = tiny.png(("cyan", "magenta")[number % 2], number)
            mixed_up.add(image, ("cyan", "magenta")[place % 2])
        mixed_up.finish()
    assert worker.learn("bad", mixed_up.folder, CONFIG, 1, Tracker()) == 2
    candidate = store.verify(2)
    assert candidate.candidate
    assert candidate.report is not None
    assert [check.name for check in candidate.report.failed_checks] == ["accuracy"]
    # The next one builds on what is current, although the worker has the candidate at hand.
    assert worker.learn("again", mixed_up.folder, CONFIG, 1, Tracker(), OFF) == 3
    assert (store.version(3).parent, store.version(3).candidate) == (1, False)
    assert [entry.task for entry in store.version(3).classes[4:]] == ["again", "again"]


# -- the rest --------------------------------------------------------------------------------------


def arrays_of(value: Any) -> list[Array]:
    """Return the arrays of floats in a tree of dataclasses and dicts."""
    if isinstance(value, np.ndarray):
        return [value] if value.dtype.kind == "f" else []
    if isinstance(value, dict):
        return [array for part in value.values() for array in arrays_of(part)]
    if is_dataclass(value):
        return [a for field in fields(value) for a in arrays_of(getattr(value, field.name))]
    return []


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(poison: float) -> None:
    sound = learned()
    assert found(sound, Gate())["not_finite"].value == 0
    model = sound.model
    answers = (
        *(model.head_weight, model.head_bias, model.class_means, model.class_scatter),
        *arrays_of(model.novelty),
        *arrays_of(sound.factors),
    )
    assert len(answers) == 8 + 2 * len(sound.factors)
    for array in answers:
        spared, array.flat[-1] = array.flat[-1], poison
        check = found(sound, Gate())["not_finite"]
        array.flat[-1] = spared
        assert (check.value, check.limit, check.passed) == (1, 0, False)


def with_layer(task: Learned, **changes: float) -> Learned:
    layer = replace(REPORT.layers[0], **changes)
    return replace(task, report=replace(REPORT, layers=(*REPORT.layers, layer)))


@pytest.mark.parametrize("name", ["leak", "interference"])
@given(value=st.floats(0, 1), limit=st.floats(0, 1))
def test_the_largest_of_all_layers_counts(name: str, value: float, limit: float) -> None:
    largest = max(value, getattr(REPORT, name))
    check = found(with_layer(learned(), **{name: value}), Gate(**{name: limit}))[name]
    assert (check.value, check.limit, check.passed) == (largest, limit, largest <= limit)


def test_what_is_not_a_number_passes_nothing() -> None:
    for name in ("leak", "interference"):
        task = replace(learned(), report=replace(REPORT, layers=()))
        task = with_layer(task, **{name: math.nan})
        task = replace(task, report=replace(task.report, layers=task.report.layers[-1:]))
        assert not found(task, Gate())[name].passed


def test_canary_images_take_the_place_of_interference() -> None:
    bad, limits = with_layer(learned(), interference=0.9), Gate(canary=0.1)
    without = found(bad, limits)
    assert (without["canary"].value, without["canary"].passed) == (None, True)
    assert not without["interference"].passed
    few = found(bad, limits, Canaries(gate.FEWEST_CANARIES - 1, 0.8, 0.8))
    assert few["canary"].value is None
    assert not few["interference"].passed
    enough = found(bad, limits, Canaries(gate.FEWEST_CANARIES, 0.8, 0.75))
    assert "interference" not in enough
    assert enough["canary"].passed
    assert enough["canary"].value == pytest.approx(0.05)
    worse = found(bad, limits, Canaries(100, 0.8, 0.6))
    assert [name for name, check in worse.items() if not check.passed] == ["canary"]
    assert not found(bad, Gate(canary=None), Canaries(100, 0.8, 0.8))["interference"].passed


def test_every_check_can_be_switched_off() -> None:
    nothing = Told(0, 100, 0.1, 0.5)
    task = learned(untrained=nothing, likenesses=(Likeness(0, 1, 0.1),))
    task = with_layer(task, leak=1.0, interference=1.0)
    task.model.head_bias[0] = np.nan
    everything = Gate(distinct=0.5, leak=0.5, interference=0.5)
    failed = {name for name, check in found(task, everything).items() if not check.passed}
    assert failed == {"not_finite", "leak", "accuracy", "distinct", "interference"}
    assert gate.checks(task, OFF) == ()
    assert not list(gate.warnings(task, OFF))
    for name in failed:
        left = found(task, everything.model_copy(update={name: None}))
        assert {x for x, check in left.items() if not check.passed} == failed - {name}


def test_checks_are_kept_as_they_are_and_lose_names_with_the_report() -> None:
    task = learned(likenesses=(Likeness(0, 1, 0.1),))
    checks = gate.checks(task, Gate(distinct=0.5))
    assert FOUND.validate_json(FOUND.dump_json(checks)) == checks
    label = task.model.classes[0].label
    report: TaskReport = replace(REPORT, checks=checks)
    assert [check.name for check in report.failed_checks] == ["distinct"]
    assert label in gate.why_held_back(report.failed_checks)
    shown = report.without_classes([label])
    assert label not in repr(shown)
    assert [(c.name, c.value, c.passed) for c in shown.checks] == [
        (c.name, c.value, c.passed) for c in checks
    ]


def test_leaving_out_is_what_chance_is_measured_with() -> None:
    """Without it, labels that mean nothing would look as if they did."""
    rng = np.random.default_rng(5)
    positions = rng.permutation(np.repeat(np.arange(5), 8))
    size = 24
    features = rng.normal(size=(40, size))
    empty = ClassStatistics(np.zeros((0, size)), np.zeros(0, int), np.zeros((size, size)), 0)
    seen = Discriminant.of(empty.with_images(features, positions, 5)).logits(features)
    flattered, honest = (
        gate.told(*answers, np.arange(5))
        for answers in ((seen, positions), unseen(features, positions))
    )
    assert flattered is not None
    assert honest is not None
    assert found(learned(untrained=flattered), Gate())["accuracy"].passed
    assert not found(learned(untrained=honest), Gate())["accuracy"].passed


# -- canary images ---------------------------------------------------------------------------------


def test_canary_images_are_kept_as_they_are(tmp_path: Path) -> None:
    assert canary.read(tmp_path, "task.0") == []
    assert canary.keys(tmp_path) == frozenset()
    images = [b"one", b"", b"three" * 1000]
    canary.keep(tmp_path, "task.0", images)
    canary.keep(tmp_path, "task.0", [b"later ones"])
    canary.keep(tmp_path, "task.1", [b"other"])
    assert canary.read(tmp_path, "task.0") == images
    assert canary.keys(tmp_path) == {"task.0", "task.1"}
    canary.forget(tmp_path, ["task.0", "task.7"])
    canary.forget(tmp_path, ["task.0"])
    assert canary.keys(tmp_path) == {"task.1"}


def test_a_key_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    canary.keep(tmp_path, "task.0", [b"one"])
    canary.forget(tmp_path, ["../versions", "..", "."])
    assert (tmp_path / "versions").exists()
    assert canary.keys(tmp_path) == {"task.0"}


@settings(deadline=None)  # it waits for the disk
@given(st.data())
def test_damage_to_canary_images_is_noticed(data: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        canary.keep(store, "task.0", [b"some image", b"another"])
        path = data.draw(st.sampled_from(sorted((store / "canary" / "task.0").iterdir())))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            assert canary.read(store, "task.0") == [b"some image", b"another"]
        except DamagedError:
            path.unlink()
            with pytest.raises(DamagedError):
                canary.read(store, "task.0")


def test_the_worker_measures_what_old_classes_lose(store: Store, tmp_path: Path) -> None:
    worker = Worker(store, Compute(), 1)
    old = store.version(1).classes
    for entry in old[:3]:
        canary.keep(store.root, entry.key, [tiny.png(entry.label, 50 + i) for i in range(9)])
    spool = tiny.write_spool(tmp_path / "new", ("cyan", "magenta"), 20)
    worker.learn("sound", spool, CONFIG, 1, Tracker())
    report = store.version(2).report
    assert report is not None
    (check,) = (check for check in report.checks if check.name == "canary")
    images = [decode(tiny.png(label, 50 + i), Limits()) for label in LABELS[:3] for i in range(9)]
    before, after = (
        np.mean(
            Predictor.load(store.path(number, ONNX_FILE)).predict(images).logits.argmax(1)
            == np.repeat(np.arange(3), 9)
        )
        for number in (1, 2)
    )
    assert check.value == pytest.approx(before - after)
    assert "27 images" in check.message
    assert "interference" not in {check.name for check in report.checks}
    # Images that are damaged are not measured with; too few are no measure.
    next((store.root / "canary" / old[0].key).glob("0*")).write_bytes(b"damaged")
    worker.learn("again", spool, CONFIG, 1, Tracker())
    report = store.version(3).report
    assert report is not None
    (check,) = (check for check in report.checks if check.name == "canary")
    assert (check.value, check.passed) == (None, True)


def test_canary_images_that_show_a_loss_hold_a_version_back(store: Store, tmp_path: Path) -> None:
    worker = Worker(store, Compute(), 1)
    images = [tiny.png("red", 50 + i) for i in range(30)]
    canary.keep(store.root, store.version(1).classes[0].key, images)
    with SpoolWriter(tmp_path / "stolen") as stolen:  # a known class under another name
        for number in range(60):
            stolen.add(tiny.png("red", number), "scarlet")
            stolen.add(tiny.png("cyan", number), "cyan")
        stolen.finish()
    assert worker.learn("bad", stolen.folder, CONFIG, 1, Tracker()) == 2
    report = store.version(2).report
    assert report is not None
    (failed,) = report.failed_checks
    assert failed.name == "canary"
    assert failed.value is not None
    assert failed.value > 0.1
    assert any("'scarlet' is hard to tell from 'red'" in warning for warning in report.warnings)


def test_images_of_classes_that_are_gone_are_cleared(tmp_path: Path) -> None:
    store = open_with_backbone(tmp_path / "store")
    blank = store.initial_model(store.backbone())
    for task in ("first", "second"):
        store.publish(learned_on(blank, task, 1), task, b"onnx")
    for key in ("first.0", "first.1", "second.0", "third.0", ".draft.half"):
        canary.keep(store.root, key, [b"image"])
    store.forget(["first.1"])
    assert canary.keys(store.root) == {"first.0", "second.0", "third.0", ".draft.half"}
    # As long as a manifest is damaged, nobody knows whose images these are.
    manifest = store.path(2, ONNX_FILE).with_name("manifest.json")
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-1])
    store.clear_canaries()
    assert canary.keys(store.root) == {"first.0", "second.0", "third.0"}
    manifest.write_bytes(content)
    store.clear_canaries()
    assert canary.keys(store.root) == {"first.0", "second.0"}
    store.clear_canaries(all_of_them=True)
    assert canary.keys(store.root) == frozenset()
