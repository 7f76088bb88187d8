"""That what lies in ``deploy/`` is sound, as far as can be told without a cluster.

Every overlay is rendered by kubectl, alone and with every component, as an operator would: from a
kustomization of their own that sets what has no default. What comes out is held against the strict
schemas of two releases of Kubernetes, against models of the custom resources, against the server's
own command line, against the rules below and against checkov's. ``rules`` is short on purpose: what
a schema or checkov knows is not repeated.

Run by ``make check-deploy``; needs `.venv-deploy`, which that makes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from inflora_service.__main__ import _parser
from inflora_service.learner_process import STOP_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-deploy" / "bin"

KUBERNETES = ("1.34", "1.36")
"""Releases whose schemas manifests must meet; `preStop.sleep` is for all from 1.30 on."""

SETTINGS = {
    "backbone": "vit_base_patch16_224.augreg_in21k",
    "shared": "s3://models/shop",
}
"""What an operator sets."""

PLACEHOLDERS = frozenset({"", "bundled"})
"""No backbone for production."""

DRAIN_MARGIN = 10
"""Seconds that a pod has beyond preStop, the worker's end and `--drain-seconds`."""


@dataclass(frozen=True)
class Variant:
    """What an operator may install.

    Attributes:
        overlay: Name of the overlay.
        components: Names of components.
    """

    overlay: str
    components: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join((self.overlay, *self.components))


VARIANTS = (
    Variant("single"),
    Variant("single", ("certificates", "download-backbone", "monitoring")),
    Variant("gpu"),
    Variant("gpu", ("certificates", "client-certificates", "download-backbone", "monitoring")),
    Variant("scale-out"),
    Variant("scale-out", ("certificates", "client-certificates", "monitoring")),
    Variant("scale-out", ("gpu-predictors", "keda", "monitoring")),
    Variant("multi-node"),
    Variant("multi-node", ("certificates", "gpu-predictors", "keda", "monitoring")),
)


def measure(folder: Path) -> dict[str, Any]:
    """Check everything; return how much of what there is, and what is wrong.

    Args:
        folder: Empty; what is rendered stays there.
    """
    failed: list[str] = []
    count = 0
    for variant in VARIANTS:
        documents = render(variant, folder)
        count += len(documents)
        failed += [f"{variant}: {fault}" for fault in faults(documents)]
    rendered = sorted((folder / "rendered").glob("*.yaml"))
    for release in KUBERNETES:
        failed += schema_faults(rendered, release)
    failed += custom_resource_faults(rendered)
    found, skipped = checkov_faults(rendered)
    failed += found
    failed += unset_faults()
    failed += lint_faults()
    return {
        "manifests": count,
        "manifest_errors": len(failed),
        "manifest_variants": len(VARIANTS),
        "kubernetes": list(KUBERNETES),
        "checkov_skipped": sorted(skipped),
        "failed": failed,
    }


def render(variant: Variant, folder: Path) -> list[dict[str, Any]]:
    """Render what an operator would; the text stays in ``folder/rendered``."""
    own = folder / str(variant)
    own.mkdir(parents=True, exist_ok=True)
    # kustomize takes no absolute paths.
    deploy = Path(*[".."] * len(own.resolve().parts[1:])) / DEPLOY.relative_to("/")
    settings = {"backbone"} | (
        {"shared"} if variant.overlay in ("scale-out", "multi-node") else set()
    )
    (own / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "namespace": "inflora",
                "resources": [str(deploy / "overlays" / variant.overlay)],
                "components": [str(deploy / "components" / name) for name in variant.components],
                "configMapGenerator": [
                    {
                        "name": "inflora-settings",
                        "behavior": "merge",
                        "literals": [f"{key}={SETTINGS[key]}" for key in sorted(settings)],
                    }
                ],
            }
        )
    )
    text = _run("kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", str(own))
    (folder / "rendered").mkdir(exist_ok=True)
    (folder / "rendered" / f"{variant}.yaml").write_text(text)
    return [document for document in yaml.safe_load_all(text) if document]


def faults(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what our own rules have against what was rendered."""
    found: list[str] = []
    for owner, pod in pods(documents):
        for rule in RULES:
            found += [f"{owner}: {fault}" for fault in rule(pod, documents)]
    if not list(pods(documents)):
        found.append("there are no pods")
    return found


def pods(documents: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template, the training runtime's included, and whose it is."""
    for document in documents:
        owner = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] in ("StatefulSet", "Deployment"):
            yield owner, document["spec"]["template"]
        elif document["kind"] == "TrainingRuntime":
            for job in document["spec"]["template"]["spec"]["replicatedJobs"]:
                yield owner, job["template"]["spec"]["template"]


