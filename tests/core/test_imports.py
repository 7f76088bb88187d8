"""What must be importable on a machine without torch."""

from __future__ import annotations

import subprocess
import sys

LIGHT = (
    "inflora_core",
    "inflora_core.audit",
    "inflora_core.config",
    "inflora_core.errors",
    "inflora_core.evaluation",
    "inflora_core.graph",
    "inflora_core.images",
    "inflora_core.labels",
    "inflora_core.merge",
    "inflora_core.model",
    "inflora_core.predictor",
    "inflora_core.progress",
    "inflora_core.spool",
    "inflora_core.store",
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
