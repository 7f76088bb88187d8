"""What must be importable on a machine without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIGHT = (
    "inflora_core",
    "inflora_core.audit",
    "inflora_core.config",
    "inflora_core.errors",
    "inflora_core.evaluation",
    "inflora_core.graph",
    "inflora_core.images",
    "inflora_core.labels",
    "inflora_core.logs",
    "inflora_core.merge",
    "inflora_core.mirror",
    "inflora_core.model",
    "inflora_core.predictor",
    "inflora_core.progress",
    "inflora_core.replica",
    "inflora_core.shared",
    "inflora_core.spool",
    "inflora_core.store",
    "inflora_core.tracing",
    "inflora_client",
    "inflora_client.cli",
    "inflora_service.server",
    "inflora_service.__main__",
    "inflora_service.doctor",
)
HEAVY = ("torch", "timm", "torchvision")

PROGRAM = """
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    found = sorted(set(sys.modules) & set({heavy!r}))
    if found:
        sys.exit(f"{{name}} imports {{found}}")
"""


def run(names: tuple[str, ...], heavy: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Import ``names`` one after the other in a new process, and look for ``heavy`` after each."""
    program = PROGRAM.format(names=names, heavy=heavy)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_torch_is_not_imported_along() -> None:
    result = run(LIGHT, HEAVY)
    assert result.returncode == 0, result.stderr


def test_the_client_imports_no_model_runtime() -> None:
    result = run(("inflora_client", "inflora_client.cli"), (*HEAVY, "onnxruntime", "inflora_core"))
    assert result.returncode == 0, result.stderr


def test_the_doctor_imports_no_model_runtime() -> None:
    result = run(("inflora_service.doctor",), (*HEAVY, "onnxruntime", "grpc"))
    assert result.returncode == 0, result.stderr


def test_an_import_of_torch_would_be_seen() -> None:
    result = run(("inflora_core", "inflora_core.moments"), HEAVY)
    assert result.returncode == 1
    assert "inflora_core.moments imports ['torch']" in result.stderr


TELEMETRY = """
import inflora_core.predictor
import numpy, onnx, onnxruntime
from onnx import TensorProto, helper
value = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,))
other = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,))
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "none", [value], [other])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnxruntime.InferenceSession(model.SerializeToString())
"""


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """It would keep an id of the machine, and a database of what is to be sent."""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    folders = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "tmp"}
    for folder in folders.values():
        folder.mkdir()
    environment |= {name: str(folder) for name, folder in folders.items()}
    subprocess.run([sys.executable, "-c", TELEMETRY], env=environment, check=True)
    assert [*tmp_path.glob("*/*")] == []