def _container(pod: Mapping[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return dict(container)


def _environment(
    container: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return what `$(NAME)` in arguments stands for."""
    settings = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    values = {}
    for variable in container.get("env", ()):
        source = variable.get("valueFrom", {})
        if reference := source.get("configMapKeyRef"):
            values[variable["name"]] = settings[reference["name"]][reference["key"]]
        elif reference := source.get("resourceFieldRef"):
            kind, name = reference["resource"].split(".")
            values[variable["name"]] = str(container["resources"][kind][name])
        else:
            values[variable["name"]] = variable["value"]
    return values


def arguments_of(
    pod: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
) -> list[str] | None:
    """Return what a pod's server is started with, None if it runs something else."""
    container = _container(pod)
    if "command" in container:
        return None
    values = _environment(container, documents)
    return [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], text) for text in container["args"]]


def parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace | None, str]:
    """Have the server's own parser read arguments, but for what is not merged.

    Returns:
        What it read, None if it refuses them; what it said.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return _parser().parse_args(arguments), ""
        except SystemExit:
            return None, said.getvalue().strip().splitlines()[-1]


# The rules. Each takes a pod template and all documents, and yields what is wrong.
Faults = Iterator[str]


def server_takes_its_arguments(pod: Any, documents: Any) -> Faults:
    """The real parser reads them, the backbone is one for production, the store is shared."""
    if (arguments := arguments_of(pod, documents)) is None:
        return
    read, said = parsed(arguments)
    if read is None:
        yield said
        return
    given = dict(text.split("=", 1) for text in arguments)
    role = given.get("--role", "all")
    if role != "predictor" and given.get("--backbone", "") in PLACEHOLDERS:
        yield "has no backbone for production"
    if (role != "all" or "--shared" in given) and not given.get("--shared"):
        yield "does not say where versions are published"


def grace_is_long_enough(pod: Any, documents: Any) -> Faults:
    """A pod is not killed while calls drain."""
    if (arguments := arguments_of(pod, documents)) is None:
        return
    read, _ = parsed(arguments)
    if read is None:
        return
    sleep = _container(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]
    worker = 0 if "--role=predictor" in arguments else STOP_SECONDS
    needed = sleep + worker + read.drain_seconds + DRAIN_MARGIN
    if pod["spec"]["terminationGracePeriodSeconds"] < needed:
        yield f"has less grace than the {needed:g} s that it may take to end"


def probes_mean_what_they_say(pod: Any, documents: Any) -> Faults:
    """Start-up and liveness ask for the server alone; readiness for what the pod is there for."""
    if (arguments := arguments_of(pod, documents)) is None:
        return
    container = _container(pod)
    port = int(dict(text.split("=", 1) for text in arguments)["--health-port"])
    follows = "--role=predictor" in arguments
    ready = f"inflora.v1.{'Predictor' if follows else 'Model'}Service"
    expected = {"startupProbe": None, "livenessProbe": None, "readinessProbe": ready}
    for name, service in expected.items():
        probe = container[name]["grpc"]
        if (probe["port"], probe.get("service")) != (port, service):
            yield f"{name} asks for {probe}"


def is_restricted(pod: Any, documents: Any) -> Faults:
    """The Pod Security Standard "restricted", and more: no token, nothing to write but volumes."""
    spec, container = pod["spec"], _container(pod)
    own = container["securityContext"]
    wanted = {
        "runs as root": spec["securityContext"].get("runAsNonRoot") is True
        and spec["securityContext"].get("runAsUser") == 10001,
        "has no seccomp profile": spec["securityContext"].get("seccompProfile")
        == {"type": "RuntimeDefault"},
        "has an account's token": spec.get("automountServiceAccountToken") is False,
        "can gain privileges": own.get("allowPrivilegeEscalation") is False,
        "has capabilities": own.get("capabilities") == {"drop": ["ALL"]},
        "can write to its image": own.get("readOnlyRootFilesystem") is True,
        "uses the host": not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")),
        "has a volume of the host": not any("hostPath" in v for v in spec.get("volumes", ())),
    }
    yield from (fault for fault, is_well in wanted.items() if not is_well)
    limits = container["resources"].get("limits", {})
    if limits.get("memory") != container["resources"]["requests"]["memory"]:
        yield "may be ended for memory that it was promised, or was promised less than it may take"


def cache_fits_its_volume(pod: Any, documents: Any) -> Faults:
    """Kubelet evicts a pod whose volume grows over its limit."""
    arguments = dict(t.split("=", 1) for t in arguments_of(pod, documents) or ())
    if "--cache-bytes" not in arguments:
        return
    (limit,) = (v["emptyDir"]["sizeLimit"] for v in pod["spec"]["volumes"] if v["name"] == "cache")
    if int(arguments["--cache-bytes"]) >= int(limit.removesuffix("Gi")) * 2**30 * 0.9:
        yield "the cache may outgrow its volume"


def launcher_and_nodes_agree(pod: Any, documents: Any) -> Faults:
    """The learner's launcher waits for as many machines as the TrainJob has, and itself."""
    arguments = dict(t.split("=", 1) for t in arguments_of(pod, documents) or ())
    jobs = [d["spec"]["trainer"]["numNodes"] for d in documents if d["kind"] == "TrainJob"]
    nodes = re.findall(r"--nnodes=(\d+)", arguments.get("--learn-launcher", ""))
    if "--learn-launcher" in arguments and nodes != [str(job + 1) for job in jobs]:
        yield f"waits for {nodes} machines, beside the TrainJob's {jobs}"


