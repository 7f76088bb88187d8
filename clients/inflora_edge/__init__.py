"""What a device needs of InfLoRA Server: numpy, onnxruntime, Pillow and grpcio, nothing else.

from inflora_edge import Device, Server

device = Device(Server("learner.example:50051"), Path("/var/lib/model"))
device.update()
print(device.model.predict(Path("photo.jpg")).label)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inflora_edge.delta import Delta, apply
    from inflora_edge.device import Device
    from inflora_edge.errors import (
        DeltaError,
        EdgeError,
        ImageError,
        ModelError,
        NoModelError,
        ServerError,
    )
    from inflora_edge.fetching import Server
    from inflora_edge.model import Model, Prediction

_WHERE = {
    "Delta": "delta",
    "DeltaError": "errors",
    "Device": "device",
    "EdgeError": "errors",
    "ImageError": "errors",
    "Model": "model",
    "ModelError": "errors",
    "NoModelError": "errors",
    "Prediction": "model",
    "Server": "fetching",
    "ServerError": "errors",
    "apply": "delta",
}

__all__ = [
    "Delta",
    "DeltaError",
    "Device",
    "EdgeError",
    "ImageError",
    "Model",
    "ModelError",
    "NoModelError",
    "Prediction",
    "Server",
    "ServerError",
    "apply",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: the server computes as devices do, and has no use for the rest."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
