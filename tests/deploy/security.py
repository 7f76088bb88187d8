"""Part ``security``: who may call what, how much, and where a server listens.

Every rpc is called as every kind of caller, of two server processes: one with TLS and tokens, one
that asks for certificates. Quotas are put under four times the load that they allow. And a server
that was started without options is looked at from outside.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from inflora.v1 import learner_service_pb2_grpc, predictor_service_pb2_grpc
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_core.store import Store
from tests.running_server import RunningServer, running_server
from tests.service.conftest import RED, fault_of, png, upload
from tests.service.mean_colour import make_backbone
from tests.service.security_cases import RPCS, Scene, entry, wrong_of
from tests.service.test_bad_input import publish
from tests.service.test_security import retry_seconds

OVERLOAD = 4
SECONDS = 5.0
CALLS, BYTES, TASKS = 25, 200_000, 2
"""What the quotas allow: calls and bytes a second, and tasks in the queue."""


def measure(folder: Path) -> dict[str, Any]:
    """Look at all of it; return figures, and under ``failed`` what is wrong."""
    return merged(matrix(folder / "matrix"), quotas(folder / "quotas"), ports(folder / "default"))


@contextmanager
def serving(folder: Path, *options: object) -> Iterator[RunningServer]:
    """A server with one version, which knows red."""
    make_backbone(Store.open(folder / "store"))
    publish(folder / "store", red=RED)
    chosen = ["--reserve-bytes", "0", "--log-level", "warning", *map(str, options)]
    with running_server(folder, chosen) as server:
        yield server


def merged(*found: dict[str, Any]) -> dict[str, Any]:
    """Return all figures, and all that failed."""
    failed = [fault for each in found for fault in each.pop("failed", [])]
    return {name: value for each in found for name, value in each.items()} | {"failed": failed}


# -- every rpc, every caller ----------------------------------------------------------------------


def matrix(folder: Path) -> dict[str, Any]:
    """Make every call as every caller."""
    scene = Scene(folder / "certificates")
    tls = ["--tls-cert", scene.server.cert, "--tls-key", scene.server.key]
    mutual = [*tls, "--tls-client-ca", scene.authority.ca, "--tokens", scene.certified]
    with ExitStack() as stack:
        servers = {
            "tls": stack.enter_context(serving(folder / "tls", *tls, "--tokens", scene.tokens)),
            "mtls": stack.enter_context(serving(folder / "mtls", *mutual)),
        }
        addresses = {name: server.address for name, server in servers.items()}
        cases, wrong = wrong_of(scene, addresses)
    print(f"{len(RPCS)} rpcs, {len(scene.callers)} callers, {len(wrong)} wrong", flush=True)
    return {"auth_cases": cases, "auth_wrong": len(wrong), "failed": wrong}


# -- quotas ---------------------------------------------------------------------------------------


def quotas(folder: Path) -> dict[str, Any]:
    """Ask for four times as much as is allowed, beside somebody who asks for what is."""
    folder.mkdir(parents=True)
    tokens = folder / "tokens.toml"
    tokens.write_text(
        entry("predict", "calls", quota=f"calls_per_second = {CALLS}")
        + entry("predict", "bytes", quota=f"bytes_per_second = {BYTES}")
        + entry("learn", "tasks", quota=f"queued_tasks = {TASKS}")
        + entry("predict", "other")
    )
    with serving(folder, "--tokens", tokens) as server:
        found = [asyncio.run(_rates(server)), asyncio.run(_queue(server))]
    return merged(*found)


async def _rates(server: RunningServer) -> dict[str, Any]:
    large = _noise(60)
    small = predictor_pb.PredictRequest(images=[png()])
    large_request = predictor_pb.PredictRequest(images=[large])
    size = large_request.ByteSize()
    loads = {
        "calls": (small, OVERLOAD * CALLS),
        "bytes": (large_request, OVERLOAD * BYTES / size),
        "other": (small, CALLS),
    }
    began = time.monotonic()
    tallies = dict(
        zip(
            loads,
            await asyncio.gather(*(_load(server, name, *load) for name, load in loads.items())),
            strict=True,
        )
    )
    # From before the first call to after the last answer: no more can have been filled in.
    seconds = time.monotonic() - began
    # A second's worth at the start, what came in since, and what the last call may owe.
    most = {
        "calls": CALLS * (1 + seconds) + 1,
        "bytes": (BYTES * (1 + seconds)) / size + 1,
    }
    failed = []
    for name, allowed in most.items():
        tally = tallies[name]
        print(f"quota of {name}: {dict(tally)}, at most {allowed:.0f} allowed", flush=True)
        if tally["OK"] > allowed:
            failed.append(f"{tally['OK']} calls answered over the quota of {name}, {allowed:.0f}")
        if tally["OK"] == 0 or tally["QUOTA_EXCEEDED"] == 0 or set(tally) - _EXPECTED:
            failed.append(f"under {OVERLOAD} x the quota of {name}: {dict(tally)}")
    if set(tallies["other"]) != {"OK"}:
        failed.append(f"somebody without a quota: {dict(tallies['other'])}")
    answered = {f"quota_{name}_answered": tallies[name]["OK"] for name in most}
    allowed_figures = {f"quota_{name}_allowed": round(value) for name, value in most.items()}
    others = sum(count for code, count in tallies["other"].items() if code != "OK")
    return answered | allowed_figures | {"quota_others_failed": others, "failed": failed}


_EXPECTED = {"OK", "QUOTA_EXCEEDED"}


async def _load(
    server: RunningServer, name: str, request: predictor_pb.PredictRequest, rate: float
) -> Counter[str]:
    """Call so often a second, whatever comes of it; return what did."""
    tally: Counter[str] = Counter()
    metadata = (("authorization", f"Bearer token-of-{name}"),)

    async def call() -> None:
        try:
            await stub.Predict(request, metadata=metadata, timeout=60)
        except grpc.aio.AioRpcError as error:
            reason = fault_of(error).reason
            hinted = reason != "QUOTA_EXCEEDED" or retry_seconds(error) > 0
            tally[reason if hinted else "QUOTA_EXCEEDED without a hint"] += 1
        else:
            tally["OK"] += 1

    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = predictor_service_pb2_grpc.PredictorServiceStub(channel)
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(int(SECONDS * rate)):
                await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
                group.create_task(call())
    return tally


async def _queue(server: RunningServer) -> dict[str, Any]:
    """Send four times as many tasks as may wait, while none is taken out of the queue."""
    worker = await _worker(server)
    os.kill(worker, signal.SIGSTOP)
    try:
        metadata = (("authorization", "Bearer token-of-tasks"),)
        outcomes: Counter[str] = Counter()
        # Not grpc.aio, which loses the status of a call that is refused while it writes.
        with grpc.insecure_channel(server.address) as channel:
            stub = learner_service_pb2_grpc.LearnerServiceStub(channel)
            for _ in range(OVERLOAD * TASKS):
                try:
                    await asyncio.to_thread(
                        stub.LearnTask, iter(upload({"green": [png()]})), metadata=metadata
                    )
                except grpc.RpcError as error:
                    outcomes[error.code().name] += 1
                else:
                    outcomes["OK"] += 1
    finally:
        os.kill(worker, signal.SIGCONT)
    print(f"quota of tasks: {dict(outcomes)}, {TASKS} allowed", flush=True)
    as_it_should_be = {"OK": TASKS, "RESOURCE_EXHAUSTED": (OVERLOAD - 1) * TASKS}
    failed = [] if outcomes == as_it_should_be else [f"tasks in the queue: {dict(outcomes)}"]
    return {"quota_tasks_accepted": outcomes["OK"], "failed": failed}


async def _worker(server: RunningServer) -> int:
    """Return the process id of the learning worker, once there is one."""
    async with asyncio.timeout(60):
        while True:
            try:
                return server.worker_pid()
            except LookupError:
                await asyncio.sleep(0.02)


def _noise(side: int) -> bytes:
    """Return an image that does not compress."""
    pixels = random.Random(0).randbytes(side * side * 3)
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(file, "PNG")
    return file.getvalue()


# -- where the default start listens --------------------------------------------------------------


def ports(folder: Path) -> dict[str, Any]:
    """Look for sockets of a server that was started without any option on security."""
    with serving(folder) as server:
        asyncio.run(_worker(server))
        listening = sorted(listeners(server.process.pid))
        beyond = [each for each in listening if not ipaddress.ip_address(each[0]).is_loopback]
        tried = [(own, port) for own in own_addresses() for _, port in listening]
        reached = [each for each in tried if _connects(*each)]
        known = any(_connects(address, port) for address, port in listening)
    print(
        f"listening: {listening}; from {len(tried)} other addresses reached: {reached}", flush=True
    )
    failed = [f"listens on {address}:{port}" for address, port in beyond]
    failed += [f"can be reached at {address}:{port}" for address, port in reached]
    if not known:
        failed.append("the scan does not even find the server's own port")
    return {
        "listening_ports": len(listening),
        "ports_beyond_loopback": len(beyond) + len(reached),
        "failed": failed,
    }


def listeners(pid: int) -> set[tuple[str, int]]:
    """Return address and port of all sockets on which a process and its children listen."""
    inodes = {
        target.removeprefix("socket:[").removesuffix("]")
        for each in _family(pid)
        for target in _links(Path(f"/proc/{each}/fd"))
        if target.startswith("socket:[")
    }
    found = set()
    # A TCP socket that listens has the state 0A; a UDP socket that is bound receives, state 07.
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                found.add(_address(fields[1]))
    return found


def _family(pid: int) -> Iterator[int]:
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from _family(int(child))


def _links(folder: Path) -> Iterator[str]:
    for each in os.listdir(folder):
        try:
            yield os.readlink(folder / each)
        except OSError:
            continue  # closed meanwhile


def _address(text: str) -> tuple[str, int]:
    """Read ``0100007F:C383`` as /proc/net has it: words of four bytes, lowest first."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found), int(port, 16)


def own_addresses() -> set[str]:
    """Return the addresses of this machine that others can reach."""
    found = {str(each[4][0]) for each in _resolved(socket.gethostname())}
    table = Path("/proc/net/fib_trie")
    lines = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    for at, words in enumerate(lines[:-1]):
        if words[:1] == ["|--"] and lines[at + 1][:3] == ["/32", "host", "LOCAL"]:
            found.add(words[1])
    return {each for each in found if not ipaddress.ip_address(each.partition("%")[0]).is_loopback}


def _resolved(name: str) -> list[Any]:
    try:
        return list(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        return []


def _connects(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((address, port)) == 0
