"""What the pages link to outside of ``docs/``, so that links hold on the site as on a git host.

A Markdown file of the repository becomes a page below ``repository/``, any other file a page with
its text, and a folder stands for its README. What is not there is left to MkDocs' own look at
links, which ends a strict build.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = "docs/"
HERE = "repository/"
"""Where pages of what lies outside of ``docs/`` are on the site."""

STAND_INS = {"proto/inflora/v1": "reference/grpc.md"}
"""Pages of the site that stand for folders."""

_CODE = re.compile(r"(^[ ]*(`{3,})[^\n]*\n.*?^[ ]*\2[ ]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")

_LANGUAGES = {".c": "c", ".py": "python", ".proto": "proto", ".ts": "ts", ".yaml": "yaml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List all decisions: a new one needs no line of its own in the navigation."""
    decisions = sorted(Path(config.docs_dir, "decisions").glob("*.md"))
    for section in config.nav or []:
        if "Decisions" in section:
            section["Decisions"] = [f"decisions/{path.name}" for path in decisions]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each file outside of ``docs/`` that a page links to, and so on from those."""
    root = Path(config.config_file_path).parent
    waiting = [
        (f"{DOCS}{file.src_uri}", Path(str(file.abs_src_path)))
        for file in files.documentation_pages()
        if file.abs_src_path
    ]
    seen: set[str] = set()
    while waiting:
        name, path = waiting.pop()
        for target in _targets(name, path.read_text(encoding="utf-8")):
            found = _file(root, target)
            if found is None or found.startswith(DOCS) or found in seen:
                continue
            seen.add(found)
            files.append(_page(config, root, found))
            if found.endswith(".md"):
                waiting.append((found, root / found))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links within the repository into links within the site."""
    root = Path(config.config_file_path).parent
    source = page.file.src_uri
    name = source.removeprefix(HERE) if source.startswith(HERE) else f"{DOCS}{source}"
    if name.startswith("docs/reference/"):
        return markdown  # made by reference.py, for the site alone

    def replaced(match: re.Match[str]) -> str:
        target = _resolved(name, match[2])
        found = _file(root, target)
        place = STAND_INS.get(target) or (found and _place(found))
        if place is None:
            return match[0]
        there = os.path.relpath(place, posixpath.dirname(source) or ".")
        return f"{match[1]}({there}{match[3] or ''})"

    return "".join(
        part if is_code else _LINK.sub(replaced, part) for part, is_code in _parts(markdown)
    )


def _page(config: MkDocsConfig, root: Path, name: str) -> File:
    text = (root / name).read_text(encoding="utf-8")
    if not name.endswith(".md"):
        language = _LANGUAGES.get(Path(name).suffix, "text")
        text = f"# {name}\n\n`````{language}\n{text}`````\n"
    return File.generated(config, _place(name), content=text)


def _place(name: str) -> str:
    """Return the source of the page on the site for a file of the repository."""
    if name.startswith(DOCS):
        return name.removeprefix(DOCS)
    return f"{HERE}{name}" if name.endswith(".md") else f"{HERE}{name}.md"


def _file(root: Path, name: str) -> str | None:
    """Return the file that a link leads to, from the repository's root; None if there is none."""
    if name.startswith(".."):
        return None
    if (root / name / "README.md").is_file():
        return f"{name}/README.md"
    return name if (root / name).is_file() else None


def _targets(name: str, markdown: str) -> Iterator[str]:
    for part, is_code in _parts(markdown):
        if not is_code:
            for match in _LINK.finditer(part):
                yield _resolved(name, match[2])


def _resolved(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _parts(markdown: str) -> Iterator[tuple[str, bool]]:
    """Cut a text into what is code and what is not, in order."""
    end = 0
    for match in _CODE.finditer(markdown):
        yield markdown[end : match.start()], False
        yield match[0], True
        end = match.end()
    yield markdown[end:], False
