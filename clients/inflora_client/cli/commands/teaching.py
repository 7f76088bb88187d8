"""Commands that make a task: learn, forget, rename, give aliases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from inflora_client import Client, LearnOptions
from inflora_client.cli import learning, starting, uploading
from inflora_client.cli.commands.arguments import (
    ClassesOption,
    DetachOption,
    JsonOption,
    LabelColumnOption,
    LabelsArgument,
    PathColumnOption,
    ServerOption,
    SourceArgument,
    SplitOption,
    examples,
    label_argument,
)
from inflora_client.cli.session import EXIT_INTERRUPTED, Session, agrees, note, someone_answers
from inflora_client.cli.sources import Choice
from inflora_client.cli.sources.common import listed

app = typer.Typer()

_PANEL = "Teach"


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "inflora learn photos/",
        "inflora learn photos/ --classes cat,dog --epochs 5 --name pets",
        "inflora learn train.csv --path-column picture",
        "inflora learn photos.tar.gz --start-server",
        "inflora learn cifar10/ --split test --detach",
    ),
)
def learn(
    context: typer.Context,
    source: SourceArgument,
    classes: ClassesOption = None,
    split: SplitOption = None,
    path_column: PathColumnOption = None,
    label_column: LabelColumnOption = None,
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
    start_server: Annotated[
        bool,
        typer.Option(
            "--start-server",
            help="If no server listens, start one in the background; without this it is asked.",
        ),
    ] = False,
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach the classes of a source, and show the progress. What is not given, the server sets.

    Ctrl-C asks whether to leave the task to itself or to cancel it.
    """
    session = Session.of(context, server, as_json)
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
    with uploading.examples_of(
        source, Choice(classes or (), split, path_column, label_column)
    ) as found:
        starting.make_sure(context, session, start_server)
        with session.client() as client:
            task = uploading.upload(found, lambda counted: client.learn(counted, **options))
            learning.queued(session, client, task, detach)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("inflora forget dog", 'inflora forget "Jane Doe" --purge'),
)
def forget(
    context: typer.Context,
    labels: LabelsArgument,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge", help="Delete the data of all older versions that know them, for good."
        ),
    ] = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Purge without asking; without a terminal nobody is asked."),
    ] = False,
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget classes for good: no version will know them any more."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        if purge and not yes and someone_answers():
            _confirm(client, labels)
        learning.queued(session, client, client.forget(labels, purge=purge), detach)


def _confirm(client: Client, labels: Sequence[str]) -> None:
    """Ask whether the versions that a purge deletes may go; end the command if not.

    A class that was renamed, or forgotten before, can be known to more of them than its names tell.
    """
    numbers = sorted(
        version.number
        for version in client.versions()
        if not version.purged and any({c.label, *c.aliases} & set(labels) for c in version.classes)
    )
    which = f" ({listed(map(str, numbers))})" if numbers else ""
    question = f"Delete for good all versions that know {', '.join(labels)} so far{which}?"
    if not agrees(question, default=False):
        note("nothing was forgotten; without --purge, older versions are kept and hide the class")
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command(rich_help_panel=_PANEL, epilog=examples("inflora rename dog hound"))
def rename(
    context: typer.Context,
    old: Annotated[str, label_argument("OLD")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its label from now on.")],
    detach: DetachOption = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a class another label."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        learning.queued(session, client, client.update_class(old, new_label=new), detach)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("inflora alias dog hound puppy", "inflora alias dog puppy --remove"),
)
def alias(
    context: typer.Context,
    label: Annotated[str, label_argument("LABEL")],
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
