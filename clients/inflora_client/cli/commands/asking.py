"""Commands that have images classified: to know, to measure accuracy, to measure speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inflora_client import InvalidArgumentError, PredictResult
from inflora_client._bench import MAX_CALLS, MAX_SECONDS, Bounds
from inflora_client._calls import Question
from inflora_client._names import Names
from inflora_client.cli import benching, completing, predicting, render, uploading
from inflora_client.cli.commands.arguments import (
    ClassesOption,
    JsonOption,
    LabelColumnOption,
    PathColumnOption,
    ServerOption,
    SourceArgument,
    SplitOption,
    VersionOption,
    examples,
)
from inflora_client.cli.picture import draw
from inflora_client.cli.session import EXIT_REFUSED, EXIT_USAGE, Session, fail, of_file
from inflora_client.cli.sources import Choice

app = typer.Typer()

_PANEL = "Ask"


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "inflora predict new.jpg another.png",
        "inflora predict photos/ --top-k 3 --keep-going",
        "curl -s https://example.org/cat.jpg | inflora predict -",
        "find photos -name '*.jpg' | inflora --json predict --list -",
    ),
)
def predict(
    context: typer.Context,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="Files; folders, in which all images are meant; '-' for one over stdin.",
        ),
    ],
    names: Annotated[
        bool, typer.Option("--list", help="What comes over stdin is names of files, one a line.")
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going", help="Go on without images that cannot be read or are refused."
        ),
    ] = False,
    top_k: Annotated[
        int, typer.Option(min=1, max=100_000, help="Classes to show for each image.")
    ] = 1,
    task: Annotated[
        str | None,
        typer.Option(
            help="Only the classes of this task compete.", autocompletion=completing.task_ids
        ),
    ] = None,
    version: VersionOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images, several a call; of many, answers are shown as they arrive."""
    session = Session.of(context, server, as_json)
    problems = predicting.Problems(keep_going)
    files = predicting.files_of(images, names)
    width: int | None = None
    with session.client() as client:

        def ask(contents: predicting.Contents) -> PredictResult:
            return client.predict(contents, top_k, version, task)

        for answers in predicting.answers(files, ask, problems):
            table = render.prediction_table(answers, first=width is None, width=width or 0)
            session.show(answers, table)
            width = width or max(len(str(answer.file)) for answer in answers)
    problems.end()


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "inflora evaluate test-photos/",
        "inflora evaluate test.csv --version 3 --confusions 5",
    ),
)
def evaluate(
    context: typer.Context,
    source: SourceArgument,
    classes: ClassesOption = None,
    split: SplitOption = None,
    path_column: PathColumnOption = None,
    label_column: LabelColumnOption = None,
    version: VersionOption = None,
    confusions: Annotated[
        int, typer.Option(min=1, max=10_000, help="Kinds of errors to show.")
    ] = 20,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a version on labelled images; the server keeps nothing of them."""
    session = Session.of(context, server, as_json)
    choice = Choice(classes or (), split, path_column, label_column)
    with uploading.examples_of(source, choice) as examples, session.client() as client:
        found = uploading.upload(
            examples, lambda counted: client.evaluate(counted, version, confusions)
        )
        session.show([found], render.evaluation_view(found))


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "inflora bench --concurrency 1,8,32",
        "inflora bench new.jpg --rate 50 --seconds 30 --picture latency.svg",
    ),
)
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
    version: VersionOption = None,
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
            fail(of_file(error), EXIT_USAGE)
    session.show([report], render.bench_view(report.loads))
    benching.end_unanswered(report)
