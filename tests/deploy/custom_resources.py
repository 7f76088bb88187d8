"""Holds custom resources against models of them; runs in `.venv-deploy`.

    python custom_resources.py FILE...     prints a line for each fault

The models are made from the definitions that the operators install: cert-manager's, KEDA's and the
Prometheus operator's by cloudcoil, Kubeflow Trainer's by Kubeflow. They check types, and pass over
fields that they do not know; so what they read is written again, and compared with what was there.
The pods of a training runtime are held against Kubernetes' own schemas, by ``schemas.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudcoil.models.cert_manager.v1 as cert_manager
import cloudcoil.models.keda.v1alpha1 as keda
import cloudcoil.models.prometheus_operator.v1 as prometheus_operator
import yaml
from kubeflow_trainer_api import models as trainer
from pydantic import BaseModel, ValidationError

MODELS: dict[tuple[str, str], type[BaseModel]] = {
    ("cert-manager.io/v1", "Certificate"): cert_manager.Certificate,
    ("cert-manager.io/v1", "Issuer"): cert_manager.Issuer,
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus_operator.ServiceMonitor,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): trainer.TrainerV1alpha1TrainJob,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): trainer.TrainerV1alpha1TrainingRuntime,
}


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the path of everything that was not understood, or changed on the way."""
    if isinstance(before, dict):
        if not isinstance(after, dict):
            yield path
            return
        for key, value in before.items():
            if key not in after:
                yield f"{path}.{key}"
            else:
                yield from lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list):
        if not isinstance(after, list) or len(after) != len(before):
            yield path
            return
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif str(before) != str(after):
        yield f"{path}: {before!r} is read as {after!r}"


def without_quantities(value: Any) -> Any:
    """Return a document without what Trainer's models cannot read: amounts such as ``8Gi``."""
    if isinstance(value, dict):
        return {
            key: without_quantities(inner)
            for key, inner in value.items()
            if key not in ("limits", "requests", "sizeLimit")
        }
    return [without_quantities(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    """Print what is wrong."""
    groups = {version.partition("/")[0] for version, _ in MODELS}
    seen: set[tuple[str, str]] = set()
    tell: Callable[..., None] = print
    for file in sys.argv[1:]:
        for document in yaml.safe_load_all(Path(file).read_text()):
            if not document or document["apiVersion"].partition("/")[0] not in groups:
                continue
            key = (document["apiVersion"], document["kind"])
            name = f"{Path(file).stem}: {document['kind']}/{document['metadata']['name']}"
            if key not in MODELS:
                tell(f"{name}: there is no model of it")
                continue
            seen.add(key)
            asked = without_quantities(document) if key[1] == "TrainingRuntime" else document
            try:
                read = MODELS[key].model_validate(asked)
            except ValidationError as error:
                for fault in error.errors():
                    tell(f"{name}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}")
                continue
            again = read.model_dump(mode="json", by_alias=True, exclude_none=True)
            for path in lost(asked, again):
                tell(f"{name}: not understood: {path}")
    for kind, name in sorted(MODELS.keys() - seen):
        tell(f"no {name} of {kind} was checked")


if __name__ == "__main__":
    main()
