"""The ``inflora`` command."""

from inflora_client.cli.app import app, main

__all__ = ["app", "main"]
