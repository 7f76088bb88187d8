"""The load tool: its figures, its loops in virtual time, and the command against a peer."""

from __future__ import annotations

import asyncio
import io
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from inflora_client import _bench as bench
from inflora_client._bench import Bounds, CallFailedError, Closed, Open, Tally
from inflora_client.cli import app
from inflora_client.cli.picture import draw
from tests.clients import virtual_time
from tests.clients.peer import Peer, status

SECONDS = st.floats(1e-6, 1e3)


class TestPercentile:
    @given(st.lists(SECONDS, min_size=1, max_size=300), st.integers(0, 1000))
    def test_no_fewer_and_no_more_than_asked_for(self, values: list[float], share: int) -> None:
        found = bench.percentile(sorted(values), share)
        assert found in values
        assert sum(v <= found for v in values) * 1000 >= share * len(values)
        assert sum(v < found for v in values) * 1000 <= share * len(values)

    @given(st.lists(SECONDS, min_size=1, max_size=300), st.integers(0, 8))
    def test_is_numpys(self, values: list[float], eighths: int) -> None:
        # Of shares that are exact in binary: numpy's rank of others may be off by rounding.
        expected = np.quantile(values, eighths / 8, method="inverted_cdf")
        assert bench.percentile(sorted(values), 125 * eighths) == expected

    @given(st.lists(SECONDS, max_size=100))
    def test_figures_are_in_order(self, values: list[float]) -> None:
        found = bench.summarise(values)
        if found is None:
            assert not values
            return
        assert found.p50 <= found.p90 <= found.p99 <= found.p999 <= found.max == max(values)
        assert math.isclose(found.mean, float(np.mean(values)))


class TestArrivals:
    @given(st.floats(0.5, 500), st.floats(0.1, 10), st.booleans(), st.integers(0, 99))
    def test_are_due_in_order_and_in_time(
        self, rate: float, seconds: float, poisson: bool, seed: int
    ) -> None:
        load = Open(rate, poisson, seed)
        due = list(bench.arrivals(load, seconds, 3000))
        assert due == sorted(due)
        assert all(0 <= each < seconds for each in due)
        assert due == list(bench.arrivals(load, seconds, 3000))
        if not poisson:
            assert len(due) == min(3000, math.ceil(seconds * rate))
        assert list(bench.arrivals(load, seconds, 3)) == due[:3]

    def test_at_random_is_what_it_says(self) -> None:
        gaps = np.diff(list(bench.arrivals(Open(50.0, seed=3), 400.0)))
        assert abs(gaps.mean() * 50 - 1) < 0.05
        assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # as of an exponential distribution


def served(seconds: Callable[[float], float], at_a_time: int = 1) -> bench.Call:
    """A server in virtual time: how long a call takes is said by when it is begun with."""
    places = asyncio.Semaphore(at_a_time)

    async def call(number: int, left: float) -> str:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(left), places:
                await asyncio.sleep(seconds(loop.time()))
        except TimeoutError:
            raise CallFailedError("DEADLINE_EXCEEDED") from None
        return "1"

    return call


def drive(call: bench.Call, load: Closed | Open, **bounds: Any) -> Tally:
    return virtual_time.run(bench.drive(call, load, Bounds(**bounds)))


