"""The docs hold what they say: ``make test-docs``. The last line is one JSON object.

    python -m tests.docs --parts site blocks quickstart

``site`` builds the site strictly, and looks that it asks for nothing from elsewhere. ``blocks``
counts what becomes of every fenced block, and follows every page. ``quickstart`` follows the
quickstart on an empty machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import typer

import inflora_client
import inflora_edge
from inflora.v1 import (
    evaluator_service_pb2,
    learner_service_pb2,
    model_service_pb2,
    predictor_service_pb2,
)
from inflora_client.cli import app
from inflora_service.__main__ import _parser as server_parser
from tests import parts
from tests.benchmarks.checkout import ROOT
from tests.docs import pages, quickstart
from tests.docs.sandbox import BlockFailedError

SERVICES = (
    evaluator_service_pb2,
    learner_service_pb2,
    model_service_pb2,
    predictor_service_pb2,
)

_ASSET = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"(https?:[^\"]+)\"")

_CODE = re.compile(r"<(pre|code|script)\b.*?</\1>", re.DOTALL)


def site(folder: Path) -> dict[str, Any]:
    """Build the site; count its pages, warnings, and what pages would fetch from elsewhere."""
    mkdocs = ROOT / ".venv-docs" / "bin" / "mkdocs"
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", folder / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    said = done.stderr + done.stdout
    warnings = [line for line in said.splitlines() if re.match(r"(WARNING|ERROR)", line)]
    built = sorted((folder / "site").rglob("*.html"))
    fetched = [
        f"{page.relative_to(folder)}: fetches {address}"
        for page in built
        for address in _ASSET.findall(page.read_text(encoding="utf-8"))
    ]
    plain = [
        f"{page.relative_to(folder)}: a list or a fence that is none"
        for page in built
        if _left(page)
    ]
    failed = [*warnings, *fetched, *plain, *unmentioned(folder / "site" / "reference")]
    if done.returncode and not failed:
        failed.append(said[-2000:])
    return {"warnings": len(warnings), "pages": len(built), "failed": failed}


def _left(page: Path) -> bool:
    """Whether a page has Markdown that was not understood: hosts and Python differ in lists."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    return bool(re.search(r"<p>[^<]*\n(?:[-*]|1\.) |```", text))


def unmentioned(reference: Path) -> list[str]:
    """Return what the reference ought to have and does not."""
    services = [
        service for module in SERVICES for service in module.DESCRIPTOR.services_by_name.values()
    ]
    commands: Any = typer.main.get_command(app)
    expected = {
        "grpc": [method.name for service in services for method in service.methods],
        "python": inflora_client.__all__,
        "edge": inflora_edge.__all__,
        "command-line": [f"inflora {name}" for name in commands.commands],
        "server-options": list(server_parser()._option_string_actions),
    }
    return [
        f"reference/{name}.html does not have {what}"
        for name, words in expected.items()
        for what in words
        if what not in (reference / f"{name}.html").read_text(encoding="utf-8")
    ]


def blocks(folder: Path) -> dict[str, Any]:
    """Look at every block as text, follow every page, and count."""
    found = [block for page in pages.pages() for block in pages.blocks_of(page)]
    kinds = Counter(block.kind for block in found)
    tests = ["tests/docs/test_pages.py", "tests/docs/test_blocks.py"]
    record = folder / "tests.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-q", f"--junitxml={record}"],
        cwd=ROOT, check=False,
    )  # fmt: skip
    failed = re.findall(r'<testcase [^>]*name="([^"]+)"[^>]*><failure', record.read_text())
    if done.returncode and not failed:
        failed = [f"pytest ended with {done.returncode}"]
    reasons = {
        block.where: f"{block.note}; {block.reason}"
        for block in found
        if block.kind in ("dry", "elsewhere", "parsed")
    }
    for where, reason in reasons.items():
        print(f"not run here: {where}: {reason}", flush=True)
    return {
        "blocks": len(found),
        "run": kinds["run"],
        "dry": kinds["dry"],
        "parsed": kinds["parsed"],
        "elsewhere": kinds["elsewhere"],
        "data": kinds["data"],
        "text": kinds["text"],
        "not_run": reasons,
        "failed": failed,
    }


def followed(folder: Path) -> dict[str, Any]:
    """Follow the quickstart."""
    try:
        return {**quickstart.follow(folder / "machine"), "failed": []}
    except (BlockFailedError, RuntimeError) as error:
        return {"failed": [str(error)]}


PARTS: dict[str, parts.Part] = {
    "site": site,
    "blocks": blocks,
    "quickstart": followed,
}


def main() -> None:
    """Run all parts, or some."""
    figures, failed = parts.run(PARTS, __doc__, Path("build/test-docs"))
    print(json.dumps(figures | {"failures": len(failed), "failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
