"""What a file sets: defaults of options, which the environment and flags come before.

The file is TOML. Its keys are options that stand before a command; a table holds those of the
command that it is named like, and ``[serve]`` those of the server, which reads them itself.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from inflora_client.cli.session import EXIT_USAGE, fail

SERVE = "serve"
"""The server's table, in the same file."""

_ORIGINS = {
    "COMMANDLINE": "flag",
    "ENVIRONMENT": "environment",
    "DEFAULT_MAP": "file",
    "DEFAULT": "default",
}
"""What click calls where a value comes from, and what people do."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option before the command.

    Attributes:
        option: Its name in the file.
        value: What holds; None if nothing does.
        origin: ``flag``, ``environment``, ``file`` or ``default``.
    """

    option: str
    value: str | bool | None
    origin: str


def default_file() -> Path:
    """Return where the file is unless another one is named."""
    return Path(typer.get_app_dir("inflora")) / "config.toml"


def read(context: typer.Context, named: Path | None) -> Path | None:
    """Take the defaults of all commands from a file; return which, None if there is none.

    Ends the command if it cannot be read, or sets what there is not.
    """
    path = named or default_file()
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if named is None:
            return None
        fail(f"there is no configuration file {path} (--config, INFLORA_CONFIG)", EXIT_USAGE)
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}", EXIT_USAGE)
    context.default_map = _defaults(context.command, content, str(path))
    return path


def settings(context: typer.Context) -> Iterator[Setting]:
    """Yield the options before the command, with where each comes from."""
    root: Any = context.find_root()
    for name, parameter in _options(root.command).items():
        if parameter.name in root.params and not parameter.is_eager:
            value = root.params[parameter.name]
            source = root.get_parameter_source(parameter.name)
            shown = str(value) if isinstance(value, Path) else value
            yield Setting(name, shown, _ORIGINS[source.name])


def _defaults(command: Any, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a table as click takes it: by the names of parameters, not of options."""
    options, commands = _options(command), getattr(command, "commands", {})
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key in commands:
            if key != SERVE:
                found[key] = _defaults(commands[key], value, f"{where} [{key}]")
        elif isinstance(value, dict) or key not in options:
            kind, there = ("table", commands) if isinstance(value, dict) else ("option", options)
            near = difflib.get_close_matches(key, there, 1)
            hint = f": is it {near[0]!r}?" if near else f"; there are {', '.join(there)}"
            fail(f"{where}: there is no {kind} {key!r}{hint}", EXIT_USAGE)
        else:
            found[options[key].name] = value
    return found


def _options(command: Any) -> dict[str, Any]:
    """Return a command's parameters by their options, but for those that a file cannot set."""
    return {
        option.removeprefix("--"): parameter
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and parameter.expose_value and option != "--config"
    }