class TestLoops:
    def test_a_stall_shows_in_every_call_that_was_due_meanwhile(self) -> None:
        # A call takes 1 ms; the one of 2 s takes 3 s, and no other is answered meanwhile.
        def seconds(now: float) -> float:
            return 3.0 if 2.0 <= now < 2.0005 else 0.001

        tally = drive(served(seconds), Open(100.0, poisson=False), seconds=10.0)
        assert len(tally.latencies) == 1000
        stalled = sorted((each for each in tally.latencies if each > 0.01), reverse=True)
        # Of 100 calls a second 300 were due while it stalled, the k-th of which has k/100 s less to
        # wait, and some more until the queue had gone.
        assert len(stalled) >= 300
        for k, latency in enumerate(stalled[:300]):
            assert latency == pytest.approx(3.0 - k * (0.01 - 0.001), abs=0.01)

        closed = drive(served(seconds), Closed(1), seconds=10.0)
        # A client that waits its turn never asked meanwhile: that is what must not be reported.
        assert sum(latency > 0.01 for latency in closed.latencies) <= 1

    @given(st.integers(1, 20), st.integers(1, 4), st.booleans())
    def test_a_closed_loop_keeps_its_clients_busy(
        self, clients: int, at_a_time: int, by_calls: bool
    ) -> None:
        most = 3 * clients if by_calls else bench.MAX_CALLS
        tally = drive(served(lambda _: 0.25, at_a_time), Closed(clients), seconds=4.0, calls=most)
        busy = min(clients, at_a_time)
        found = bench.report(Closed(clients), tally, images=2)
        if by_calls:
            assert found.calls <= most
        else:
            # All the time, but for the last calls' end.
            most_answered = busy / 0.25 * found.seconds
            assert most_answered - busy <= found.answered <= most_answered
        assert found.latency is not None
        # Little's law: as many are under way as there are clients.
        whole = found.latency.mean * found.answered
        assert whole <= clients * found.seconds + 1e-6
        assert found.images_per_second == pytest.approx(2 * found.throughput)
        assert tally.lateness == 0.0

    def test_warming_up_does_not_count(self) -> None:
        tally = drive(
            served(lambda now: 1.0 if now < 2 else 0.5), Closed(1), seconds=3.0, warm_up=2.0
        )
        assert set(tally.latencies) == {0.5}
        assert tally.seconds == 3.0

    def test_what_is_too_late_is_an_error_and_the_loop_ends(self) -> None:
        tally = drive(served(lambda _: 1.0), Open(50.0, poisson=False), seconds=4.0, deadline=2.5)
        assert tally.errors["DEADLINE_EXCEEDED"] + len(tally.latencies) == 200
        assert max(tally.latencies) <= 2.5
        assert tally.seconds <= 4.0 + 2.5

    def test_calls_beyond_the_bound_wait_and_count_from_when_they_were_due(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench, "_OPEN_CALLS", 2)
        tally = drive(served(lambda _: 1.0, 2), Open(4.0, poisson=False), seconds=2.0)
        # Eight come in 2 s, two at a time: the last two end after 4 s.
        assert tally.seconds == 4.25
        assert max(tally.latencies) == pytest.approx(2.5)
        assert tally.lateness == pytest.approx(1.5)


Run = Callable[..., Result]


