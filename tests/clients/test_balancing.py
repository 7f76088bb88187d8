"""Calls take turns between servers, and servers may go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from inflora_client import Client, TaskState
from inflora_client._channel import is_balanced
from tests.clients.peer import Peer, status

ENOUGH = 5_000
"""Calls after which every server that can be reached has had one."""


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    with ExitStack() as stack:
        peers = [Peer() for _ in range(3)]
        for peer in peers:
            stack.callback(peer.stop)
            peer.add_version()
        yield peers


def target_of(peers: list[Peer]) -> str:
    return "ipv4:" + ",".join(peer.address.replace("localhost", "127.0.0.1") for peer in peers)


def asked(peers: list[Peer]) -> list[int]:
    return [len(peer.calls["GetVersion"]) for peer in peers]


def ask_until_all_answered(client: Client, peers: list[Peer]) -> None:
    for _ in range(ENOUGH):
        client.version()
        if all(asked(peers)):
            return
    raise AssertionError(f"calls did not take turns: {asked(peers)}")


def test_calls_take_turns(connect: Callable[..., Client], peers: list[Peer]) -> None:
    client = connect(target_of(peers))
    ask_until_all_answered(client, peers)
    before = asked(peers)
    for _ in range(30):
        client.version()
    assert [now - then for now, then in zip(asked(peers), before, strict=True)] == [10, 10, 10]


def test_no_call_fails_while_servers_go(connect: Callable[..., Client], peers: list[Peer]) -> None:
    """As in a rolling restart: one after the other, and the last one answers for all."""
    client = connect(target_of(peers))
    ask_until_all_answered(client, peers)
    for gone in peers[:2]:
        gone.stop()
        for _ in range(20):
            assert client.version().current


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED"])
def test_what_a_server_that_stops_says_is_asked_again(
    connect: Callable[..., Client], peers: list[Peer], code: str
) -> None:
    """CANCELLED is what becomes of calls that had arrived, and not been taken up yet."""
    peers[0].failures["GetVersion"].append(status(code))
    assert connect(peers[0].address).version().current
    assert asked(peers) == [2, 0, 0]


def test_a_stream_that_a_stopping_server_drops_goes_on(
    connect: Callable[..., Client], peers: list[Peer]
) -> None:
    peer = peers[0]
    dropped = status("CANCELLED", "CANCELLED")
    dropped.ClearField("details")
    peer.watches += [[dropped], [peer.add_task("t1", state="TASK_STATE_PUBLISHED")]]
    assert connect(peer.address).wait("t1").state is TaskState.PUBLISHED
    assert len(peer.calls["WatchTask"]) == 2


def test_a_name_is_looked_up(connect: Callable[..., Client], peers: list[Peer]) -> None:
    assert connect(f"dns:///{peers[0].address}").version().current


@pytest.mark.parametrize(
    ("target", "balanced"),
    [
        ("localhost:50051", False),
        ("predictors.shop.svc:50051", False),
        ("unix:/run/inflora", False),
        ("dns:///predictors:50051", True),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
    ],
)
def test_a_host_and_a_port_are_one_server(target: str, balanced: bool) -> None:
    assert is_balanced(target) is balanced
