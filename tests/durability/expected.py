"""What a server should say after any history of requests, deaths and restarts: a plain model.

It knows nothing of files, processes or numpy, and shares no code with the product. A class is where
its colour is, and an image is of the class that is nearest to it. What the documentation says a
server does is done here at once, and in full; only a worker that is held somewhere stops it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

MARK = "[forgotten]"
BLACK = (0, 0, 0)
"""What the publish gate holds back."""

Colour = tuple[int, int, int]

LEARNING = (
    *("DECODING", "DESIGNING", "TRAINING", "EXTENDING", "MERGING"),
    *("EXPORTING", "CHECKING", "PUBLISHING", "LEARNED"),
)
EDITING = LEARNING[5:]
"""Where a worker comes by, with a task that learns and with one that edits. At the last one its
version is durable, and the server does not know yet."""

Key = tuple[int, int]
"""Of a class: its task, and the how manieth new class it was there."""


class RefusedError(Exception):
    """The server has to refuse this; ``reason`` is that of its error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Class:
    """A class that a version knows."""

    key: Key
    label: str
    colour: Colour
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.aliases)


Table = tuple[Class, ...]


@dataclass(frozen=True)
class Teach:
    """One image of each class."""

    colours: tuple[tuple[str, Colour], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label for label, _ in self.colours)


@dataclass(frozen=True)
class Forget:
    labels: tuple[str, ...]
    purge: bool

    @property
    def names(self) -> tuple[str, ...]:
        return self.labels


@dataclass(frozen=True)
class Update:
    label: str
    new_label: str | None
    add: tuple[str, ...]
    remove: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *filter(None, [self.new_label]), *self.add, *self.remove)


Request = Teach | Forget | Update


@dataclass
class Task:
    """A task that was acknowledged.

    Attributes:
        number: From 0, in the order of arrival.
        request: What was asked for.
        labels: Its classes, as its record shows them.
        erased: Whether its record lost names of an edit, and with them what it can be compared by.
        withheld: Names that its record loses, unless a version comes of it.
        crashes: How many workers died of it in a row, none having come further.
        furthest: The epoch that any of them was in.
        id: What the server calls it.
    """

    number: int
    request: Request
    labels: tuple[str, ...]
    state: str = "QUEUED"
    version: int | None = None
    reason: str = ""
    erased: bool = False
    withheld: frozenset[str] = frozenset()
    crashes: int = 0
    furthest: int = 0
    id: str = ""

    @property
    def ended(self) -> bool:
        return self.state not in ("QUEUED", "LEARNING")

    @property
    def has_examples(self) -> bool:
        """Whether the server still needs its images."""
        waits = not self.ended or (self.state == "SET_ASIDE" and MARK not in self.labels)
        return isinstance(self.request, Teach) and waits

    @property
    def points(self) -> tuple[str, ...]:
        return LEARNING if isinstance(self.request, Teach) else EDITING

    def lose(self, names: Iterable[str]) -> None:
        """Take names of purged classes out of the record."""
        gone = set(names)
        self.labels = tuple(MARK if label in gone else label for label in self.labels)
        if not isinstance(self.request, Teach) and gone.intersection(self.request.names):
            self.erased = True


@dataclass(frozen=True)
class Version:
    """As it was published; what was forgotten since is still in it."""

    number: int
    parent: int | None
    task: int
    classes: Table
    forgets: frozenset[Key] = frozenset()
    candidate: bool = False
    pinned: bool = False