@pytest.fixture
def run(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("INFLORA_SERVER", peer.address)
    monkeypatch.setenv("COLUMNS", "200")
    peer.add_version()
    runner = CliRunner()
    return lambda *words: runner.invoke(app, ["bench", *map(str, words)])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.txt"
    path.write_bytes(b"cat")
    return path


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


ONCE = ("--calls", 12, "--warm-up", 0)


class TestCommand:
    def test_sweeps_and_draws(self, run: Run, peer: Peer, image: Path, tmp_path: Path) -> None:
        picture = tmp_path / "picture.svg"
        words = ("--concurrency", "1, 3", *ONCE, "--batch", 2, "--picture", picture, "--json")
        report = parsed(run(image, *words))
        assert [load["concurrency"] for load in report["loads"]] == [1, 3]
        for load in report["loads"]:
            assert (load["loop"], load["calls"], load["failed"]) == ("closed", 12, 0)
            assert load["versions"] == {"1": 12}
            assert load["latency"]["p50"] <= load["latency"]["max"]
        sent = peer.calls["Predict"]
        assert len(sent) == 1 + 2 * 12
        assert list(sent[-1].images) == [b"cat", b"cat"]
        lines = ET.parse(picture).findall("{http://www.w3.org/2000/svg}polyline")
        assert len(lines) == 2

    def test_an_open_loop_for_each_rate(self, run: Run, image: Path) -> None:
        report = parsed(run(image, "--rate", 500, "--rate", 900, "--constant", *ONCE, "--json"))
        assert [load["rate"] for load in report["loads"]] == [500, 900]
        assert [load["calls"] for load in report["loads"]] == [12, 12]

    def test_a_table_without_json(self, run: Run, image: Path) -> None:
        result = run(image, *ONCE)
        assert result.exit_code == 0, result.output
        assert "1 client" in result.stdout
        assert "answered by version 1" in result.stdout

    def test_counts_errors_by_code_and_asks_nothing_twice(
        self, run: Run, peer: Peer, image: Path
    ) -> None:
        peer.failures["Predict"].extend(
            [status("RESOURCE_EXHAUSTED"), status("UNAVAILABLE"), status("UNAVAILABLE")]
        )
        # The call before the first load is an ordinary one, and takes the first failure.
        refused = run(image, *ONCE)
        assert refused.exit_code == 1, refused.output
        peer.failures["Predict"].clear()
        warmed: list[Any] = []
        arrive = peer.arrive

        def failing(method: str, request: Any, context: Any) -> None:
            warmed.append(request)
            if len(warmed) in (3, 5, 6):
                peer.failures[method].append(
                    status("UNAVAILABLE" if len(warmed) > 3 else "RESOURCE_EXHAUSTED")
                )
            arrive(method, request, context)

        peer.arrive = failing  # type: ignore[method-assign]
        (load,) = parsed(run(image, *ONCE, "--json"))["loads"]
        assert load["errors"] == {"UNAVAILABLE": 2, "RESOURCE_EXHAUSTED": 1}
        assert (load["answered"], load["failed"], len(warmed)) == (9, 3, 13)

    def test_without_images_sends_one_of_its_own(self, run: Run, peer: Peer) -> None:
        def decoding(method: str, request: Any, context: Any) -> None:
            with Image.open(io.BytesIO(request.images[0])) as sent:
                sizes.add((sent.format, sent.size))
            request.images[0] = b"cat"  # the peer says what is in an image

        sizes: set[Any] = set()
        peer.arrive = decoding  # type: ignore[method-assign]
        assert run(*ONCE).exit_code == 0
        assert sizes == {("JPEG", (640, 480))}

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--concurrency", "1,x"], "'x'"),
            (["--concurrency", "0"], "'0'"),
            (["--concurrency", "1,"], "''"),
            (["--concurrency", "5000"], "1024"),
            (["--rate", "0"], "--rate is 0"),
            (["--rate", "nan"], "--rate is nan"),
            (["--rate", "5", "--concurrency", "2"], "give one"),
            (["--constant"], "give --rate"),
            (["--seconds", "0"], "--seconds"),
            (["--seconds", "1e9"], "--seconds"),
            (["--calls", "0"], "--calls"),
            (["--deadline", "0"], "--deadline"),
            (["missing.jpg"], "missing.jpg"),
            (["--picture", "/nowhere/picture.svg", *map(str, ONCE)], "/nowhere/picture.svg"),
        ],
    )
    def test_names_what_is_wrong(self, run: Run, image: Path, words: list[str], named: str) -> None:
        result = run(image, *words)
        assert result.exit_code == 2, result.output
        assert named in result.stderr

    def test_names_the_image_that_is_refused(self, run: Run, peer: Peer, image: Path) -> None:
        peer.failures["Predict"].append(status("INVALID_ARGUMENT", "no image"))
        result = run(image)
        assert result.exit_code == 1, result.output
        assert "image.txt: no image" in result.stderr

    def test_says_that_nobody_answers(self, run: Run, image: Path) -> None:
        result = run(image, "--server", "localhost:1")
        assert result.exit_code == 3, result.output

    def test_ends_with_an_error_where_no_call_was_answered(
        self, run: Run, peer: Peer, image: Path
    ) -> None:
        arrive, calls = peer.arrive, iter(range(100))

        def failing(method: str, request: Any, context: Any) -> None:
            if next(calls):
                peer.failures[method].append(status("RESOURCE_EXHAUSTED"))
            arrive(method, request, context)

        peer.arrive = failing  # type: ignore[method-assign]
        result = run(image, *ONCE)
        assert result.exit_code == 1, result.output
        assert "RESOURCE_EXHAUSTED (12)" in result.stderr


@given(
    st.lists(
        st.tuples(st.lists(SECONDS, max_size=20), st.integers(0, 3), st.integers(1, 64)),
        min_size=1,
        max_size=9,
    )
)
def test_every_report_can_be_drawn(loads: list[tuple[list[float], int, int]]) -> None:
    reports = []
    for latencies, failed, clients in loads:
        tally = Tally(latencies, seconds=1.0)
        tally.errors["UNAVAILABLE"] = failed
        reports.append(bench.report(Closed(clients), tally, 1))
    drawn = ET.fromstring(draw(reports, "<title> & more"))
    assert "<title> & more" in [each.text for each in drawn]
