"""Where the server's options come from: flags, else the environment, else a file, else defaults."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

PREFIX = "INFLORA_SERVE_"
"""Of variables that set options: ``INFLORA_SERVE_KEEP_VERSIONS`` is ``--keep-versions``."""

FILE_VARIABLE = "INFLORA_CONFIG"
"""Names the file, where ``--config`` does not."""

TABLE = "serve"
"""What the file has for the server; the rest is the ``inflora`` command's."""

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Parser(argparse.ArgumentParser):
    """Says where what is wrong stands, if not on the command line."""

    _where = ""

    def error(self, message: str) -> NoReturn:
        """End the process with a message; the usage is a screen long, and would hide it."""
        self.exit(2, f"{self.prog}: error: {self._where}{message} (see --help)\n")

    def settled(
        self, words: Sequence[str], environ: Mapping[str, str]
    ) -> tuple[argparse.Namespace, dict[str, str]]:
        """Return what holds, and where it comes from: ``flag``, ``environment`` or ``file``.

        What can be given more than once adds up, flags last.

        Args:
            words: The command line, without the program.
            environ: The environment.
        """
        flags = self._given(words)
        path = flags.get("config") or environ.get(FILE_VARIABLE)
        sources = {
            "file": self._of_table(Path(path)) if path else {},
            "environment": self._of_environment(environ),
            "flag": flags,
        }
        result, origins = self.parse_args([]), {}
        for origin, given in sources.items():
            for name, value in given.items():
                before = getattr(result, name, None) if name in origins else None
                added = isinstance(value, list)
                setattr(result, name, [*(before or ()), *value] if added else value)
                origins[name] = origin
        return result, origins

    def shown(self, result: argparse.Namespace, origins: Mapping[str, str]) -> str:
        """Return what holds as the table of a file, with where it comes from."""
        lines = [f"[{TABLE}]"]
        for name, action in self._settable().items():
            value = getattr(result, action.dest, None)
            if value is not None:
                plain = value if isinstance(value, bool | int | float | list) else str(value)
                lines.append(
                    f"{name} = {json.dumps(plain)}  # {origins.get(action.dest, 'default')}"
                )
        return "\n".join(lines)

    def _settable(self) -> dict[str, argparse.Action]:
        """Return the options that file and environment may set, by their names without dashes."""
        return {
            option.removeprefix("--"): action
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--") and action.dest not in ("help", "config", "show_config")
        }

    def _given(self, words: Sequence[str]) -> dict[str, Any]:
        """Return what the words set, by destination; nothing for what they do not."""
        blank = argparse.Namespace(**dict.fromkeys(action.dest for action in self._actions))
        given = vars(self.parse_args(words, blank))
        return {name: value for name, value in given.items() if value is not None}

    def _of_table(self, path: Path) -> dict[str, Any]:
        self._where = f"{path}: "
        try:
            table = tomllib.loads(path.read_text("utf-8")).get(TABLE, {})
        except (OSError, ValueError) as error:
            self.error(str(error))
        if not isinstance(table, dict):
            self.error(f"{TABLE!r} has to be a table, [{TABLE}]")
        self._where = f"{path} [{TABLE}]: "
        return self._of({str(key): value for key, value in table.items()})

    def _of_environment(self, environ: Mapping[str, str]) -> dict[str, Any]:
        self._where = "environment: "
        entries = {
            name.removeprefix(PREFIX).lower().replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith(PREFIX)
        }
        return self._of(entries)

    def _of(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return what entries set, by destination."""
        settable, words, off = self._settable(), [], {}
        for name, value in entries.items():
            action = settable.get(name)
            if action is None:
                self.error(f"there is no option {name!r}")
            if action.nargs == 0:
                if str(value).lower() not in (*_TRUE, *_FALSE):
                    self.error(f"argument --{name}: {value!r} is neither true nor false")
                if str(value).lower() in _TRUE:
                    words.append(f"--{name}")
                else:
                    off[action.dest] = False
            else:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}={each}" for each in values]
        try:
            return {**off, **self._given(words)}
        finally:
            self._where = ""
