"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Machines are shared: how long an example takes says nothing about what is tested.
settings.register_profile(
    "inflora", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# A change is judged by what it does, not by the luck of new examples, which other runs look for.
settings.register_profile("ci", settings.get_profile("inflora"), derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "inflora")
