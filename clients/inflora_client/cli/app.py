"""The ``inflora`` command: options that stand before all commands, and the commands together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inflora_client._access import Access
from inflora_client._base import DEFAULT_TARGET
from inflora_client.cli import configuring, render
from inflora_client.cli.commands import asking, hosting, tasks, teaching, versions
from inflora_client.cli.commands.arguments import examples
from inflora_client.cli.session import EXIT_USAGE, JsonOption, Session, fail, note

_EXIT_CODES = """\
Exit codes:
0    done
1    the server refused, a task was not published, or an image was left out
2    wrong usage, or a file that cannot be read or written
3    the server cannot be reached
130  interrupted with Ctrl-C, or by your answer; an uploaded task goes on unless you cancel it
Of 'inflora serve': 0 stopped by a signal, 1 cannot start, 2 wrong usage.
Of 'inflora doctor': 0 sound, 1 damaged, 2 wrong usage, or cannot look."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=examples("inflora learn photos/") + "\n\n" + _EXIT_CODES,
)


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
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            envvar="INFLORA_CONFIG",
            metavar="FILE",
            callback=configuring.read,
            is_eager=True,  # before all that it sets
            help=f"Sets options, as TOML (default: {configuring.default_file()}, if it is there).",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", envvar="INFLORA_JSON", help="Print one JSON object a line, for programs."
        ),
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
    """Teach an image classifier that never stops learning, and ask it.

    Flags come before variables of the environment, and both before the configuration file.
    """
    try:
        access = Access(token_file=token_file, tls=tls, ca=ca, cert=cert, key=key)
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    context.obj = Session(server, as_json, access)


for _subject in (teaching, asking, tasks, versions, hosting):
    app.add_typer(_subject.app)

config_app = typer.Typer(no_args_is_help=True, help="What is configured, and by what.")
app.add_typer(config_app, name="config", rich_help_panel="Settings")


@config_app.command(epilog=examples("inflora config show"))
def show(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the options before a command, and where each comes from."""
    session = Session.of(context, None, as_json)
    found = list(configuring.settings(context))
    session.show(found, render.setting_table(found))
    if not session.as_json:
        file = context.find_root().params["config"]
        note(f"file: {file or f'none ({configuring.default_file()})'}")
        note("the server's own options: inflora serve --show-config")


def main() -> None:
    """Run the command, and exit with its code."""
    app(prog_name="inflora")
