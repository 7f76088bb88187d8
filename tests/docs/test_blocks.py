"""Every page with commands is followed, block by block, with real servers and clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import pages, sandbox
from tests.docs.sandbox import World

PAGES = [
    page
    for page in pages.pages()
    if page != "docs/quickstart.md" and pages.is_page_with_commands(page)
]
"""The quickstart is followed on an empty machine: ``quickstart.py``."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return sandbox.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page: str, world: World, tmp_path: Path) -> None:
    blocks = [block for block in pages.blocks_of(page) if sandbox.to_run(block)]
    with sandbox.sandbox(world, tmp_path, blocks) as page_sandbox:
        for block in blocks:
            page_sandbox.run(block)
