"""``python -m inflora_service.probe``: asks a server for its health, in the clear.

For a container's health check, and for whoever has no gRPC client at hand:

    python -m inflora_service.probe localhost:50052 --service inflora.v1.PredictorService

Exit status 0: it is serving; 1: it is not, or does not know the service, or cannot be reached.
"""

from __future__ import annotations

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEFAULT_ADDRESS = "localhost:50052"
"""Where the containers have ``--health-port``."""


def ask(address: str, service: str, timeout: float) -> str:
    """Return what a server says of a service: ``SERVING``, ``NOT_SERVING``, or why it says nothing.

    Args:
        address: ``host:port``.
        service: Full name of a gRPC service; "" is the server as a whole.
        timeout: Seconds in all.
    """
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            # The published types of this stub leave out its methods.
            check = stub.Check  # type: ignore[attr-defined]
            status = check(request, timeout=timeout).status
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def main() -> int:
    """Print what the server says; return the exit status."""
    parser = argparse.ArgumentParser(prog="inflora_service.probe", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("address", nargs="?", default=DEFAULT_ADDRESS, metavar="HOST:PORT")
    parser.add_argument("--service", default="", help="full name of a service; none: the server")
    parser.add_argument("--timeout", type=float, default=4.0, metavar="SECONDS")
    arguments = parser.parse_args()
    answer = ask(arguments.address, arguments.service, arguments.timeout)
    sys.stdout.write(f"{answer}\n")
    return 0 if answer == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
