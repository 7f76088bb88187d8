"""Holds manifests against the strict schemas of a release; runs in `.venv-deploy`.

python schemas.py RELEASE FILE...     prints a line for each fault
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

CUSTOM = ("cert-manager.io/", "keda.sh/", "monitoring.coreos.com/", "trainer.kubeflow.org/")
"""Groups of custom resources, which Kubernetes' own schemas do not have."""


def native(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what of a document Kubernetes' own schemas know: all, nothing, or a runtime's jobs."""
    if not document["apiVersion"].startswith(CUSTOM):
        yield document
    elif document["kind"] == "TrainingRuntime":
        for job in document["spec"]["template"]["spec"]["replicatedJobs"]:
            metadata = {**job["template"].get("metadata", {}), "name": job["name"]}
            yield {**job["template"], "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}


def main() -> None:
    """Print what is wrong."""
    release, *files = sys.argv[1:]
    checked = 0
    for file in files:
        for whole in filter(None, yaml.safe_load_all(Path(file).read_text())):
            for document in native(whole):
                name = f"{Path(file).stem}: {document['kind']}/{document['metadata']['name']}"
                try:
                    kubernetes_validate.validate(document, release, strict=True)
                except kubernetes_validate.ValidationError as error:
                    path = ".".join(map(str, error.path))
                    print(f"{name}: {path}: {error.message}"[:600])
                checked += 1
    if not checked:
        print("no manifest was checked")


if __name__ == "__main__":
    main()
