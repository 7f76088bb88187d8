"""Edits of the class table: what goes, what stays to the bit, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_core import edits
from inflora_core.edits import MAX_ALIASES, MAX_FORGOTTEN, apply, keys_to_forget, updated
from inflora_core.errors import (
    ConflictError,
    InfloraError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    StateError,
)
from inflora_core.heads import ClassStatistics, Discriminant, answering, novelty_of
from inflora_core.model import (
    ClassEntry,
    ClassUpdate,
    ContinualModel,
    Forget,
    new_classes,
    position_of,
)
from tests.core import tiny

E = 4
NAMES = [f"name {i}" for i in range(8)]


def forgotten(model: ContinualModel, labels: list[str]) -> ContinualModel:
    return apply(model, Forget(tuple(labels))).model


def model_of(classes: tuple[ClassEntry, ...], seed: int = 0) -> ContinualModel:
    rng = np.random.default_rng(seed)
    n = len(classes)
    return replace(
        ContinualModel.untaught({}, E),
        head_weight=rng.normal(size=(n, E)).astype(np.float32),
        head_bias=rng.normal(size=n).astype(np.float32),
        class_means=rng.normal(size=(n, E)).astype(np.float32),
        class_counts=rng.integers(1, 99, n),
        class_scatter=np.cov(rng.normal(size=(E, 3 * E))).astype(np.float32),
        novelty=tiny.novelty(n, E),
        classes=classes,
        tasks=3,
        version=7,
    )


@st.composite
def tables(draw: st.DrawFn) -> tuple[ClassEntry, ...]:
    """Class tables of 1 to 4 classes, which share the names out among them."""
    names = draw(st.permutations(NAMES))
    entries, at = [], 0
    for i in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 2))
        label, *aliases = names[at : at + count]
        entries.append(ClassEntry(label, f"t{i // 2}", f"t{i // 2}.{i % 2}", tuple(aliases)))
        at += count
    return tuple(entries)


def owners(classes: tuple[ClassEntry, ...]) -> dict[str, str]:
    """Return the key that each name means; no name means two."""
    pairs = [(name, entry.key) for entry in classes for name in entry.names]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


# -- forgetting ---------------------------------------------------------------------------------


@given(table=tables(), labels=st.lists(st.sampled_from(NAMES), min_size=1), seed=st.integers(0, 99))
def test_what_is_forgotten_goes_and_trained_heads_stay_to_the_bit(
    table: tuple[ClassEntry, ...], labels: list[str], seed: int
) -> None:
    before = model_of(table, seed)
    known = owners(table)
    unknown = [i for i, label in enumerate(labels) if label not in known]
    gone = {known[label] for label in labels if label in known}
    if unknown or len(gone) == len(table):
        with pytest.raises(InfloraError) as caught:
            forgotten(before, labels)
        kind, field = (
            (NotFoundError, f"labels[{unknown[0]}]") if unknown else (StateError, "labels")
        )
        assert (type(caught.value), caught.value.field) == (kind, field)
        return
    after = forgotten(before, labels)
    left = [i for i, entry in enumerate(table) if entry.key not in gone]
    assert after.classes == tuple(table[i] for i in left)
    for name in ("head_weight", "head_bias", "class_means", "class_counts"):
        assert np.array_equal(getattr(after, name), getattr(before, name)[left]), name
    made = ClassStatistics.of(after)
    expected = novelty_of(made, Discriminant.of(made))
    for name in ("weight", "bias", "whitening", "offset"):
        np.testing.assert_array_equal(getattr(after.novelty, name), getattr(expected, name))
    assert np.array_equal(after.class_scatter, before.class_scatter)
    assert after.layers is before.layers
    assert (after.tasks, after.version) == (before.tasks, before.version)
    assert before.classes == table
    assert forgotten(before, [*labels, *labels]).classes == after.classes, "twice counts once"


@given(st.integers(0, 2**31), st.integers(3, 6))
def test_nothing_that_is_left_depends_on_what_was_forgotten(seed: int, count: int) -> None:
    """Two classes that are forgotten, with equal scatter: whichever it was, the same is left.

    Rows that stay as they are would tell: they are made around the mean of all means.
    """
    table = new_classes([f"class {i}" for i in range(count)], "t")
    one = replace(model_of(table, seed), class_freedom=50)
    means = one.class_means.copy()
    means[-1] += np.random.default_rng(seed).normal(size=E)
    two = replace(one, class_means=means)
    answers = [
        answering(model, ClassStatistics.of(model), model.calibration) for model in (one, two)
    ]
    left = [forgotten(model, ["class 0", f"class {count - 1}"]) for model in answers]
    for name in ("head_weight", "head_bias", "class_means", "class_counts"):
        assert np.array_equal(*(getattr(model, name) for model in left)), name
    for name in ("weight", "bias", "whitening", "offset"):
        assert np.array_equal(*(getattr(model.novelty, name) for model in left)), name
    assert left[0].head_weight.shape == (count - 2, E)


def test_a_class_that_only_other_versions_know_is_forgotten_with_it() -> None:
    current = new_classes(["cat", "dog"], "now")
    renamed = (replace(current[0], label="feline"), current[1])
    other = new_classes(["cat", "cow"], "then")
    assert keys_to_forget(current, ["cat"], [current, other]) == {"now.0", "then.0"}
    assert keys_to_forget(current, ["cow"], [current, other]) == {"then.1"}
    # What is known by another name now is not what is meant.
    assert keys_to_forget(renamed, ["cat"], [current, other]) == {"then.0"}
    with pytest.raises(NotFoundError):
        keys_to_forget(renamed, ["cat"], [current])
    with pytest.raises(StateError):
        keys_to_forget((), ["cow"], [other])
    edited = apply(model_of(renamed), Forget(("cow", "feline")), [current, other])
    assert edited.forgets == ("now.0", "then.1")
    assert [entry.label for entry in edited.model.classes] == ["dog"]


def test_keys_that_are_not_known_do_no_harm() -> None:
    model = model_of(new_classes("ab", "t"))
    assert edits.without(model, {"other.0"}) is model
    assert edits.without(model, {"t.0", "t.1"}).head_weight.shape == (0, E)


def test_what_is_asked_for_at_once_is_limited() -> None:
    """Before any name is looked at: nothing else is accepted while an edit is checked."""
    many = tuple(f"name {i}" for i in range(MAX_FORGOTTEN + 1))
    for edit, field in (
        (Forget(many), "labels"),
        (ClassUpdate("a", None, many), "add_aliases"),
        (ClassUpdate("a", None, (), many), "remove_aliases"),
    ):
        with pytest.raises(LimitExceededError) as caught:
            edits.check_form(edit)
        assert caught.value.field == field


# -- names --------------------------------------------------------------------------------------


@given(
    table=tables(),
    label=st.sampled_from(NAMES),
    new_label=st.none() | st.sampled_from(NAMES),
    add=st.lists(st.sampled_from(NAMES), max_size=2),
    remove=st.lists(st.sampled_from(NAMES), max_size=2),
)
def test_a_change_of_names_changes_just_these(
    table: tuple[ClassEntry, ...],
    label: str,
    new_label: str | None,
    add: list[str],
    remove: list[str],
) -> None:
    change = ClassUpdate(label, new_label, tuple(add), tuple(remove))
    before = model_of(table)
    expected = outcome(table, change)
    if not isinstance(expected, list):
        with pytest.raises(expected[0]) as caught:
            apply(before, change)
        assert (type(caught.value), caught.value.field) == expected
        return
    after = apply(before, change).model
    at = position_of(before.classes, label)
    assert at is not None
    assert [*after.classes[at].names] == expected
    assert after.classes[:at] + after.classes[at + 1 :] == table[:at] + table[at + 1 :]
    assert (after.classes[at].key, after.classes[at].task) == (table[at].key, table[at].task)
    assert owners(after.classes).items() >= dict.fromkeys(expected, table[at].key).items()
    assert after.head_weight is before.head_weight
    assert all(position_of(after.classes, name) == at for name in expected)


def outcome(
    table: tuple[ClassEntry, ...], change: ClassUpdate
) -> list[str] | tuple[type[InfloraError], str]:
    """Return what the class is called then, or which error it is."""
    if change.new_label is None and not change.add_aliases and not change.remove_aliases:
        return InvalidInputError, "new_label"
    taken = owners(table)
    if change.label not in taken:
        return NotFoundError, "label"
    key = taken[change.label]
    (entry,) = (entry for entry in table if entry.key == key)
    label, aliases = entry.label, [*entry.aliases]
    if change.new_label is not None:
        if change.new_label == label or taken.get(change.new_label, key) != key:
            return ConflictError, "new_label"
        label = change.new_label
        aliases = [alias for alias in aliases if alias != label]
    for i, alias in enumerate(change.remove_aliases):
        if alias not in aliases:
            return NotFoundError, f"remove_aliases[{i}]"
        aliases.remove(alias)
    for i, alias in enumerate(change.add_aliases):
        if alias in (label, *aliases) or taken.get(alias, key) != key:
            return ConflictError, f"add_aliases[{i}]"
        aliases.append(alias)
    return [label, *aliases]


def test_the_old_label_can_become_an_alias_and_an_alias_the_label() -> None:
    table = new_classes(["cat", "dog"], "t")
    renamed = updated(table, ClassUpdate("cat", "feline", add_aliases=("cat",)))
    assert [entry.names for entry in renamed] == [("feline", "cat"), ("dog",)]
    back = updated(renamed, ClassUpdate("cat", "cat"))
    assert [entry.names for entry in back] == [("cat",), ("dog",)]


TABLE = (
    ClassEntry("cat", "t", "t.0", ("kitty",)),
    ClassEntry("dog", "t", "t.1", tuple(f"dog {i}" for i in range(MAX_ALIASES))),
)
REFUSED: dict[str, tuple[Any, type[InfloraError], str, str]] = {
    "no label": (Forget(()), InvalidInputError, "labels", "which"),
    "no possible label": (Forget(("cat", " ")), InvalidInputError, "labels[1]", "white space"),
    "no such class": (Forget(("cat", "cow")), NotFoundError, "labels[1]", "'cow'"),
    "all classes": (Forget(("kitty", "dog")), StateError, "labels", "no class would be left"),
    "no class to update": (ClassUpdate("cow", "ox"), NotFoundError, "label", "'cow'"),
    "an impossible one": (ClassUpdate("", "ox"), InvalidInputError, "label", "empty"),
    "no change": (ClassUpdate("cat"), InvalidInputError, "new_label", "nothing"),
    "an impossible name": (ClassUpdate("cat", "a\0"), InvalidInputError, "new_label", "control"),
    "its own name": (ClassUpdate("kitty", "cat"), ConflictError, "new_label", "already"),
    "another's name": (ClassUpdate("cat", "dog"), ConflictError, "new_label", "another class"),
    "another's alias": (ClassUpdate("cat", "dog 7"), ConflictError, "new_label", "class 'dog'"),
    "an alias twice": (
        ClassUpdate("cat", add_aliases=("puss", "kitty")),
        ConflictError,
        "add_aliases[1]",
        "already",
    ),
    "another's name as alias": (
        ClassUpdate("cat", add_aliases=("dog",)),
        ConflictError,
        "add_aliases[0]",
        "another class",
    ),
    "an impossible alias": (
        ClassUpdate("cat", add_aliases=("x" * 201,)),
        InvalidInputError,
        "add_aliases[0]",
        "201",
    ),
    "no such alias": (
        ClassUpdate("cat", remove_aliases=("kitty", "puss")),
        NotFoundError,
        "remove_aliases[1]",
        "'puss'",
    ),
    "the label is no alias": (
        ClassUpdate("cat", remove_aliases=("cat",)),
        NotFoundError,
        "remove_aliases[0]",
        "no alias",
    ),
    "too many aliases": (
        ClassUpdate("dog", add_aliases=("hound",)),
        LimitExceededError,
        "add_aliases",
        "100",
    ),
}


@pytest.mark.parametrize(("edit", "kind", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(edit: Any, kind: type[InfloraError], field: str, message: str) -> None:
    """By ``apply``, and by ``check``, which needs no arrays."""
    for call in (lambda: apply(model_of(TABLE), edit), lambda: edits.check(TABLE, edit)):
        with pytest.raises(kind, match=message) as caught:
            call()
        assert (type(caught.value), caught.value.field) == (kind, field)


def test_keys_tell_classes_apart_whatever_they_are_called() -> None:
    first, second = new_classes("ab", "task-1"), new_classes("ab", "task-2")
    assert len({entry.key for entry in first + second}) == 4
    named = new_classes(["Müller"], "task-1")
    assert "Müller" not in named[0].key
