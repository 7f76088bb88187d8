"""Changing the class table without any learning: forgetting, renaming, aliases. Only numpy.

What a class is, is its key; what it is called can change. Everything here that names a class takes
its label or an alias.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from inflora_core.errors import (
    ConflictError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    StateError,
)
from inflora_core.heads import ClassStatistics, answering, answers_from_statistics
from inflora_core.labels import check_label
from inflora_core.model import (
    ClassEntry,
    ClassUpdate,
    ContinualModel,
    Edit,
    Forget,
    position_of,
)

MAX_ALIASES = 100
"""Of one class: the class table is in every manifest."""

MAX_FORGOTTEN = 1000
"""Names in one edit: what is asked for is checked while nothing else is accepted."""

_ROWS = ("head_weight", "head_bias", "class_means", "class_counts")
"""What ``ContinualModel`` holds one row of for each class."""

Classes = Sequence[ClassEntry]


@dataclass(frozen=True)
class Edited:
    """What an edit makes of a model.

    Attributes:
        model: The model with its new class table; K and V weights and memory are as they were.
        forgets: Keys of the classes that are not to be known again.
    """

    model: ContinualModel
    forgets: tuple[str, ...] = ()


def apply(model: ContinualModel, edit: Edit, others: Iterable[Classes] = ()) -> Edited:
    """Return what ``edit`` makes of ``model``, which stays as it is.

    Args:
        model: The current version's state.
        edit: What to change.
        others: Class tables of other versions; see ``keys_to_forget``.

    Raises:
        InfloraError: as ``keys_to_forget`` and ``updated`` do.
    """
    if isinstance(edit, ClassUpdate):
        return Edited(replace(model, classes=updated(model.classes, edit)))
    keys = keys_to_forget(model.classes, edit.labels, others)
    return Edited(without(model, keys), tuple(sorted(keys)))


def check_form(edit: Edit) -> None:
    """Raise ``InvalidInputError`` or ``LimitExceededError`` if no model could be edited so."""
    if isinstance(edit, Forget):
        if not edit.labels:
            raise InvalidInputError("say which classes to forget", field="labels")
        if len(edit.labels) > MAX_FORGOTTEN:
            raise LimitExceededError(
                f"at most {MAX_FORGOTTEN} classes are forgotten at once", field="labels"
            )
        _check_labels(edit.labels, "labels")
        return
    check_label(edit.label, field="label")
    if edit.new_label is not None:
        check_label(edit.new_label, field="new_label")
    elif not edit.add_aliases and not edit.remove_aliases:
        raise InvalidInputError(
            "nothing is to change: give a new label, or aliases to add or to remove",
            field="new_label",
        )
    for field in ("add_aliases", "remove_aliases"):
        aliases = getattr(edit, field)
        if len(aliases) > MAX_ALIASES:
            raise LimitExceededError(f"a class has at most {MAX_ALIASES} aliases", field=field)
        _check_labels(aliases, field)


def check(classes: Classes, edit: Edit, others: Iterable[Classes] = ()) -> None:
    """Raise what ``apply`` would raise for a model with these classes."""
    if isinstance(edit, Forget):
        keys_to_forget(classes, edit.labels, others)
    else:
        updated(classes, edit)


def without(model: ContinualModel, keys: Collection[str]) -> ContinualModel:
    """Return ``model`` without the classes of these keys; keys it does not know do no harm.

    Their rows of the statistics go, and what answers is made anew from what is left. Rows that stay
    as they are would give them away: those of other classes, and the offset of novelty, are made
    around the mean of all means, and with all others known that is as good as the one that went.
    Heads as they were trained know nothing of other tasks' classes, and stay to the bit.
    """
    kept = [i for i, entry in enumerate(model.classes) if entry.key not in keys]
    if len(kept) == len(model.classes):
        return model
    rows = np.array(kept, np.intp)
    left = replace(
        model,
        classes=tuple(model.classes[i] for i in kept),
        **{name: getattr(model, name)[rows] for name in _ROWS},
    )
    if not kept:
        # Nothing is left to make anything of.
        novelty = model.novelty
        return replace(
            left, novelty=replace(novelty, weight=novelty.weight[rows], bias=novelty.bias[rows])
        )
    trained = None if answers_from_statistics(model) else (left.head_weight, left.head_bias)
    return answering(left, ClassStatistics.of(left), left.calibration, trained)


def keys_to_forget(
    classes: Classes, labels: Sequence[str], others: Iterable[Classes] = ()
) -> frozenset[str]:
    """Return the keys of all classes that are called one of ``labels``.

    Args:
        classes: The current version's.
        labels: Labels or aliases; one that is given twice counts once.
        others: Class tables of other versions. A class that only they know goes, too, or it would
            be back once one of them is promoted. What the current version knows by another name
            is not what is meant.

    Raises:
        InvalidInputError: there is no label, or one that no class can have.
        NotFoundError: no class has the label.
        StateError: no class would be left in the current version.
    """
    check_form(Forget(tuple(labels)))
    current = {entry.key for entry in classes}
    named: dict[str, set[str]] = {}
    for table in (classes, *others):
        for entry in table:
            if table is classes or entry.key not in current:
                for name in entry.names:
                    named.setdefault(name, set()).add(entry.key)
    keys: set[str] = set()
    for number, label in enumerate(labels):
        if label not in named:
            raise NotFoundError(f"there is no class {label!a}", field=f"labels[{number}]")
        keys |= named[label]
    if current <= keys:  # also where there is no version yet, and candidates alone know it
        raise StateError(
            "no class would be left, and a version needs one: teach another one first",
            field="labels",
        )
    return frozenset(keys)


def updated(classes: Classes, change: ClassUpdate) -> tuple[ClassEntry, ...]:
    """Return the class table after ``change``.

    The new label comes first, then aliases are removed, then added: the old label can become an
    alias in the same step. An alias that becomes the label is no alias any more.

    Raises:
        InvalidInputError: nothing would change, or a name is none that a class can have.
        NotFoundError: there is no such class, or it has no such alias.
        ConflictError: a name means a class already.
        LimitExceededError: the class would have too many aliases.
    """
    check_form(change)
    at = position_of(classes, change.label)
    if at is None:
        raise NotFoundError(f"there is no class {change.label!a}", field="label")
    label, aliases = classes[at].label, list(classes[at].aliases)
    others = [entry for i, entry in enumerate(classes) if i != at]
    if change.new_label is not None:
        _check_free(change.new_label, others, [label], "new_label")
        label = change.new_label
        aliases = [alias for alias in aliases if alias != label]
    for number, alias in enumerate(change.remove_aliases):
        if alias not in aliases:
            raise NotFoundError(
                f"class {label!a} has no alias {alias!a}", field=f"remove_aliases[{number}]"
            )
        aliases.remove(alias)
    for number, alias in enumerate(change.add_aliases):
        _check_free(alias, others, [label, *aliases], f"add_aliases[{number}]")
        aliases.append(alias)
    if len(aliases) > MAX_ALIASES:
        raise LimitExceededError(f"a class has at most {MAX_ALIASES} aliases", field="add_aliases")
    entry = replace(classes[at], label=label, aliases=tuple(aliases))
    return (*classes[:at], entry, *classes[at + 1 :])


def _check_labels(labels: Sequence[str], field: str) -> None:
    for number, label in enumerate(labels):
        check_label(label, field=f"{field}[{number}]")


def _check_free(name: str, others: Classes, own: Collection[str], field: str) -> None:
    """Refuse a name that means a class already."""
    if name in own:
        raise ConflictError(f"the class is called {name!a} already", field=field)
    taken = position_of(others, name)
    if taken is not None:
        owner = others[taken].label
        what = "another class" if owner == name else f"class {owner!a}"
        raise ConflictError(f"{name!a} means {what} already", field=field)
