"""What is in ``deploy/``, as far as it can be told without kubectl: see ``manifests.py``."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from inflora_service import __main__
from tests.deploy.manifests import DEPLOY, ROOT

LOCKS = {
    "learner": ("requirements-gpu.lock", ("learner", "gpu")),
    "predictor-gpu": ("requirements-gpu.lock", ("cuda",)),
    "predictor": ("requirements.lock", ("cpu",)),
}
"""Of each container: the lock that its versions are those of, and the extras that it has."""

TORCH = {"torch", "torchvision", "timm"}


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a YAML document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def options_used() -> set[str]:
    """Return every option of the server's in the manifests, those inside of patches included."""
    found = set()
    for path in DEPLOY.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            for text in strings(document):
                for line in text.splitlines():
                    if match := re.match(r"(?:\s*(?:- )?value: )?(--[a-z-]+)=", line):
                        found.add(match[1])
    return found


def options_known() -> set[str]:
    return {option for action in __main__._parser()._actions for option in action.option_strings}


def test_the_server_knows_every_option_of_the_manifests() -> None:
    used = options_used()
    assert {"--backbone", "--health-port", "--max-connection-age-seconds", "--device"} <= used
    assert used - options_known() == set()


def test_the_autoscalers_ask_for_a_metric_that_there_is() -> None:
    """Dashboards and alerts are held against what a server exports; so it is enough to be there."""
    observed = DEPLOY / "observability"
    scaling = [DEPLOY / "overlays/scale-out/autoscaling.yaml", DEPLOY / "components/keda"]
    files = [file for path in scaling for file in ([path] if path.is_file() else path.iterdir())]
    asked = {name for file in files for name in re.findall(r"inflora_\w+", file.read_text())}
    assert asked == {"inflora_predict_waiting_images"}
    there = "".join(path.read_text() for path in observed.iterdir())
    assert all(name in there for name in asked)


def pins(lock: Path) -> dict[str, str]:
    """Return name and version of all that a lock holds."""
    found = re.findall(r"^([a-zA-Z0-9._-]+)==([^ ;\\]+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): number for name, number in found}


@pytest.mark.parametrize("container", LOCKS)
def test_a_container_has_what_pyproject_asks_for(container: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in LOCKS[container][1]:
        asked += project["optional-dependencies"][extra]
    locked = pins(DEPLOY / f"requirements-{container}.lock")
    requirements = [Requirement(text) for text in asked]
    missing = [
        str(requirement)
        for requirement in requirements
        if locked.get(canonicalize_name(requirement.name), "0") not in requirement.specifier
    ]
    assert missing == [], "run 'make lock'"


@pytest.mark.parametrize("container", LOCKS)
def test_a_container_has_the_versions_that_are_tested(container: str) -> None:
    locked = pins(DEPLOY / f"requirements-{container}.lock")
    tested = pins(ROOT / LOCKS[container][0])
    other = {name for name in locked.keys() & tested.keys() if locked[name] != tested[name]}
    assert other == set(), "run 'make lock'"
    assert len(locked.keys() & tested.keys()) > 10


@pytest.mark.parametrize("container", LOCKS)
def test_a_container_has_one_onnxruntime_and_torch_only_to_learn(container: str) -> None:
    locked = set(pins(DEPLOY / f"requirements-{container}.lock"))
    assert len(locked & {"onnxruntime", "onnxruntime-gpu"}) == 1
    assert ("onnxruntime" in locked) is (container == "predictor")
    assert (locked & TORCH) == (TORCH if container == "learner" else set())
    assert not locked & {"pytest", "mypy", "ruff", "hypothesis"}


@pytest.mark.parametrize("lock", sorted(path.name for path in DEPLOY.glob("*.lock")))
def test_every_package_of_a_container_has_its_hash_and_no_address(lock: str) -> None:
    text = (DEPLOY / lock).read_text()
    entries = re.split(r"^(?=[a-zA-Z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text


def test_the_image_is_of_this_release_and_of_this_python() -> None:
    """Tests say something of what is shipped only with the Python that they run with."""
    recipe = (DEPLOY / "Dockerfile").read_text()
    (python,) = re.findall(r"^ARG BASE=python:(\d+\.\d+)-slim", recipe, re.MULTILINE)
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert lowest == f">={python}"
    assert sys.version_info >= tuple(map(int, python.split(".")))
    tags = [
        image["newTag"]
        for path in DEPLOY.rglob("kustomization.yaml")
        for image in yaml.safe_load(path.read_text()).get("images", ())
    ]
    assert set(tags) == {version("inflora-server")}
