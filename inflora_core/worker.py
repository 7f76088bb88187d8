"""The learning worker: a process of its own, so that nothing in it can touch Predict.

    python -m inflora_core.worker --store DIR [--device auto] [--threads 0] [--precision auto]

Under ``torchrun`` several processes learn together. Rank 0 is the worker of what follows; the
others hear from it alone, and only of tasks to learn.

Commands come as JSON lines on standard input, events leave as JSON lines on standard output:

    {"command": "prepare", "backbone": "bundled", "architecture": null}
    {"command": "learn", "task": "...", "spool": "...", "settings": {...}, "parent": 3,
     "gate": {...}, "traceparent": "00-..."}
    {"command": "edit", "task": "...", "edit": {...}, "parent": 3, "traceparent": ""}
    {"command": "cancel", "task": "..."}

    {"event": "ready"}                                imports are done
    {"event": "prepared"}                             the store has its backbone
    {"event": "progress", "task": "...", "stage": "TRAINING", "fraction": 0.4, "epoch": 2, ...}
    {"event": "learned", "task": "...", "version": 4} durable in the store, not yet current; perhaps
                                                      a candidate
    {"event": "failed", "task": "..." or null, "reason": "...", "message": "...", "field": "..."}
    {"event": "cancelled", "task": "..."}
    {"event": "leaving"}                              takes no more commands; the next one ends it:
                                                      before one of the two above

The end of standard input means that the server is gone; the worker ends at once. It can be killed
at any moment: a version is in the store whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np
import torch
from pydantic import TypeAdapter

from inflora_core import allocator, bundled, canary, durable, edits, forms, gate, logs, tracing
from inflora_core.backbone import Backbone, build_backbone, create_backbone, state_of
from inflora_core.checkpoint import Checkpoint
from inflora_core.compute import Compute, Precision, halves, is_memory_error
from inflora_core.config import Gate, LearnConfig, Limits
from inflora_core.errors import (
    CancelledError,
    DamagedError,
    InfloraError,
    InvalidImageError,
    InvalidInputError,
    LimitExceededError,
    StateError,
    UnavailableError,
)
from inflora_core.export import check_edit, check_parity, export_template
from inflora_core.graph import materialise
from inflora_core.group import Group, LostRankError
from inflora_core.heads import every, spread
from inflora_core.images import decode
from inflora_core.learner import learn_task
from inflora_core.model import (
    Array,
    ContinualModel,
    Edit,
    Form,
    LabelledImages,
    Learned,
    ParityReport,
    Progress,
    Stage,
)
from inflora_core.predictor import Predictor, RuntimeOptions, processors
from inflora_core.progress import Tracker
from inflora_core.spool import read_spool
from inflora_core.store import Store

log = logging.getLogger(__name__)

_EDIT: TypeAdapter[Edit] = TypeAdapter(Edit)

_LIMITS = Limits()
"""Images were checked against the server's own limits when they arrived."""

PROGRESS_SECONDS = 0.1
"""Least time between two reports of the same stage and epoch."""

PARITY_IMAGES = 16
"""Images of a task on which ONNX and torch are compared: enough to see any error of the merge."""


