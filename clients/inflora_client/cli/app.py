"""The commands. Each connects, makes one call of ``Client``, and shows what came back."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from inflora_client import InvalidArgumentError, LearnOptions
from inflora_client._access import Access
from inflora_client._base import DEFAULT_TARGET
from inflora_client._bench import MAX_CALLS, MAX_SECONDS, Bounds
from inflora_client._calls import Question
from inflora_client._names import Names
from inflora_client.cli import benching, learning, render, tokens, uploading
from inflora_client.cli.picture import draw
from inflora_client.cli.session import (
    EXIT_REFUSED,
    EXIT_USAGE,
    JsonOption,
    ServerOption,
    Session,
    fail,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=(
        "Exit codes: 0 done; 1 the server refused, or the task did not end as published; "
        "2 wrong usage, or a file that cannot be read or written; 3 the server cannot be reached; "
        "130 interrupted with Ctrl-C (a task that was uploaded goes on)."
    ),
)

TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="Id or full name of a task.")]
DetachOption = Annotated[bool, typer.Option("--detach", help="Return once the task is queued.")]

FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        help="Holds one sub-folder of images for each class, named like the class.",
    ),
]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(help="Only these classes, with commas between; may be repeated."),
]


@app.callback()
def options(
    context: typer.Context,
    server: Annotated[
        str,
        typer.Option(
            "--server",
            envvar="INFLORA_SERVER",
            metavar="HOST:PORT",
            help="Address of the server; dns:///HOST:PORT takes turns between all that it names.",
        ),
    ] = DEFAULT_TARGET,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, for programs.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="INFLORA_TOKEN_FILE", metavar="FILE", help="Holds the token that says who calls."
        ),
    ] = None,
    tls: Annotated[
        bool,
        typer.Option("--tls", envvar="INFLORA_TLS", help="Encrypt; implied by --ca and --cert."),
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(
            envvar="INFLORA_CA",
            metavar="FILE",
            help="Who signed the server's certificate, if not one of gRPC's own list (PEM).",
        ),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option(envvar="INFLORA_CERT", metavar="FILE", help="Certificate of who calls (PEM)."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(envvar="INFLORA_KEY", metavar="FILE", help="Its private key (PEM)."),
    ] = None,
) -> None:
    """Teach an image classifier that never stops learning, and ask it."""
    try:
        access = Access(token_file=token_file, tls=tls, ca=ca, cert=cert, key=key)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    context.obj = Session(server, as_json, access)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Start a server here; all arguments are the server's (try: inflora serve --help)."""
    _become("inflora_service", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def doctor(context: typer.Context) -> None:
    """Check the store of a server that is stopped, and repair it (try: inflora doctor --help)."""
    session: Session = context.obj
    _become("inflora_service.doctor", [*context.args, *(["--json"] if session.as_json else [])])


@app.command()
def token(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Who it is for, as the audit log will have it.")
    ],
    role: Annotated[tokens.Role, typer.Option(help="What they may do.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write it (default: NAME.token); a new file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token, and print what the server's --tokens file is to know of it."""
    session = Session.of(context, None, as_json)
    made = tokens.make(name, role, out or Path(f"{name}.token"))
    session.show([made], tokens.entry(made))


def _become(module: str, arguments: list[str]) -> NoReturn:
    if importlib.util.find_spec("inflora_service") is None:
        fail(
            "the server is not installed here, only the client; install the package "
            "'inflora-server' with the extras 'learner' and 'cpu' (or 'gpu')",
            EXIT_USAGE,
        )
    # Replaced, not wrapped: signals and the exit code are the server's own.
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@app.command()
def learn(
    context: typer.Context,
    folder: FolderArgument,
    classes: ClassesOption = None,
    name: Annotated[str, typer.Option(help="Free text that tells the task from others.")] = "",
    request_id: Annotated[
        str, typer.Option(help="Repeating an upload with the same id does no harm.")
    ] = "",
    epochs: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Passes over the images.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, max=10, help="Base learning rate.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Upper bound of the update's rank.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Images per step.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of every random choice.")
    ] = None,
    held_out_share: Annotated[
        float | None,
        typer.Option(min=0, max=0.5, help="Share of the images kept to measure accuracy."),
    ] = None,
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach the classes of a folder, and show the progress. What is not given, the server sets."""
    session = Session.of(context, server, as_json)
    examples = uploading.examples_of(folder, classes or ())
    options: LearnOptions = {
        "display_name": name,
        "request_id": request_id,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "rank": rank,
        "batch_size": batch_size,
        "seed": seed,
        "held_out_share": held_out_share,
    }
    with session.client() as client:
        task = uploading.upload(examples, lambda counted: client.learn(counted, **options))
        learning.queued(session, client, task, detach)


@app.command()
def forget(
    context: typer.Context,
    labels: Annotated[
        list[str], typer.Argument(metavar="LABEL...", help="Labels or aliases of classes.")
    ],
    purge: Annotated[
        bool,
        typer.Option(
            "--purge", help="Delete the data of all older versions that know them, for good."
        ),
    ] = False,
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget classes for good: no version will know them any more."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        learning.queued(session, client, client.forget(labels, purge=purge), detach)


@app.command()
def rename(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Label of a class, or an alias.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its label from now on.")],
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a class another label."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        learning.queued(session, client, client.update_class(old, new_label=new), detach)


@app.command()
def alias(
    context: typer.Context,
    label: Annotated[str, typer.Argument(metavar="LABEL", help="Label of a class, or an alias.")],
    aliases: Annotated[
        list[str],
        typer.Argument(metavar="ALIAS...", help="Names under which examples of it may arrive."),
    ],
    remove: Annotated[bool, typer.Option("--remove", help="Take the aliases away.")] = False,
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a class more names; predictions go on naming its label."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        if remove:
            task = client.update_class(label, remove_aliases=aliases)
        else:
            task = client.update_class(label, add_aliases=aliases)
        learning.queued(session, client, task, detach)


@app.command()
def watch(
    context: typer.Context,
    task: TaskArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the progress of a task until it ends."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        learning.follow(session, client, task)


@app.command()
def cancel(
    context: typer.Context,
    task: TaskArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give up a task that has not ended."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        tasks = [client.cancel(task)]
        session.show(tasks, render.task_table(tasks))


@app.command()
def retry(
    context: typer.Context,
    task: TaskArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try a task again that was set aside."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        tasks = [client.retry(task)]
        session.show(tasks, render.task_table(tasks))


@app.command()
def tasks(context: typer.Context, server: ServerOption = None, as_json: JsonOption = False) -> None:
    """List the tasks, newest first."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        found = list(client.tasks())
        session.show(found, render.task_table(found))


@app.command()
def predict(
    context: typer.Context,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", exists=True, dir_okay=False)],
    top_k: Annotated[
        int, typer.Option(min=1, max=100_000, help="Classes to show for each image.")
    ] = 1,
    task: Annotated[str | None, typer.Option(help="Only the classes of this task compete.")] = None,
    version: Annotated[
        str | None, typer.Option(help="Ask this version instead of the current one.")
    ] = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify image files."""
    session = Session.of(context, server, as_json)
    answers: list[render.FileAnswer] = []
    with session.client() as client:
        for path in images:
            try:
                result = client.predict([path], top_k, version, task)
            except InvalidArgumentError as error:
                fail(f"{path}: {error}", EXIT_REFUSED)
            answers.append(render.FileAnswer.of(path, result))
    session.show(answers, render.prediction_table(answers))


@app.command()
def evaluate(
    context: typer.Context,
    folder: FolderArgument,
    classes: ClassesOption = None,
    version: Annotated[
        str | None, typer.Option(help="Measure this version instead of the current one.")
    ] = None,
    confusions: Annotated[
        int, typer.Option(min=1, max=10_000, help="Kinds of errors to show.")
    ] = 20,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a version on labelled images; the server keeps nothing of them."""
    session = Session.of(context, server, as_json)
    examples = uploading.examples_of(folder, classes or ())
    with session.client() as client:
        found = uploading.upload(
            examples, lambda counted: client.evaluate(counted, version, confusions)
        )
        session.show([found], render.evaluation_view(found))


@app.command()
def bench(
    context: typer.Context,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGE...]",
            exists=True,
            dir_okay=False,
            help="Sent in turn; one is made if none is given.",
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Closed loop: so many clients at a time, one load for each number (default: 1).",
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="CALLS",
            help="Open loop: so many calls a second, however long they take; may be repeated. "
            "Latency counts from when a call was due.",
        ),
    ] = None,
    constant: Annotated[
        bool, typer.Option("--constant", help="Open loop: calls come evenly, not at random.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=MAX_SECONDS, help="Length of each load.")
    ] = 10.0,
    calls: Annotated[
        int, typer.Option(min=1, max=MAX_CALLS, help="Most calls of each load.")
    ] = MAX_CALLS,
    warm_up: Annotated[
        float, typer.Option(min=0, max=MAX_SECONDS, help="Seconds before each that do not count.")
    ] = 1.0,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Images of each call.")] = 1,
    deadline: Annotated[
        float, typer.Option(min=0.001, max=MAX_SECONDS, help="Seconds that each call has.")
    ] = 60.0,
    version: Annotated[
        str | None, typer.Option(help="Ask this version instead of the current one.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of calls that come at random.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Draw latencies, as SVG.")
    ] = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast the server predicts under load. Nothing is asked twice."""
    session = Session.of(context, server, as_json)
    loads = benching.loads_of(concurrency, rate or (), constant, seed)
    contents = benching.images_of(images or ())
    with session.client() as client:
        for path, content in zip(images or [Path("the image")], contents, strict=True):
            try:  # whatever is refused now, all calls would be refused for
                client.predict([content], 1, version)
            except InvalidArgumentError as error:
                fail(f"{path}: {error}", EXIT_REFUSED)
    question = Question(Names("models/default"), 1, version, task=None, return_embedding=False)
    bounds = Bounds(seconds, calls, warm_up, deadline)
    report = benching.measure(session, question, contents, batch, loads, bounds)
    if picture is not None:
        try:
            picture.write_text(draw(report.loads, f"Predict at {session.server}"))
        except OSError as error:
            fail(str(error), EXIT_USAGE)
    session.show([report], render.bench_view(report.loads))
    benching.end_unanswered(report)


@app.command()
def versions(
    context: typer.Context, server: ServerOption = None, as_json: JsonOption = False
) -> None:
    """List the published versions, newest first."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        found = list(client.versions())
        session.show(found, render.version_table(found))


@app.command()
def promote(
    context: typer.Context,
    version: Annotated[str, typer.Argument(metavar="N", help="Number of a version.")],
    force: Annotated[
        bool, typer.Option("--force", help="Take a candidate that was held back, too.")
    ] = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version answer; promoting an older one rolls back."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        found = [client.promote(version, force=force)]
        session.show(found, render.version_table(found))


@app.command()
def pin(
    context: typer.Context,
    version: Annotated[str, typer.Argument(metavar="N", help="Number of a version.")],
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a version however old it is."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        found = [client.pin(version)]
        session.show(found, render.version_table(found))


@app.command()
def unpin(
    context: typer.Context,
    version: Annotated[str, typer.Argument(metavar="N", help="Number of a version.")],
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a pinned version go when it is old."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        found = [client.unpin(version)]
        session.show(found, render.version_table(found))


@app.command()
def export(
    context: typer.Context,
    version: Annotated[str, typer.Option(help="Number of a version, or 'current'.")] = "current",
    output: Annotated[
        Path, typer.Option(help="File to write, or a folder to write model.onnx into.")
    ] = Path("model.onnx"),
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a version as an ONNX file, and verify it."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        file = client.download(version, to=output)
        session.show(
            [file],
            f"{file.path}: version {render.short(file.version)}, {file.artifact.size} bytes, "
            f"SHA-256 {file.artifact.sha256}",
        )


def main() -> None:
    """Run the command, and exit with its code."""
    app(prog_name="inflora")
