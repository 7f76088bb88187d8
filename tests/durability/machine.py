"""A server and the model of it, asked the same: what all histories have in common."""

from __future__ import annotations

import asyncio
import functools
import signal
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inflora_client import AsyncClient, RetryPolicy
from inflora_client.errors import StatusError
from inflora_core import audit
from inflora_core.audit import MOVES, Event
from inflora_core.store import Store
from inflora_service.doctor import Severity, examine
from tests.durability.expected import (
    BLACK,
    Colour,
    Expected,
    Forget,
    Key,
    RefusedError,
    Request,
    Task,
    Teach,
    Update,
)
from tests.running_server import RunningServer
from tests.service.conftest import BLUE, GREEN, RED, WHITE

T = TypeVar("T")

ATTEMPTS, ROOM = 3, 3
"""Workers that may die of a task, and tasks that may wait."""
PATIENCE = 60.0
"""Seconds that anything may take."""
LOADED = 2
"""Old versions that are asked after every step: fewer than a server keeps loaded."""
TOLERANCE = 1e-5

LABELS = st.sampled_from(["red", "green", "blue", "rot", "grün"])
COLOURS = st.sampled_from([RED, GREEN, BLUE, WHITE, (255, 255, 0), BLACK])
TEACH = st.dictionaries(LABELS, COLOURS, min_size=1, max_size=2).map(
    lambda colours: Teach(tuple(colours.items()))
)
FORGET = st.builds(
    Forget, st.lists(LABELS, min_size=1, max_size=2, unique=True).map(tuple), st.booleans()
)
ALIASES = st.lists(LABELS, max_size=2, unique=True).map(tuple)
UPDATE = st.builds(Update, LABELS, st.none() | LABELS, ALIASES, ALIASES).filter(
    lambda change: change.new_label is not None or change.add or change.remove
)
TASKS = st.runner().flatmap(lambda machine: st.sampled_from(worth_a_look(machine.expected.tasks)))
VERSIONS = st.runner().flatmap(lambda machine: st.integers(1, len(machine.expected.versions) + 1))
"""The last one is not there."""


def worth_a_look(tasks: list[Task]) -> list[int]:
    """Return the numbers of all tasks, several times of those that something can become of."""
    return [
        task.number
        for task in tasks
        for _ in range(4 if not task.ended or task.state == "SET_ASIDE" else 1)
    ]