class Worker:
    """Learns tasks one after the other and keeps model and backbone warm between them."""

    def __init__(self, store: Store, compute: Compute, threads: int) -> None:
        self._store = store
        self._compute = compute
        self._threads = threads
        self._backbone: Backbone | None = None
        self._template = b""
        self._newest: ContinualModel | None = None

    @property
    def group(self) -> Group:
        """Who learns along."""
        return self._compute.group

    def prepare(self, source: str, architecture: str | None) -> None:
        """Give the store its backbone, unless it has one."""
        if self._store.has_backbone():
            return
        path = str(bundled.PATH) if source == "bundled" else source
        backbone = create_backbone(path, architecture=architecture)
        template = export_template(backbone)
        self._store.set_backbone(backbone.config, state_of(backbone), template)

    def learn(
        self,
        task: str,
        spool: Path,
        config: LearnConfig,
        parent: int | None,
        tracker: Tracker,
        limits: Gate | None = None,
    ) -> int:
        """Learn the images in ``spool`` on top of version ``parent``; return the new version.

        It is a candidate if the publish gate has something against it by ``limits``; the default
        ones if None.
        """
        done = self._store.version_of_task(task)
        if done is not None:
            return done
        tracker.start(Stage.DECODING)
        before = self._state(parent)
        learned, examples = self._learn_with_others(
            self.group.told(Lecture(task, spool, config, before)), tracker
        )

        tracker.start(Stage.EXPORTING)
        onnx = materialise(self._template, learned.model, self._store.next_number())

        tracker.start(Stage.CHECKING)
        limits = limits or Gate()
        wanted = [form for form in forms.FORMS if getattr(limits, form) is not None]
        most = max([PARITY_IMAGES, *(forms.IMAGES[form] for form in wanted)])
        shown = spread(examples.data.labels[learned.rows], most)
        images = examples.decoded(learned.rows[shown])
        answers = self._answers(onnx, images, tracker)
        parity = self._parity(onnx, learned, examples, shown, answers)
        canaries = self._canaries(before, onnx, tracker) if limits.canary is not None else None
        checks = gate.checks(learned, limits, canaries)
        for check in checks:
            if not check.passed:
                log.warning("task %s is held back: %s", task, check.message)

        chosen, refusals = self._forms(wanted, onnx, images, answers, limits, tracker)

        tracker.start(Stage.PUBLISHING)
        # Under the names that the task used: an alias counts what its class has.
        counts = learned.report.held_out_counts
        report = replace(
            learned.report,
            held_out_counts={name: counts[x] for name, x in examples.meant.items() if x in counts},
            parity=parity,
            stage_seconds=dict(tracker.seconds),
            checks=checks,
            warnings=(*learned.report.warnings, *gate.warnings(learned, limits), *refusals),
        )
        learned = replace(learned, report=report)
        number = self._store.publish(learned, task, onnx, chosen).number
        self._newest = replace(learned.model, version=number)
        return number

    def follow(self) -> None:
        """Learn what rank 0 learns, for ever.

        Raises:
            LostRankError: it is gone.
        """
        while True:
            lecture: Any = self.group.told(None)
            try:
                self._learn_with_others(lecture, Tracker())
            except (InvalidInputError, StateError) as error:
                # Of the task: rank 0 found the same, and has told the server.
                log.info("rank %d: %s", self.group.rank, error)

    def _learn_with_others(self, lecture: Lecture, tracker: Tracker) -> tuple[Learned, Examples]:
        """Learn one task, as every process of the group does at the same time."""
        backbone = self._load()
        examples = self._decode(lecture.spool, backbone, lecture.before, tracker)
        # Images are not of what is kept: they go at the end of the task, when nobody gives back.
        with allocator.kept():
            learned = learn_task(
                lecture.before,
                backbone,
                examples.data,
                lecture.task,
                lecture.config,
                tracker,
                checkpoint=Checkpoint(lecture.spool if self.group.leads else None),
                compute=self._compute,
            )
        return learned, examples

    def edit(
        self,
        task: str,
        edit: Edit,
        parent: int | None,
        tracker: Tracker,
        limits: Gate | None = None,
    ) -> int:
        """Change the class table of version ``parent``; return the new version."""
        done = self._store.version_of_task(task)
        if done is not None:
            return done
        tracker.start(Stage.EXPORTING)
        before = self._state(parent)
        edited = edits.apply(before, edit, self._store.tables_for(edit))
        template = self._store.backbone().template_path.read_bytes()
        number = self._store.next_number()
        onnx = materialise(template, edited.model, number)

        tracker.start(Stage.CHECKING)
        check_edit(materialise(template, before, number), onnx, edited.model)
        remade = self._remade(parent, onnx, limits or Gate())

        tracker.start(Stage.PUBLISHING)
        self._store.publish_edit(edited, task, onnx, remade)
        self._newest = replace(edited.model, version=number)
        return number

    def _answers(self, content: bytes, images: Decoded, tracker: Tracker) -> forms.Answers:
        # A step is where it can be cancelled.
        return forms.answers(content, images, self._threads, partial(tracker.step, 1.0))

    def _parity(
        self,
        onnx: bytes,
        learned: Learned,
        examples: Examples,
        shown: Array,
        answers: forms.Answers,
    ) -> ParityReport:
        """Compare a file with what was trained, on some of the images that it has answered.

        Args:
            onnx: The file.
            learned: What was trained.
            examples: Of the task.
            shown: (m,) positions among ``learned.rows``.
            answers: The file's, for those.
        """
        few = every(len(shown), PARITY_IMAGES)
        rows = learned.rows[shown[few]]
        return check_parity(
            onnx,
            learned.model.logits(learned.features[shown[few]]),
            examples.data.images[rows],
            examples.decoded(rows),
            answers[0][few],
            self._load(),
        )

    def _forms(
        self,
        wanted: Sequence[str],
        onnx: bytes,
        images: Decoded,
        answers: forms.Answers,
        limits: Gate,
        tracker: Tracker,
    ) -> tuple[tuple[Form, ...], list[str]]:
        """Return the smaller forms of a file that agree with it, and what is against the others."""
        chosen: list[Form] = []
        refusals: list[str] = []
        for form in wanted:
            with _without(forms.file_of(form), refusals):
                content, entry = forms.made(form, onnx)
                few = every(len(images), forms.IMAGES[form])
                agreement = forms.agreement(
                    forms.of_some(answers, few), self._answers(content, images[few], tracker)
                )
                if refusal := gate.form_refusal(form, agreement, limits):
                    refusals.append(f"{entry.name} is not handed out: {refusal}.")
                else:
                    chosen.append(Form(entry, agreement))
        return tuple(chosen), refusals

    def _remade(self, parent: int | None, onnx: bytes, limits: Gate) -> tuple[Form, ...]:
        """Return the forms of an edited version: its features are those of the version before.

        No image tells how these agree, and so what is known of that version's has to do.
        """
        remade = []
        for known in () if parent is None else self._store.version(parent).forms:
            form = forms.form_of(known.file.name)
            if form and not gate.form_refusal(form, known.agreement, limits):
                with _without(known.file.name, []):  # the log has it; an edit has no report
                    remade.append(replace(known, file=forms.made(form, onnx)[1]))
        return tuple(remade)

    def _canaries(
        self, before: ContinualModel, onnx: bytes, tracker: Tracker
    ) -> gate.Canaries | None:
        """Return how the canary images of known classes fare before a task, and after it."""
        examples = []
        for position, entry in enumerate(before.classes):
            try:
                kept = canary.read(self._store.root, entry.key)
            except DamagedError as error:
                log.warning("canary images of class %r are passed over: %s", entry.label, error)
                continue
            examples += [(image, position) for image in kept]
        if not examples:
            return None
        shares, number = [], self._store.next_number()
        for content in (materialise(self._template, before, number), onnx):
            predictor = Predictor.load(content, RuntimeOptions(self._threads, "cpu"))
            right = 0
            for image, position in examples:
                answers = predictor.predict([_decoded(image)])
                right += int(answers.logits.argmax()) == position
                tracker.step(1.0)  # where it can be cancelled
            shares.append(right / len(examples))
        return gate.Canaries(len(examples), *shares)

    def _load(self) -> Backbone:
        if self._backbone is None:
            stored = self._store.backbone()
            backbone = build_backbone(stored.config, self._store.load_weights(stored))
            backbone.module.to(self._compute.device)
            self._backbone, self._template = backbone, stored.template_path.read_bytes()
        return self._backbone

    def _state(self, number: int | None) -> ContinualModel:
        if self._newest is None or self._newest.version != number:
            self._newest = self._store.load_model(number)
        return self._newest

    def _decode(
        self, spool: Path, backbone: Backbone, model: ContinualModel, tracker: Tracker
    ) -> Examples:
        """Return a task's examples at model size; each process of a group decodes its share."""
        aliases = {alias: entry.label for entry in model.classes for alias in entry.aliases}
        spooled = list(read_spool(spool))
        meant = {label: aliases.get(label, label) for _, label in spooled}
        positions = {label: i for i, label in enumerate(dict.fromkeys(meant.values()))}
        labels = np.array([positions[meant[label]] for _, label in spooled], np.int64)
        size = backbone.preprocessing
        mine = range(len(spooled))[self.group.share(len(spooled))]
        pixels = np.empty((len(mine), size.height, size.width, 3), np.uint8)

        def bring_to_size(row: int) -> None:
            pixels[row] = backbone.resize(_decoded(spooled[mine[row]][0]))

        try:
            with ThreadPoolExecutor(self._threads) as pool:
                for done, _ in enumerate(pool.map(bring_to_size, range(len(mine))), 1):
                    tracker.step(done / len(mine))
        except InvalidInputError as error:
            if self.group.size == 1:
                raise
            # Not of the task, which all processes would find: others wait for this one's share.
            raise DamagedError(f"an image was accepted and cannot be decoded: {error}") from error
        whole = self.group.joined(torch.from_numpy(pixels), len(spooled)).numpy()
        data = LabelledImages(whole, labels, tuple(positions))
        return Examples(data, [image for image, _ in spooled], meant)


