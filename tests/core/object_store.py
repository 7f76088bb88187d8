"""Shared stores for tests: a folder, and a real S3 endpoint on loopback."""

from __future__ import annotations

import itertools
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

_BUCKETS = itertools.count()


@contextmanager
def s3_endpoint(port: int = 0) -> Iterator[str]:
    """Run an S3 server in a thread; give its address. Its objects go with the process."""
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return what tells obstore where S3 is."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }


def make_bucket(endpoint: str) -> str:
    """Make a bucket that nobody else uses; return its URL."""
    name = f"bucket-{os.getpid()}-{next(_BUCKETS)}"
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        return f"s3://{name}/models"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server, which the environment names."""
    with s3_endpoint() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(endpoint).items():
            patch.setenv(name, value)
        yield endpoint


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a shared store may be, which is empty."""
    if request.param == "file":
        return (tmp_path / "shared store").as_uri()
    return make_bucket(request.getfixturevalue("s3"))
