"""Health on a port of its own, in the clear, for those who can show neither certificate nor token.

Kubelet's gRPC probes are such: they speak no TLS. What this port tells is whether the server's
services are serving, and nothing else can be asked there.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2_grpc

from inflora_service.health import CheckOnly, Health


def health_server(health: Health) -> grpc.aio.Server:
    """Return a server that answers for ``health`` alone; it has no port yet."""
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            # A question is the name of a service.
            ("grpc.max_receive_message_length", 4096),
        ],
        maximum_concurrent_rpcs=64,
    )
    health_pb2_grpc.add_HealthServicer_to_server(CheckOnly(health), server)
    return server
