"""What can go wrong on a device."""

from __future__ import annotations


class EdgeError(Exception):
    """Any of these."""


class DeltaError(EdgeError):
    """A delta cannot be applied: it is damaged, or does not belong to this file."""


class ModelError(EdgeError):
    """A file is no model of ours, or does not answer as one."""


class ImageError(EdgeError):
    """An image cannot be read."""


class NoModelError(EdgeError):
    """There is no model yet: none was fetched, or all that were are damaged."""


class ServerError(EdgeError):
    """The server cannot be reached, refuses, or what it sent is not what it announced.

    Attributes:
        code: gRPC's name of the status, for example ``UNAVAILABLE``; ``DATA_LOSS`` for what arrived
            damaged.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