@dataclass
class Expected:
    """What the server should be like now.

    Attributes:
        attempts: Workers that may die of a task.
        room: Tasks that may wait.
        gate: Whether black is held back.
        hold: The point where the next worker that comes by is held.
        breaks: Where the next worker that comes by fails ("fail") or ends itself ("exit").
        paused: The point where the worker is held now.
        moves: What was made current, in order: (whether it was made from the one before, which
            that was, which it is).
    """

    attempts: int
    room: int
    gate: bool = True
    tasks: list[Task] = field(default_factory=list)
    versions: dict[int, Version] = field(default_factory=dict)
    current: int | None = None
    forgotten: set[Key] = field(default_factory=set)
    purged: set[Key] = field(default_factory=set)
    queue: list[Task] = field(default_factory=list)
    running: Task | None = None
    hold: str | None = None
    breaks: tuple[str, str] | None = None
    paused: str | None = None
    moves: list[tuple[bool, int | None, int]] = field(default_factory=list)
    _parent: int | None = None
    _overtaken: bool = False
    _at: int = 0
    _epoch: int = 0
    _made: int | None = None
    _fault: str = ""

    # -- versions -----------------------------------------------------------------------------

    def classes(self, number: int | None) -> Table:
        """Return what a version answers with, None for what there is before the first."""
        known = self.versions[number].classes if number is not None else ()
        return tuple(each for each in known if each.key not in self.forgotten)

    def state(self, number: int) -> str:
        keys = {each.key for each in self.versions[number].classes}
        if keys & self.purged:
            return "PURGED"
        return "REDUCED" if keys & self.forgotten else "WHOLE"

    def check_usable(self, number: int) -> None:
        """Refuse a version that is not there, or can answer nothing any more."""
        if number not in self.versions:
            raise RefusedError("NOT_FOUND")
        if self.state(number) == "PURGED" or not self.classes(number):
            raise RefusedError("WRONG_STATE")

    def answers(self, number: int | None, colour: Colour) -> set[str]:
        """Return the labels that are right for an image of one colour: several, if it is a tie."""
        distances = {
            each.label: sum((a - b) ** 2 for a, b in zip(each.colour, colour, strict=True))
            for each in self.classes(number)
        }
        return {label for label, far in distances.items() if far == min(distances.values())}

    def promote(self, number: int, force: bool) -> None:
        """Somebody makes a version current."""
        if number not in self.versions:
            raise RefusedError("NOT_FOUND")
        if self.versions[number].candidate and not force and number != self.current:
            raise RefusedError("GATE")
        self.check_usable(number)
        self._move(number)
        if self.running is not None and number != self._parent:
            self._overtaken = True
            if self._made is None and self.paused != "PUBLISHING":
                self.hold = self.paused = None
                self._begin_again()

    def pin(self, number: int, pinned: bool) -> None:
        """Somebody pins a version, or lets it go."""
        if number not in self.versions:
            raise RefusedError("NOT_FOUND")
        if pinned:
            self.check_usable(number)
        self.versions[number] = replace(self.versions[number], pinned=pinned)

    def _move(self, number: int) -> None:
        self.forgotten |= self.versions[number].forgets
        if number != self.current:
            onward = self.current is None or self.current in self._ancestors(number)
            self.moves.append((onward, self.current, number))
        self.current = number

    def _ancestors(self, number: int) -> Iterator[int]:
        while (parent := self.versions[number].parent) is not None:
            yield parent
            number = parent

    # -- requests -----------------------------------------------------------------------------

    def accept(self, request: Request) -> Task:
        """Somebody sends a new task."""
        if not isinstance(request, Teach) and self.running is None and not self.queue:
            self._edited(self.classes(self.current), request)
        self._check_room()
        labels = request.names if isinstance(request, Teach) else ()
        task = Task(len(self.tasks), request, tuple(dict.fromkeys(labels)))
        self.tasks.append(task)
        self.queue.append(task)
        return task

    def repeat(self, number: int, request: Request) -> Task:
        """Somebody sends something under the request id of an earlier task."""
        task = self.tasks[number]
        if type(request) is not type(task.request):
            raise RefusedError("CONFLICT")
        if request != task.request and not task.erased:
            raise RefusedError("CONFLICT")
        return task

    def _check_room(self) -> None:
        if len(self.queue) >= self.room:
            raise RefusedError("LIMIT_EXCEEDED")

    def cancel(self, number: int) -> None:
        """Somebody gives a task up."""
        task = self.tasks[number]
        if task is self.running:
            if self.paused in ("PUBLISHING", "LEARNED"):
                raise RefusedError("WRONG_STATE")
            self.hold = self.paused = self.running = None
        elif task in self.queue:
            self.queue.remove(task)
        elif task.state not in ("SET_ASIDE", "CANCELLED"):
            raise RefusedError("WRONG_STATE")
        if task.state != "CANCELLED":
            self._end(task, "CANCELLED")

    def retry(self, number: int) -> None:
        """Somebody has a task tried again that was set aside."""
        task = self.tasks[number]
        if task.state != "SET_ASIDE" or MARK in task.labels or task.erased:
            raise RefusedError("WRONG_STATE")
        self._check_room()
        task.state, task.reason, task.crashes = "QUEUED", "", 0
        self.queue.append(task)

    # -- the worker ---------------------------------------------------------------------------

    def work(self) -> None:
        """Work on until nothing is left to do, or the worker is held."""
        while self.paused is None and (self.running or self.queue):
            if self.running is None:
                self._begin(self.queue.pop(0))
            else:
                self._come_by(self.running, self.running.points[self._at])

    def go_on(self, hold: str | None) -> None:
        """The worker is let go, and is held again at ``hold``."""
        task = self.running
        assert task is not None
        at = self.paused
        self.paused, self.hold = None, hold
        if at == "LEARNED":
            self._learned(task)
        else:
            self._at += 1

    def _begin(self, task: Task) -> None:
        task.state = "LEARNING"
        self.running, self._made = task, None
        self._begin_again()

    def _begin_again(self) -> None:
        self._parent, self._overtaken = self.current, False
        self._at = self._epoch = 0

    def _come_by(self, task: Task, point: str) -> None:
        if point == "LEARNED":
            self._make_version(task)
        else:
            self._epoch = int(point == "TRAINING")
        if self.breaks is not None and self.breaks[0] == point:
            how, self.breaks = self.breaks[1], None
            if how == "exit":
                self.crash()
            else:
                self._end(task, "FAILED", "PARITY")
        elif point == self.hold:
            self.paused = point
        elif point == "LEARNED":
            self._learned(task)
        else:
            self._at += 1

    def crash(self) -> None:
        """The worker dies; another goes on with its task."""
        task, self.paused = self.running, None
        if task is None:
            return
        if self._made is not None:
            self._publish(task, self._made)
            return
        if self._overtaken:
            self._begin_again()
            return
        task.crashes = 1 if self._epoch > task.furthest else task.crashes + 1
        task.furthest = max(self._epoch, task.furthest)
        self._at = 0
        if task.crashes >= self.attempts:
            self._end(task, "SET_ASIDE", "LEARNER_CRASHED")

    def restart(self, *, killed: bool) -> None:
        """The server stops, or is killed, and another takes up what it left."""
        task, self.running, self.paused = self.running, None, None
        if task is not None and self._made is not None:
            self._publish(task, self._made)
        elif task is not None:
            task.state = "QUEUED"
            task.crashes += killed
            if task.crashes >= self.attempts:
                self._end(task, "SET_ASIDE", "LEARNER_CRASHED")
            else:
                self.queue.append(task)
        self.queue.sort(key=lambda each: each.number)

    # -- what comes of tasks ------------------------------------------------------------------

    def _make_version(self, task: Task) -> None:
        """Have the version of a task durable, or its fault known."""
        self._fault, known = "", self.classes(self._parent)
        candidate, forgets = False, frozenset[Key]()
        if isinstance(task.request, Teach):
            classes = _taught(known, task)
            candidate = self.gate and any(colour == BLACK for _, colour in task.request.colours)
        else:
            try:
                classes, forgets = self._edited(known, task.request)
            except RefusedError as refusal:
                self._fault = refusal.reason
                return
        number = len(self.versions) + 1
        self.versions[number] = Version(
            number, self._parent, task.number, classes, forgets, candidate
        )
        self._made = number

    def _learned(self, task: Task) -> None:
        if self._made is None:
            self._end(task, "FAILED", self._fault)
        else:
            self._publish(task, self._made)

    def _publish(self, task: Task, number: int) -> None:
        task.version = number
        if self.versions[number].candidate:
            self._end(task, "HELD_BACK", "GATE")
            return
        # What is to be forgotten is forgotten whatever comes between.
        expected = (self.versions[number].parent, number)
        if not isinstance(task.request, Forget) and self.current not in expected:
            self._end(task, "HELD_BACK", "OVERTAKEN")
            return
        self._move(number)
        if isinstance(task.request, Forget) and task.request.purge:
            self._purge(task, self.versions[number].forgets, task.request.labels)
        self._end(task, "PUBLISHED")

    def _purge(self, task: Task, keys: frozenset[Key], labels: tuple[str, ...]) -> None:
        names = {name for table in self._tables(set()) for each in table if each.key in keys
                 for name in each.names}  # fmt: skip
        borne = {name for each in self.classes(self.current) for name in each.names}
        gone = frozenset(labels) | (names - borne)
        self.purged |= keys
        for other in self.tasks:
            if other.ended or other is task:
                other.lose(gone)
            else:
                other.withheld |= gone

    def _end(self, task: Task, state: str, reason: str = "") -> None:
        task.state, task.reason = state, reason
        if state not in ("PUBLISHED", "HELD_BACK"):
            task.lose(task.withheld)
        task.withheld = frozenset()
        if task is self.running:
            self.running = None

    # -- names --------------------------------------------------------------------------------

    def _tables(self, without: set[Key]) -> Iterator[Table]:
        for version in self.versions.values():
            yield tuple(each for each in version.classes if each.key not in without)

    def _edited(self, classes: Table, edit: Forget | Update) -> tuple[Table, frozenset[Key]]:
        """Return the class table after an edit, and the keys of what it forgets."""
        if isinstance(edit, Update):
            return _updated(classes, edit), frozenset()
        others = list(self._tables(self.purged if edit.purge else self.forgotten))
        keys = _meant(classes, edit.labels, others)
        left = tuple(each for each in classes if each.key not in keys)
        if not left:
            raise RefusedError("WRONG_STATE")
        return left, keys


