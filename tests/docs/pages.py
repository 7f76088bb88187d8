"""The fenced blocks of the project's Markdown, and how each of them is checked.

A block of commands or of Python is run, unless a comment on the line before its fence says what is
done in place of that, and why:

    <!-- run: may end with 2 -->                    run; the last status that is no fault
    <!-- run: parse; needs a model hub -->          only parsed, by the programs' own parsers
    <!-- run: dry; needs a cluster -->              kubectl, as far as it goes without one
    <!-- run: make check-image; needs buildah -->   that target runs it; or a file of tests does

What CSV, JSON, TOML and YAML hold is parsed; ``text`` is for people.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from tests.benchmarks.checkout import ROOT

COMMANDS = frozenset({"console", "sh"})
PROGRAMS = COMMANDS | {"python"}
DATA = frozenset({"csv", "json", "toml", "yaml"})
OTHERS = frozenset({"c", "js", "proto", "ts"})
"""Programs that this cannot run: each has to say what does."""
TEXT = frozenset({"text"})

_OPEN = re.compile(r"( *)(`{3,})(\S*)\s*$")
_NOTE = re.compile(r" *<!-- run: ([^;]+?)(?:; (.+?))? -->$")
_MAY_END = re.compile(r"may end with (\d+)")
_INDENTED = re.compile(r" {4,}\S")
_ITEM = re.compile(r" *([-*]|\d+\.) ")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of its file, from the repository's root.
        line: Number of the line with its fence.
        language: What stands behind the fence.
        text: What it holds, without indentation.
        note: What is done in place of running it; "" if nothing is said.
        reason: Why.
    """

    page: str
    line: int
    language: str
    text: str
    note: str = ""
    reason: str = ""

    @property
    def where(self) -> str:
        """``page:line``."""
        return f"{self.page}:{self.line}"

    @property
    def may_end_with(self) -> int:
        """The status other than 0 that is no fault."""
        match = _MAY_END.fullmatch(self.note)
        return int(match[1]) if match else 0

    @property
    def kind(self) -> str:
        """``run``, ``parsed``, ``dry``, ``elsewhere``, ``data`` or ``text``."""
        if self.language in OTHERS:
            return "elsewhere"
        if self.language not in PROGRAMS:
            return "data" if self.language in DATA else "text"
        if not self.note or self.may_end_with:
            return "run"
        return {"parse": "parsed", "dry": "dry"}.get(self.note, "elsewhere")

    def commands(self) -> list[tuple[str, list[str]]]:
        """Return the commands of a block, each with the lines that it is said to print."""
        if self.language != "console":
            return [(self.text, [])]
        found: list[tuple[str, list[str]]] = []
        continued = False
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif continued:
                command, prints = found.pop()
                found.append((f"{command}\n{line}", prints))
            elif found:
                found[-1][1].append(line)
            else:
                raise ValueError(f"{self.where}: begins with neither '$ ' nor a command")
            continued = line.endswith("\\")
        return found


def pages() -> list[str]:
    """List all Markdown files of the repository, from its root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def blocks_of(page: str) -> list[Block]:
    """Read the fenced blocks of a page, in their order."""
    return read((ROOT / page).read_text(encoding="utf-8"), page)


def read(text: str, page: str) -> list[Block]:
    """Read the fenced blocks of a text."""
    lines = text.splitlines()
    found: list[Block] = []
    at = 0
    while at < len(lines):
        opened = _OPEN.match(lines[at])
        if not opened:
            at += 1
            continue
        indent, fence, language = opened.groups()
        end = at + 1
        while lines[end].strip() != fence:
            end += 1
        body = [line.removeprefix(indent) for line in lines[at + 1 : end]]
        note = _NOTE.match(lines[at - 1]) if at else None
        said = ("", "") if note is None else (note[1], note[2] or "")
        found.append(Block(page, at + 1, language, "\n".join([*body, ""]), *said))
        at = end + 1
    return found


def indented(text: str) -> list[int]:
    """Return the numbers of lines that are code by their indentation alone: nobody would run it."""
    found: list[int] = []
    fence = ""
    in_list = False
    before = ""
    for number, line in enumerate(text.splitlines(), 1):
        opened = _OPEN.match(line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif opened:
            fence = opened[2]
        elif line.strip():
            in_list = bool(_ITEM.match(line)) or (in_list and line.startswith(" "))
            if not in_list and not before.strip() and _INDENTED.match(line):
                found.append(number)
        before = line
    return found


def is_page_with_commands(page: str) -> bool:
    """Whether anything on the page is run."""
    return any(block.kind in ("run", "dry") for block in blocks_of(page))
