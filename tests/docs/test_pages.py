"""The docs as text: fenced blocks are run, parsed or accounted for, and links lead somewhere."""

from __future__ import annotations

import csv
import json
import posixpath
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.benchmarks.checkout import ROOT
from tests.docs import commands, pages, sandbox
from tests.docs.pages import Block

PAGES = pages.pages()
BLOCKS = [block for page in PAGES for block in pages.blocks_of(page)]


def csv_rows(text: str) -> list[list[str]]:
    """Read rows of one length."""
    rows = list(csv.reader(text.splitlines()))
    assert len({len(row) for row in rows}) == 1
    return rows


LANGUAGES = pages.PROGRAMS | pages.OTHERS | pages.DATA | pages.TEXT
_READ = {"csv": csv_rows, "json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def of(kind: str) -> list[pytest.param]:
    return [pytest.param(block, id=block.where) for block in BLOCKS if block.kind == kind]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    sandbox.write_photos(folder)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_accounted_for(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not pages.indented(text), "code by indentation: nothing would run it, use a fence"
    for block in pages.blocks_of(page):
        assert block.language in LANGUAGES, f"{block.where}: name its language, one of {LANGUAGES}"
        if block.kind in ("parsed", "dry", "elsewhere"):
            assert block.reason, f"{block.where}: say why it is not run"
        assert not block.note or block.kind not in ("data", "text"), block.where


@pytest.mark.parametrize("block", of("data"))
def test_data_can_be_read(block: Block) -> None:
    assert _READ[block.language](block.text)


@pytest.mark.parametrize("block", [*of("run"), *of("parsed"), *of("dry"), *of("elsewhere")])
def test_programs_have_no_error_of_grammar(block: Block) -> None:
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language in pages.COMMANDS:
        for command, _ in block.commands():
            assert commands.bash_reads(command) == "", block.where


@pytest.mark.parametrize("block", of("parsed"))
def test_commands_that_are_not_run_are_parsed(block: Block, photos: Path) -> None:
    for command, _ in block.commands():
        commands.check(command, photos)


@pytest.mark.parametrize("block", of("elsewhere"))
def test_what_runs_it_in_place_of_this_is_there(block: Block) -> None:
    assert commands.elsewhere(block.note), f"{block.where}: there is no {block.note}"


@pytest.mark.parametrize(
    "command",
    [
        "inflora serve --no-such-option",
        "inflora lern photos/",
        "inflora learn photos/ --epochs none",
        "inflora-edge follow",
        "make no-such-target",
        "npm run nothing",
        "unknown-program",
    ],
)
def test_wrong_commands_are_found(command: str, photos: Path) -> None:
    with pytest.raises(commands.CannotParseError):
        commands.check(command, photos)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_on_a_git_host(page: str) -> None:
    text = prose((ROOT / page).read_text(encoding="utf-8"))
    for link in _LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), name)) if name else page
        assert (ROOT / there).exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(there), f"{page}: {link}"


def prose(text: str) -> str:
    """Return a page without its code."""
    return re.sub(r"^ *(`{3,}).*?^ *\1 *$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as a git host makes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    bare = re.sub(r"^ *(`{3,}).*?^ *\1 *$", "", text, flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in _HEADING.findall(bare):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(words)
    return found


class TestReading:
    def test_a_note_belongs_to_the_block_behind_it(self) -> None:
        text = "<!-- run: parse; far away -->\n```console\n$ a \\\n  b\nsaid\n```\n```sh\nc\n```\n"
        first, second = pages.read(text, "page.md")
        assert (first.kind, first.reason, first.line) == ("parsed", "far away", 2)
        assert first.commands() == [("a \\\n  b", ["said"])]
        assert (second.kind, second.commands()) == ("run", [("c\n", [])])

    def test_a_block_within_a_list_loses_its_indentation(self) -> None:
        (block,) = pages.read("- so:\n\n  ```python\n  if x:\n      y\n  ```\n", "page.md")
        assert block.text == "if x:\n    y\n"

    def test_a_status_that_is_no_fault(self) -> None:
        (block,) = pages.read("<!-- run: may end with 2 -->\n```console\n$ a\n```\n", "page.md")
        assert (block.kind, block.may_end_with) == ("run", 2)

    def test_output_before_any_command_is_refused(self) -> None:
        (block,) = pages.read("```console\nsaid\n```\n", "page.md")
        with pytest.raises(ValueError, match=r"page\.md:1"):
            block.commands()

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("so:\n\n    make\n", [3]),
            ("- so:\n\n    and so\n", []),
            ("```text\n\n    a\n```\n", []),
            ("so\n    goes on\n", []),
        ],
    )
    def test_code_by_indentation_is_found(self, text: str, found: list[int]) -> None:
        assert pages.indented(text) == found
