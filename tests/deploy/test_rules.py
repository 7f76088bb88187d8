"""The rules of ``manifests.py`` find what they are there for, in the learner's own manifest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, faults

Change = Callable[[dict[str, Any], dict[str, Any]], None]


def learner(backbone: str = "vit_base_patch16_224.augreg_in21k") -> list[dict[str, Any]]:
    settings = {"kind": "ConfigMap", "metadata": {"name": "inflora-settings"}}
    return [
        yaml.safe_load((DEPLOY / "base" / "learner.yaml").read_text()),
        {**settings, "data": {"backbone": backbone}},
    ]


def test_there_is_nothing_against_it_as_it_is() -> None:
    assert faults(learner()) == []


@pytest.mark.parametrize("backbone", ["", " ", "bundled"])
def test_a_backbone_has_to_be_chosen(backbone: str) -> None:
    (fault,) = faults(learner(backbone))
    assert "backbone" in fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda spec, _: spec.update(terminationGracePeriodSeconds=40), "less grace"),
        (lambda _, box: box["args"].append("--drain-seconds=60"), "less grace"),
        (lambda _, box: box["args"].append("--no-such-option=1"), "--no-such-option"),
        (lambda _, box: box["args"].append("--device=tpu"), "--device"),
        (lambda _, box: box["args"].append("--shared="), "--shared"),
        (lambda _, box: box["livenessProbe"]["grpc"].update(port=50051), "livenessProbe"),
        (
            lambda _, box: box["livenessProbe"]["grpc"].update(
                service="inflora.v1.PredictorService"
            ),
            "livenessProbe",
        ),
        (
            lambda _, box: box["readinessProbe"]["grpc"].update(
                service="inflora.v1.PredictorService"
            ),
            "readinessProbe",
        ),
        (lambda spec, _: spec["securityContext"].update(runAsUser=0), "root"),
        (lambda spec, _: spec["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda spec, _: spec.pop("automountServiceAccountToken"), "token"),
        (lambda spec, _: spec.update(hostNetwork=True), "host"),
        (lambda spec, _: spec["volumes"].append({"name": "h", "hostPath": {}}), "host"),
        (lambda _, box: box["securityContext"].update(readOnlyRootFilesystem=False), "write"),
        (lambda _, box: box["securityContext"].pop("capabilities"), "capabilities"),
        (lambda _, box: box["securityContext"].pop("allowPrivilegeEscalation"), "privileges"),
        (lambda _, box: box["resources"]["limits"].update(memory="64Gi"), "memory"),
        (
            lambda _, box: box["args"].append("--learn-launcher=torchrun --nnodes=3"),
            "waits for ['3'] machines",
        ),
    ],
)
def test_what_is_wrong_is_found(change: Change, fault: str) -> None:
    documents = learner()
    spec = documents[0]["spec"]["template"]["spec"]
    change(spec, spec["containers"][0])
    found = faults(documents)
    assert len(found) == 1
    assert fault in found[0]