@contextlib.contextmanager
def _without(name: str, refusals: list[str]) -> Iterator[None]:
    """Go on without a form that cannot be made or run: the version is whole without it."""
    try:
        yield
    except CancelledError:
        raise
    except Exception as error:
        if is_memory_error(error):
            raise
        log.exception("%s cannot be made", name)
        refusals.append(f"{name} is not handed out: it cannot be run: {error}")


@dataclass(frozen=True)
class Lecture:
    """One task, as rank 0 tells the others of it."""

    task: str
    spool: Path
    config: LearnConfig
    before: ContinualModel


@dataclass(frozen=True)
class Examples:
    """A task's examples.

    Attributes:
        data: At model size. An alias is taken for the class that it means.
        encoded: As they came.
        meant: Which class's label each name that they came under stands for.
    """

    data: LabelledImages
    encoded: Sequence[bytes]
    meant: Mapping[str, str]

    def decoded(self, rows: Array) -> Decoded:
        """Return some as they came."""
        return Decoded([self.encoded[row] for row in rows])


class Decoded(Sequence[Array]):
    """Encoded images, each decoded when it is looked at: decoded photos would fill the memory."""

    def __init__(self, encoded: Collection[bytes]) -> None:
        self._encoded = list(encoded)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._encoded)

    def __getitem__(self, index: Any) -> Any:
        """Return the image at ``index``, (h, w, 3) uint8; those of a slice are not decoded yet."""
        if isinstance(index, slice):
            return Decoded(self._encoded[index])
        return _decoded(self._encoded[index])