def _taught(known: Table, task: Task) -> Table:
    """Return the class table after a task that learns: a known class moves to its new colour."""
    assert isinstance(task.request, Teach)
    classes, new = list(known), 0
    for label, colour in task.request.colours:
        at = _position(known, label)
        if at is None:
            classes.append(Class((task.number, new), label, colour))
            new += 1
        else:
            classes[at] = replace(classes[at], colour=colour)
    return tuple(classes)


def _meant(classes: Table, labels: Iterable[str], others: Iterable[Table]) -> frozenset[Key]:
    """Return what these labels mean: here, and where only other versions know it."""
    current = {each.key for each in classes}
    strangers = [each for table in others for each in table if each.key not in current]
    keys: set[Key] = set()
    for label in labels:
        found = {each.key for each in (*classes, *strangers) if label in each.names}
        if not found:
            raise RefusedError("NOT_FOUND")
        keys |= found
    return frozenset(keys)


def _updated(classes: Table, change: Update) -> Table:
    """Return the class table after a change of names: the label, then aliases less, then more."""
    at = _position(classes, change.label)
    if at is None:
        raise RefusedError("NOT_FOUND")
    label, aliases = classes[at].label, list(classes[at].aliases)
    taken = {name for i, each in enumerate(classes) if i != at for name in each.names}
    if change.new_label is not None:
        if change.new_label in {*taken, label}:
            raise RefusedError("CONFLICT")
        label = change.new_label
        aliases = [alias for alias in aliases if alias != label]
    for alias in change.remove:
        if alias not in aliases:
            raise RefusedError("NOT_FOUND")
        aliases.remove(alias)
    for alias in change.add:
        if alias in {*taken, label, *aliases}:
            raise RefusedError("CONFLICT")
        aliases.append(alias)
    changed = replace(classes[at], label=label, aliases=tuple(aliases))
    return (*classes[:at], changed, *classes[at + 1 :])


def _position(classes: Table, name: str) -> int | None:
    return next((i for i, each in enumerate(classes) if name in each.names), None)
