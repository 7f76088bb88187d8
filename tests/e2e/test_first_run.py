"""What somebody sees who starts a server and has read nothing."""

from __future__ import annotations

from pathlib import Path

from tests.running_server import running_server

WARNING = "sees 32 x 32 pixels and is for trying out"


def test_without_arguments_it_has_the_bundled_backbone_and_says_what_that_is(
    tmp_path: Path,
) -> None:
    for _ in range(2):  # a new store, and one that is there
        with running_server(tmp_path) as server:
            log = server.log.read_text()
            assert WARNING in log
            assert "--backbone vit_base_patch16_224" in log
            assert "try: inflora learn FOLDER, then: inflora predict IMAGE" in log


def test_another_backbone_is_not_warned_of(tmp_path: Path, backbone_file: Path) -> None:
    with running_server(tmp_path, ["--backbone", str(backbone_file)]) as server:
        assert WARNING not in server.log.read_text()