def _decoded(encoded: bytes) -> Array:
    """Return an image (h, w, 3) uint8 that could be decoded when it came.

    Raises:
        InvalidImageError: it is damaged.
        MemoryError: there is none for it; it would be taken for damaged.
    """
    try:
        return decode(encoded, _LIMITS)
    except InvalidImageError as error:
        if error.__cause__ and is_memory_error(error.__cause__):
            raise MemoryError("for decoding an image") from error
        raise


class Channel:
    """The worker's end of the two pipes."""

    def __init__(self, commands: TextIO, events: TextIO) -> None:
        self._events = events
        self._todo: queue.Queue[dict[str, Any]] = queue.Queue()
        self._cancelled: set[str] = set()
        self._reported: tuple[float, tuple[str, Stage, int] | None] = (0.0, None)
        threading.Thread(target=self._read, args=(commands,), daemon=True).start()

    def send(self, event: str, **fields: Any) -> None:
        """Send one event."""
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()

    def commands(self) -> Iterator[dict[str, Any]]:
        """Yield commands other than cancel, for ever."""
        while True:
            yield self._todo.get()

    def report(self, task: str, progress: Progress) -> None:
        """Send progress of ``task``; raise ``CancelledError`` once it was cancelled."""
        # Not while publishing: the version may be durable already.
        if task in self._cancelled and progress.stage is not Stage.PUBLISHING:
            raise CancelledError("cancelled on request")
        # Every event wakes the server and all who watch: some a second, and each stage and epoch.
        now, place = time.monotonic(), (task, progress.stage, progress.epoch)
        last, where = self._reported
        if where == place and now - last < PROGRESS_SECONDS:
            return
        self._reported = now, place
        self.send("progress", task=task, **asdict(progress))

    def _read(self, commands: TextIO) -> None:
        for line in commands:
            command = json.loads(line)
            if command["command"] == "cancel":
                self._cancelled.add(command["task"])
            else:
                # The same task again: it was given up only to begin anew.
                self._cancelled.discard(command.get("task"))
                self._todo.put(command)
        # Not sys.exit: that would end this thread only, and training would go on without a server.
        os._exit(0)


def serve(worker: Worker, channel: Channel, traces: tracing.Tracing | None = None) -> None:
    """Carry out commands until the server is gone, and trace them if that is asked for."""
    channel.send("ready")
    for command in channel.commands():
        task = command.get("task")
        logs.note(task=task or "")
        try:
            if command["command"] == "prepare":
                worker.prepare(command["backbone"], command["architecture"])
                channel.send("prepared")
            else:
                number = work(worker, channel, command, traces)
                channel.send("learned", task=task, version=number)
        except LostRankError as error:
            # Not the task's fault: without a word, as if this process had been the one to go.
            log.exception("a process of the group is gone")
            raise SystemExit(1) from error
        except CancelledError:
            with _leaving(worker.group, channel):
                channel.send("cancelled", task=task)
        except (InvalidInputError, StateError) as error:
            _fail(channel, task, error)
        except InfloraError as error:
            with _leaving(worker.group, channel):
                _fail(channel, task, error)
        except OSError as error:
            kind = LimitExceededError if durable.is_full(error) else UnavailableError
            with _leaving(worker.group, channel):
                _fail(channel, task, kind(f"cannot write to the store: {error}"))
        except Exception as error:
            if is_memory_error(error):
                with _leaving(worker.group, channel):
                    _fail_for_memory(channel, task)
                continue
            log.exception("task %s failed", task)
            _fail(channel, task, InfloraError(f"{type(error).__name__}: {error}"))
            # What state this process is in, nobody knows: a CUDA context does not survive some
            # errors. The server starts another.
            raise SystemExit(1) from error