RULES = (
    server_takes_its_arguments,
    grace_is_long_enough,
    probes_mean_what_they_say,
    is_restricted,
    cache_fits_its_volume,
    launcher_and_nodes_agree,
)


def unset_faults() -> list[str]:
    """Return which overlays could be installed without a backbone, which must not be."""
    found = []
    for overlay in sorted(path.name for path in (DEPLOY / "overlays").iterdir()):
        text = _run("kubectl", "kustomize", str(DEPLOY / "overlays" / overlay))
        documents = [document for document in yaml.safe_load_all(text) if document]
        learners = [p for owner, p in pods(documents) if owner == "StatefulSet/inflora-learner"]
        for learner in learners:
            arguments = arguments_of(learner, documents) or []
            read, said = parsed(arguments)
            if read is not None or "--backbone" not in said:
                found.append(f"{overlay}: starts without a backbone having been chosen")
        if not learners:
            found.append(f"{overlay}: has no learner")
    return found


def schema_faults(files: Sequence[Path], release: str) -> list[str]:
    """Return what a release's strict schemas have against what was rendered."""
    # What custom resources look like it does not know; `custom_resources.py` does.
    said = _ask(TOOLS / "python", Path(__file__).with_name("schemas.py"), release, *files)
    return [f"Kubernetes {release}: {fault}" for fault in said]


def custom_resource_faults(files: Sequence[Path]) -> list[str]:
    """Return what models of the custom resources have against them."""
    return _ask(TOOLS / "python", Path(__file__).with_name("custom_resources.py"), *files)


def checkov_faults(files: Sequence[Path]) -> tuple[list[str], set[str]]:
    """Return what checkov has against manifests and Dockerfile, and which of its rules are skipped.

    Each skipped rule is in ``deploy/checkov.yaml``, with the reason.
    """
    configuration = DEPLOY / "checkov.yaml"
    skipped = set(yaml.safe_load(configuration.read_text())["skip-check"])
    runs = [("kubernetes", files), ("dockerfile", [DEPLOY / "Dockerfile"])]
    found: list[str] = []
    for framework, paths in runs:
        command = [TOOLS / "checkov", "--config-file", configuration, "--framework", framework]
        for path in paths:
            command += ["--file", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            found.append(f"checkov did not report: {done.stdout[-500:]}{done.stderr[-2000:]}")
            continue
        if not report.get("summary", report).get("passed"):
            found.append(f"checkov checked nothing of {framework}")
        found += [
            f"{check['check_id']} {check['check_name']}: {check['resource']}"
            f" ({Path(check['file_path']).stem})"
            for check in report.get("results", {}).get("failed_checks", ())
        ]
    return found, skipped


def lint_faults() -> list[str]:
    """Return what hadolint has against the Dockerfile."""
    command = [TOOLS / "hadolint", "--no-color", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if line]


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _ask(*command: object) -> list[str]:
    """Run a program that prints faults, one a line; that it fails is one, too."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line]
    return lines + ([done.stderr.strip()] if done.returncode else [])
