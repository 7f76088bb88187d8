"""The figures of ``make bench-serving``, its records, and how it asks peers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_client._bench import CallFailedError
from tests.benchmarks.serving import __main__ as serving
from tests.benchmarks.serving import callers, figures
from tests.benchmarks.serving.record import Record

FIGURE = st.floats(0.001, 1000)


def load(throughput: float, p50: float = 1.0, p99: float = 1.0) -> dict[str, Any]:
    return {"throughput": throughput, "latency": {"p50": p50, "p99": p99}, "failed": 0}


class TestAgainstBare:
    @given(st.floats(0.1, 10), st.floats(0.1, 10), st.lists(FIGURE, min_size=1, max_size=5))
    def test_a_machine_that_is_slower_in_some_rounds_changes_nothing(
        self, latency: float, throughput: float, speeds: list[float]
    ) -> None:
        bare = [{"1": load(speed, 1 / speed)} for speed in speeds]
        ours = [
            {
                "1": load(speed, latency / speed),
                "16": load(speed * throughput),
                "64": load(speed * throughput * 2),
            }
            for speed in speeds
        ]
        found = figures.against_bare(bare, ours, (16, 64))
        assert found["latency_vs_bare"] == pytest.approx(latency)
        assert found["throughput_vs_bare"] == pytest.approx(throughput)
        assert found["throughput_vs_bare_at"]["64"] == pytest.approx(2 * throughput)


class TestCells:
    def test_the_best_layout_of_any_peer_counts(self) -> None:
        rounds = {
            "ours": [{"8": load(100.0, 0.010, 0.030)}],
            "A/split": [{"8": load(102.0, 0.020, 0.020)}],
            "A/whole": [{"8": load(50.0, 0.005, 0.060)}],
            "B/split": [{"error": "no wheel"}],
        }
        rounds["A/split"].append({"error": "its port was taken"})
        found = figures.cells(rounds, [8])
        assert [cell["best_peer"] for cell in found] == ["A/split", "A/whole", "A/split"]
        assert [cell["ratio"] for cell in found] == pytest.approx([100 / 102, 0.5, 2 / 3])
        assert figures.compared(found) == {
            "cells": 3,
            "cells_first": 0,
            "cells_within_3_percent": 1,
        }

    @given(st.lists(FIGURE, min_size=3, max_size=3), st.lists(FIGURE, min_size=3, max_size=3))
    def test_a_better_figure_is_a_ratio_above_one(
        self, ours: list[float], theirs: list[float]
    ) -> None:
        found = figures.cells({"ours": [{"1": load(*ours)}], "A": [{"1": load(*theirs)}]}, [1])
        better = [ours[0] > theirs[0], ours[1] < theirs[1], ours[2] < theirs[2]]
        equal = [a == b for a, b in zip(ours, theirs, strict=True)]
        for cell, wins, draws in zip(found, better, equal, strict=True):
            assert cell["ratio"] == pytest.approx(1.0) if draws else (cell["ratio"] >= 1) == wins

    def test_is_the_median_of_the_rounds(self) -> None:
        rounds = {"ours": [{"1": load(each)} for each in (9.0, 1.0, 5.0)]}
        assert figures.cells(rounds, [1])[0]["values"] == {"ours": 5.0}

    @given(st.floats(0.5, 2), st.lists(st.floats(0.2, 5), min_size=2, max_size=6))
    def test_a_machine_that_is_slower_for_one_of_them_changes_nothing(
        self, ratio: float, speeds: list[float]
    ) -> None:
        def measured(speed: float, better: float) -> dict[str, Any]:
            return {
                "1": load(speed * better, 1 / speed / better, 2 / speed / better) | {"pace": speed}
            }

        rounds = {
            "ours": [measured(speed, ratio) for speed in speeds],
            "A": [measured(speed, 1.0) for speed in reversed(speeds)],
        }
        found = figures.cells(rounds, [1])
        assert [cell["ratio"] for cell in found] == pytest.approx([ratio] * 3)

    def test_without_a_single_answer_it_is_the_worst(self) -> None:
        silent = {"throughput": 0.0, "latency": None, "failed": 7}
        rounds = {"ours": [{"1": load(1.0)}], "A": [{"1": silent}]}
        found = figures.cells(rounds, [1])
        assert figures.compared(found)["cells_first"] == 3

    def test_failed_calls_are_told(self) -> None:
        failing = {"throughput": 1.0, "latency": None, "failed": 7}
        rounds = {"ours": [{"1": load(1.0)}], "A": [{"1": failing}, {"error": "no port"}]}
        assert figures.failures(rounds, [1]) == {"ours": 0, "A": 7}

    def test_without_peers_nothing_is_won(self) -> None:
        found = figures.cells({"ours": [{"1": load(1.0)}]}, [1])
        assert figures.compared(found)["cells_first"] == 0
        assert "| ours | **1.0** |" in figures.table(found, {}, {})


def test_the_table_names_who_is_not_in_it() -> None:
    rounds = {"ours": [{"1": load(10.0, 0.1, 0.2)}], "A/split": [{"1": load(20.0, 0.05, 0.3)}]}
    text = figures.table(figures.cells(rounds, [1]), {"B/split": "no\nwheel"}, {"A (a==1)": "HTTP"})
    assert "| ours | 10.0 | 100.0 | **200.0** |" in text
    assert "| A/split | **20.0** | **50.0** | 300.0 |" in text
    assert "| ours against the best peer | 0.50 | 0.50 | 1.50 |" in text
    assert "- A (a==1): HTTP" in text
    assert "- B/split is not in the table: no wheel" in text


def test_the_table_is_written_between_its_marks_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("# Benchmarks\n")
    for text in ("first\n", "second\n"):
        serving.write_table(path, text)
    content = path.read_text()
    assert content.startswith("# Benchmarks\n")
    assert "first" not in content
    assert content.count("second") == content.count(serving.BEGIN) == 1


def test_figures_of_swaps() -> None:
    phase = {"latency": {"p99": 1.0}, "errors": {}}
    found = {
        "before": phase,
        "during": {"latency": {"p99": 3.0}, "errors": {"UNAVAILABLE": 2}},
        "after": {"latency": {"p99": 2.0}, "errors": {"INTERNAL": 1}},
        "swaps": 200,
        "resident_bytes": [50] * 10
        + [80, 100, 120, 90, 110] * 2
        + [100] * 170
        + [104, 94, 114, 104, 104] * 2,
    }
    assert figures.of_swaps(found) == {
        "swaps": 200,
        "swap_failures": 3,
        "swap_p99_ratio": 2.0,
        "swap_memory_ratio": 1.04,
    }


def test_figures_of_a_soak() -> None:
    """What is set up in the first quarter is no growth; a server that grows all along does."""
    grown = [100, 180, 200, 200, 200, 202, 206, 300]
    found = {
        "seconds": 900.0,
        "load": {"calls": 90, "failed": 1, "latency": {"p99": 0.5}},
        "turns": {"PUBLISHED": 3, "FAILED": 1, "CANCELLED": 1, "promoted": 6},
        "memory": [{"at": i, "server": size, "worker": 50} for i, size in enumerate(grown)],
    }
    assert figures.of_soak(found) == {
        "soak_seconds": 900.0,
        "soak_calls": 90,
        "soak_failures": 2,
        "soak_p99": 0.5,
        "soak_learned": 3,
        "soak_swaps": 9,
        "soak_memory_ratio": (206 + 300) / 2 / 200,
        "soak_worker_memory_ratio": 1.0,
    }


class TestRecord:
    def test_measures_once(self, tmp_path: Path) -> None:
        path, made = tmp_path / "results.jsonl", []

        def measure() -> dict[str, Any]:
            made.append(1)
            return {"calls": len(made)}

        for code, expected in (("a", 1), ("a", 1), ("b", 2), ("a", 1)):
            record = Record(path, {"code": code}, {"machine": "m"})
            assert record.take({"part": "p", "round": 0}, measure) == {"calls": expected}
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
        assert [line["machine"] for line in lines] == ["m", "m"]

    def test_an_error_is_not_kept(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "results.jsonl", {}, {})
        assert record.take({"n": 1}, lambda: {"error": "no"}) == {"error": "no"}
        assert record.take({"n": 1}, lambda: {"calls": 1}) == {"calls": 1}

    def test_a_line_that_was_cut_off_is_made_again(self, tmp_path: Path) -> None:
        path = tmp_path / "results.jsonl"
        Record(path, {}, {}).take({"n": 1}, lambda: {"calls": 1})
        whole = path.read_text()
        for end in range(1, len(whole)):
            path.write_text(whole[:end])
            record = Record(path, {}, {})
            assert record.take({"n": 1}, lambda: {"calls": 1}) == {"calls": 1}
            assert Record(path, {}, {}).take({"n": 1}, lambda: {"calls": 9}) == {"calls": 1}


Answer = Callable[[bytes], bytes]


async def asked(answer: Answer, use: Callable[[int], Awaitable[Any]]) -> tuple[Any, int]:
    """Run a small HTTP peer; return what ``use`` of its port returns, and its connections."""
    handlers: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # the other side is done
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                writer.write(answer(await reader.readexactly(length)))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.create_task(serve(reader, writer)))

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as server:
        found = await use(server.sockets[0].getsockname()[1])
        await asyncio.gather(*handlers)
    return found, len(handlers)


def reply(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


class TestHttp:
    async def test_asks_over_one_connection(self) -> None:
        async def use(port: int) -> list[str]:
            async with callers.Http(port, "/p", [b"cat", b"dog"]) as call:
                return [await call(number, 10.0) for number in range(3)]

        found, connections = await asked(
            lambda body: reply(json.dumps({"label": body.decode()}).encode()), use
        )
        assert (found, connections) == (["cat", "dog", "cat"], 1)

    async def test_uploads_as_a_form(self) -> None:
        sent: list[bytes] = []

        async def use(port: int) -> str:
            async with callers.Http(port, "/p", [b"cat"], field="request") as call:
                return await call(0, 10.0)

        def answer(body: bytes) -> bytes:
            sent.append(body)
            return reply(b'{"label": "x"}')

        assert (await asked(answer, use))[0] == "x"
        assert b'name="request"' in sent[0]
        assert sent[0].split(b"\r\n\r\n")[1].startswith(b"cat\r\n--")

    @pytest.mark.parametrize(
        ("answer", "code"),
        [
            (reply(b"busy", "503 Service Unavailable"), "HTTP 503"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n", None),
        ],
    )
    async def test_says_what_failed(self, answer: bytes, code: str | None) -> None:
        async def use(port: int) -> str:
            async with callers.Http(port, "/p", [b"cat"]) as call:
                with pytest.raises(CallFailedError) as caught:
                    await call(0, 10.0 if code else 0.05)
            return caught.value.code

        assert (await asked(lambda _: answer, use))[0] == (code or "DEADLINE_EXCEEDED")

    async def test_says_that_nobody_answers(self) -> None:
        async with callers.Http(1, "/p", [b"cat"]) as call:
            with pytest.raises(CallFailedError, match="UNAVAILABLE"):
                await call(0, 10.0)
