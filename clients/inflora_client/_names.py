"""Resource names, and the short forms that callers may use for them."""

from __future__ import annotations

import unicodedata
import uuid
from dataclasses import dataclass

from inflora_client.resources import Task, Version

TaskRef = str | Task
"""A task: its id, its full name, or the task itself."""

VersionRef = int | str | Version
"""A version: ``3``, ``"3"``, ``"current"``, its full name, or the version itself."""


def normalised(label: str) -> str:
    """Return a label in the one form that the server takes; looks do not tell it from others."""
    return unicodedata.normalize("NFC", label)


def new_request_id() -> str:
    """Return an id under which a request can be repeated without being carried out twice."""
    return str(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class Names:
    """Names within one model.

    Attributes:
        model: ``models/{model}``.
    """

    model: str

    def task(self, ref: TaskRef) -> str:
        """Return ``models/{model}/tasks/{task}``.

        Raises:
            ValueError: The reference is empty.
        """
        return self._full("tasks", ref.name if isinstance(ref, Task) else ref)

    def version(self, ref: VersionRef) -> str:
        """Return ``models/{model}/versions/{n}``.

        Raises:
            ValueError: The reference is empty.
        """
        return self._full("versions", ref.name if isinstance(ref, Version) else str(ref))

    def _full(self, collection: str, ref: str) -> str:
        if not ref:
            raise ValueError(f"an empty name does not say which of the {collection} is meant")
        return ref if "/" in ref else f"{self.model}/{collection}/{ref}"
