"""Clients in other languages: each template under clients/languages generates one.

A plugin that is not to be had on this machine is left out; `make check-clients` brings those that
are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from inflora.v1 import (
    evaluator_service_pb2,
    learner_service_pb2,
    model_service_pb2,
    predictor_service_pb2,
    task_pb2,
)

ROOT = Path(__file__).parents[2]
LANGUAGES = ROOT / "clients" / "languages"
FILES = (
    evaluator_service_pb2,
    learner_service_pb2,
    model_service_pb2,
    predictor_service_pb2,
    task_pb2,
)
MESSAGES = [name for file in FILES for name in file.DESCRIPTOR.message_types_by_name]
METHODS = [
    method.name
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
PLACES = (ROOT / "build" / "plugins" / "bin", ROOT / "clients" / "node" / "node_modules" / ".bin")
PATH = os.pathsep.join([*map(str, PLACES), os.environ["PATH"]])


def plugins() -> Iterator[Any]:
    """Yield a template of one plugin each."""
    for path in sorted(LANGUAGES.glob("*.gen.yaml")):
        template = yaml.safe_load(path.read_text())
        for plugin in template["plugins"]:
            language = path.name.partition(".")[0]
            name = plugin.get("local") or f"protoc's {plugin['protoc_builtin']}"
            yield pytest.param({**template, "plugins": [plugin]}, id=f"{language}: {name}")


@pytest.mark.parametrize("template", list(plugins()))
def test_a_plugin_generates_all_that_it_is_for(template: dict[str, Any], tmp_path: Path) -> None:
    (plugin,) = template["plugins"]
    program = plugin.get("local", "protoc")
    if shutil.which(program, path=PATH) is None:
        pytest.skip(f"there is no {program} here")
    if not (ROOT / "build" / "googleapis" / "google").is_dir():
        pytest.skip("build/googleapis is not made: make check-clients")
    buf = Path(sys.executable).with_name("buf")
    subprocess.run(
        [buf, "generate", "--template", json.dumps(template), "--output", tmp_path],
        cwd=ROOT, env={**os.environ, "PATH": PATH}, check=True, timeout=120,
    )  # fmt: skip
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = "".join(path.read_text() for path in files).lower().replace("_", "")
    of_calls = re.search("grpc|tonic", program) is not None
    of_both = program == "protoc-gen-ts_proto"
    expected = [*MESSAGES * (of_both or not of_calls), *METHODS * (of_both or of_calls)]
    assert [name for name in expected if name.lower() not in written] == []


def test_all_plugins_are_local() -> None:
    """Others send the protos to a service, and need a network."""
    for path in LANGUAGES.glob("*.gen.yaml"):
        plugins = yaml.safe_load(path.read_text())["plugins"]
        assert all(plugin.keys() & {"local", "protoc_builtin"} for plugin in plugins), path
