"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Machines are shared: how long an example takes says nothing about what is tested.
settings.register_profile("inflora", deadline=None)
settings.load_profile("inflora")