@contextlib.contextmanager
def _leaving(group: Group, channel: Channel) -> Iterator[None]:
    """End the group with what came to this process alone: the others are in midst of the task."""
    if group.size == 1:
        yield
        return
    channel.send("leaving")
    yield
    raise SystemExit(1)


def work(
    worker: Worker,
    channel: Channel,
    command: Mapping[str, Any],
    traces: tracing.Tracing | None = None,
) -> int:
    """Carry out one "learn" or "edit" command; return the number of the new version."""
    task, kind, parent = command["task"], command["command"], command["parent"]
    with contextlib.ExitStack() as stack:
        report = partial(channel.report, task)
        if traces is None:
            tracker = Tracker(report)
        else:
            span = traces.task(kind, task, command.get("traceparent", ""))
            tracker = Tracker(report, stack.enter_context(span))
        limits = Gate.model_validate(command["gate"])
        if kind == "edit":
            change = _EDIT.validate_python(command["edit"])
            return worker.edit(task, change, parent, tracker, limits)
        config = LearnConfig.model_validate(command["settings"])
        return worker.learn(task, Path(command["spool"]), config, parent, tracker, limits)


def _fail_for_memory(channel: Channel, task: str | None) -> None:
    log.exception("out of memory")
    _fail(channel, task, LimitExceededError("out of memory; try a smaller batch_size"))


def _fail(channel: Channel, task: str | None, error: InfloraError) -> None:
    channel.send("failed", task=task, reason=error.reason, message=error.message, field=error.field)


def _let_others_first(nice: int) -> None:
    """Have the kernel prefer other processes."""
    os.nice(nice)
    if os.getsid(0) == os.getpid():
        # Where Linux groups processes by session, it weighs groups, and what is nice within one of
        # its own counts for nothing.
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="InfLoRA learning worker; started by the server.")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all processors but one")
    parser.add_argument("--memory-bytes", type=int, default=0, help="0: any")
    parser.add_argument("--precision", default="auto", choices=get_args(Precision))
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--nice", type=int, default=10, help="0 to 19, how far others come first")
    parser.add_argument("--log-format", default="text", choices=get_args(logs.Format))
    args = parser.parse_args()
    allocator.share()  # before there are threads
    logs.configure(args.log_format, logging.INFO, "worker", "worker: %(levelname)s %(message)s")
    # Libraries print to standard output; only events may.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    leads = os.environ.get("RANK", "0") == "0"
    channel = Channel(sys.stdin, events) if leads else None
    _let_others_first(args.nice)
    with contextlib.suppress(OSError):
        # Should memory run out, this process has to go, not the one that predicts.
        Path("/proc/self/oom_score_adj").write_text("1000")
    if args.memory_bytes:
        # Of what is written to, not of address space: libraries map far more than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory_bytes, args.memory_bytes))
        # What does not fit is tried again in parts, and must not find the limit taken up by what
        # was freed. Without a limit, steps are a little faster.
        allocator.keep_apart()
    # One processor is left to predictions. With a thread on that one, too, every parallel section
    # of the training would wait for a thread that, at this priority, hardly ever runs.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = args.threads or max(1, (processors() - 1) // beside)
    torch.set_num_threads(threads)
    device = device_of(args.device)
    if args.deterministic:
        make_deterministic()
    group = Group.of_environment(device)
    compute = Compute(device, halves(args.precision, device, limited=args.memory_bytes > 0), group)
    store = Store.open(args.store)
    worker = Worker(store, compute, threads)
    if channel is not None:
        store.clear_drafts()
        serve(worker, channel, tracing.begin("worker"))
        return
    try:
        worker.follow()
    except LostRankError as error:
        log.info("rank %d ends: %s", group.rank, error)
        raise SystemExit(1) from None


def device_of(name: str) -> torch.device:
    """Return the device called ``auto``, ``cpu`` or ``cuda``; of several GPUs, this process's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def make_deterministic() -> None:
    """Have GPUs give the same bits twice, at a price in speed. CPUs do anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


if __name__ == "__main__":
    main()
