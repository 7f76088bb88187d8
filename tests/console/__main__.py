"""``make test-console``: the tests here, then one JSON object with what they measured."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.console.figures import FOUND

if __name__ == "__main__":
    os.environ["CONSOLE_REQUIRED"] = "1"
    status = pytest.main(["-rs", "tests/console", *sys.argv[1:]])
    print(json.dumps({"passed": status == 0, **dict(sorted(FOUND.items()))}))
    sys.exit(int(status))