def step(**arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Make a method a rule that is counted, and after which the worker works as far as it can."""

    def decorate(method: Callable[..., None]) -> Any:
        name = method.__name__

        @functools.wraps(method)
        def counted(machine: Machine, **values: Any) -> None:
            method(machine, **values)
            machine.settle()
            machine.taken[name] += 1

        # Hypothesis leaves rules out at random. A history of hardly any is not worth a server.
        few = precondition(lambda machine: machine.taken[name] <= 2 + machine.taken.total() // 4)
        return few(rule(**arguments)(counted))

    return decorate


class Machine(RuleBasedStateMachine):
    """One history.

    Attributes:
        gate: Whether black is held back.
        nearest: Whether an image is of the class whose colour is nearest.
        taken: How often each rule was followed.
        expected: What the server should be like.
        said: What versions said of images, while they knew these classes.
    """

    gate = True
    nearest = True

    def __init__(self) -> None:
        super().__init__()
        self.taken: Counter[str] = Counter()
        self.expected = Expected(ATTEMPTS, ROOM, self.gate)
        self.said: dict[tuple[int | None, frozenset[Key], Colour], dict[str, float]] = {}
        self.known: set[tuple[int, str]] = set()
        self.stack = ExitStack()
        self.process = ExitStack()

    @initialize(varied=st.booleans(), first=TEACH)
    def begin(self, varied: bool, first: Teach) -> None:
        # What hypothesis always tries first has the same rule all over.
        assume(varied)
        # Not pytest's: the path of a socket has 108 characters at most.
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="rules-")))
        self.loop = self.stack.enter_context(asyncio.Runner())
        self.prepare()
        self.start()
        self.sent(first)
        self.settle()

    def teardown(self) -> None:
        self.process.close()
        self.stack.close()

    # -- what a worker differs in ---------------------------------------------------------------

    def prepare(self) -> None:
        """Make a store with a backbone, and what the worker needs."""
        raise NotImplementedError

    def starting(self) -> AbstractContextManager[RunningServer]:
        """Start a server, and kill it in the end."""
        raise NotImplementedError

    def images(self, colour: Colour) -> list[bytes]:
        """Return the images of a class of this colour."""
        raise NotImplementedError

    # -- requests -----------------------------------------------------------------------------

    @step(request=TEACH)
    def learn(self, request: Teach) -> None:
        self.sent(request)

    @precondition(lambda self: self.expected.classes(self.expected.current))
    @step(colour=COLOURS, which=st.integers(0, 5))
    def learn_known(self, colour: tuple[int, int, int], which: int) -> None:
        known = [
            name for each in self.expected.classes(self.expected.current) for name in each.names
        ]
        self.sent(Teach(((known[which % len(known)], colour),)))

    @step(request=FORGET)
    def forget(self, request: Forget) -> None:
        self.sent(request)

    @precondition(lambda self: len(self.expected.classes(self.expected.current)) > 1)
    @step(which=st.integers(0, 5), purge=st.booleans())
    def forget_known(self, which: int, purge: bool) -> None:
        known = self.expected.classes(self.expected.current)
        self.sent(Forget((known[which % len(known)].label,), purge))

    @step(request=UPDATE)
    def update(self, request: Update) -> None:
        self.sent(request)

    @precondition(lambda self: self.expected.tasks)
    @step(task=TASKS)
    def send_again(self, task: int) -> None:
        self.sent_again(self.expected.tasks[task].request, task)

    @precondition(lambda self: self.expected.tasks)
    @step(task=TASKS, request=TEACH | FORGET | UPDATE)
    def send_otherwise(self, task: int, request: Request) -> None:
        self.sent_again(request, task)

    @precondition(lambda self: self.expected.tasks)
    @step(task=TASKS)
    def cancel(self, task: int) -> None:
        name = self.expected.tasks[task].id
        with self.releasing():
            self.both(self.client.cancel(name), lambda: self.expected.cancel(task))

    @precondition(lambda self: self.expected.tasks)
    @step(task=TASKS)
    def retry(self, task: int) -> None:
        name = self.expected.tasks[task].id
        self.both(self.client.retry(name), lambda: self.expected.retry(task))

    @step(version=VERSIONS, force=st.booleans())
    def promote(self, version: int, force: bool) -> None:
        self.make_current(version, force)

    @step(version=VERSIONS, pinned=st.booleans())
    def pin(self, version: int, pinned: bool) -> None:
        pin = self.client.pin if pinned else self.client.unpin
        self.both(pin(version), lambda: self.expected.pin(version, pinned))

    @step(version=VERSIONS, colour=COLOURS)
    def predict(self, version: int, colour: Colour) -> None:
        self.ask(version, colour)

    # -- the server ---------------------------------------------------------------------------

    @step()
    def restart(self) -> None:
        self.server.process.send_signal(signal.SIGTERM)
        assert self.server.process.wait(PATIENCE) == 0, self.log()
        self.start_again(killed=False)

    @step()
    def kill_server(self) -> None:
        self.server.process.kill()
        self.server.process.wait(PATIENCE)
        self.start_again(killed=True)

    # -- what has to hold -----------------------------------------------------------------------

    @invariant()
    def all_is_as_expected(self) -> None:
        self.check_tasks()
        self.check_versions()
        self.check_answers()
        self.check_audit_log()
        found = examine(self.root, read_only=True).found
        same([finding for finding in found if finding.severity is not Severity.NOTE], [])

    def check_tasks(self) -> None:
        found = {
            task.id: (
                task.state,
                task.version,
                task.error.reason if task.error else "",
                [each.label for each in task.classes],
            )
            for task in reversed(self.loop.run(listed(self.client.tasks())))
        }
        wanted = {
            task.id: (task.state, version_name(task.version), task.reason, list(task.labels))
            for task in self.expected.tasks
        }
        same(found, wanted)
        same(list(found), list(wanted))
        spools = {folder.name for folder in (self.root / "spool").iterdir()}
        same(spools, {task.id for task in self.expected.tasks if task.has_examples})

    def check_versions(self) -> None:
        expected, store = self.expected, Store.existing(self.root)
        found = {
            version.number: (
                version.parent,
                version.task,
                [(each.label, each.aliases, each.task) for each in version.classes],
                version.candidate,
                version.purged,
                version.current,
                version.pinned,
                store.version(version.number).state.value,
            )
            for version in self.loop.run(listed(self.client.versions()))
        }
        wanted = {
            version.number: (
                version_name(version.parent),
                self.task_name(version.task),
                [
                    (each.label, each.aliases, self.task_name(each.key[0]))
                    for each in expected.classes(version.number)
                ],
                version.candidate,
                expected.state(version.number) == "PURGED",
                version.number == expected.current,
                version.pinned,
                expected.state(version.number),
            )
            for version in expected.versions.values()
        }
        same(found, wanted)

    def check_answers(self) -> None:
        """Ask the current version, and the first few in turn, which stay loaded."""
        try:
            answer = self.loop.run(self.client.predict(self.images(GREEN)[:1], top_k=100))
        except StatusError as error:
            same((error.reason, None), ("WRONG_STATE", self.expected.current))
        else:
            self.check_answer(answer, self.expected.current, GREEN)
        self.ask(self.taken.total() % LOADED + 1, RED)

    def ask(self, version: int, colour: Colour) -> None:
        """Ask one version, which may be gone."""
        answer = self.both(
            self.client.predict(self.images(colour)[:1], top_k=100, version=version),
            lambda: self.expected.check_usable(version),
        )
        if answer is not None:
            self.check_answer(answer, version, colour)

    def check_audit_log(self) -> None:
        reading, expected = audit.verify(self.root), self.expected
        same((reading.faults, reading.torn), ((), 0))
        history = reading.history
        aside = {task.id for task in expected.tasks if task.state == "SET_ASIDE"}
        same(history.accepted, {task.id for task in expected.tasks})
        same(history.set_aside, aside)
        same(history.ended, {task.id for task in expected.tasks if task.ended} - aside)
        same(history.forgotten, set(map(self.key_name, expected.forgotten)))
        same(history.purged, set(map(self.key_name, expected.purged)))
        parents = {
            task.version: expected.versions[task.version].parent
            for task in expected.tasks
            if task.version is not None
        }
        same(history.parents, parents)
        moves = [
            (line.event == Event.PROMOTED, line.version_from, line.version_to)
            for line in reading.lines
            if line.event in MOVES
        ]
        same(moves, expected.moves)

    def check_answer(self, answer: Any, version: int | None, colour: tuple[int, int, int]) -> None:
        same(answer.version, version_name(version))
        labels = [score.label for score in answer.predictions[0].scores]
        known = self.expected.classes(version)
        same(sorted(labels), sorted(each.label for each in known))
        if self.nearest:
            same(labels[0] in self.expected.answers(version, colour), True)
        # A version says of an image what it always said, as long as it knows the same classes.
        scores = {score.label: score.probability for score in answer.predictions[0].scores}
        keys = frozenset(each.key for each in known)
        before = self.said.setdefault((version, keys, colour), scores)
        same(before.keys(), scores.keys())
        assert max(abs(before[name] - scores[name]) for name in scores) < TOLERANCE, (
            before,
            scores,
        )

    # -- how it is done -----------------------------------------------------------------------

    @property
    def root(self) -> Path:
        return self.folder / "store"

    def log(self) -> str:
        return self.server.log.read_text()

    def task_name(self, number: int) -> str:
        return f"models/default/tasks/{self.expected.tasks[number].id}"

    def key_name(self, key: tuple[int, int]) -> str:
        return f"{self.expected.tasks[key[0]].id}.{key[1]}"

    def both(self, call: Awaitable[T], expect: Callable[[], object]) -> T | None:
        """Have the server and the model do something; return the server's answer.

        None if it is refused, which the model has to do with the same reason.
        """
        answer, wanted, found = None, "", ""
        try:
            expect()
        except RefusedError as refusal:
            wanted = refusal.reason
        try:
            answer = self.loop.run(in_time(call))
        except StatusError as error:
            found = error.reason
        same(found, wanted)
        return answer

    def make_current(self, version: int, force: bool) -> None:
        """Promote a version, which may not be there."""
        with self.releasing():
            self.both(
                self.client.promote(version, force=force),
                lambda: self.expected.promote(version, force),
            )

    @contextmanager
    def releasing(self) -> Iterator[None]:
        """Do something that may give up what the worker is held at."""
        yield

    def sent(self, request: Request) -> None:
        """Send a new request."""
        number = len(self.expected.tasks)
        task = self.both(self.request(request, number), lambda: self.expected.accept(request))
        if task is not None:
            self.expected.tasks[number].id = task.id

    def sent_again(self, request: Request, number: int) -> None:
        """Send a request under the id of an earlier one."""
        task = self.both(
            self.request(request, number), lambda: self.expected.repeat(number, request)
        )
        assert task is None or task.id == self.expected.tasks[number].id

    async def request(self, request: Request, number: int) -> Any:
        """Send a request under the id of task ``number``; return its task."""
        name = f"request-{number}"
        match request:
            case Teach():
                images = [
                    (image, label)
                    for label, colour in request.colours
                    for image in self.images(colour)
                ]
                task = await self.client.learn(images, request_id=name)
            case Forget():
                task = await self.client.forget(
                    request.labels, purge=request.purge, request_id=name
                )
            case Update():
                task = await self.client.update_class(
                    request.label,
                    new_label=request.new_label,
                    add_aliases=request.add,
                    remove_aliases=request.remove,
                    request_id=name,
                )
        return task

    def settle(self) -> None:
        """Have the worker, and the model, work as far as they can."""
        self.expected.work()
        for task in self.expected.tasks:
            if task.ended and (task.number, task.state) not in self.known:
                self.loop.run(in_time(self.ended(task)))
                self.known.add((task.number, task.state))
            elif not task.ended:
                self.known.discard((task.number, "SET_ASIDE"))

    async def ended(self, task: Task) -> None:
        async for _ in self.client.watch(task.id):
            pass

    # -- processes ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start a server."""
        self.server = self.process.enter_context(self.starting())
        self.client = AsyncClient(
            self.server.address, timeout=PATIENCE, retry=RetryPolicy(max_attempts=1)
        )
        self.process.callback(lambda: self.loop.run(self.client.close()))

    def start_again(self, *, killed: bool) -> None:
        """Start another server after one that has ended."""
        self.process.close()
        self.expected.restart(killed=killed)
        self.start()


async def in_time(work: Awaitable[T]) -> T:
    """Return what comes of ``work``, unless it takes far too long."""
    async with asyncio.timeout(PATIENCE):
        return await work


async def listed(pages: Any) -> list[Any]:
    return [each async for each in pages]


def same(found: object, expected: object) -> None:
    """Raise ``AssertionError`` with what differs."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            here, there = found.get(key), expected.get(key)
            assert here == there, f"{key}: {here}, expected: {there}"
    assert found == expected, f"{found}, expected: {expected}"


def version_name(number: int | None) -> str:
    return f"models/default/versions/{number}" if number is not None else ""
