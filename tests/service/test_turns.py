"""``turns``: whatever happens, every call ends once, none starves, and no place is lost."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inflora_core.config import Limits
from inflora_core.errors import DeadlineError, InvalidImageError, LimitExceededError
from inflora_core.predictor import Answers, Predictor
from inflora_service.turns import FOREVER, Call, Image, Prepared, Turns

VERSIONS = tuple(cast(Predictor, f"version {number}") for number in (1, 2))
PIXELS = np.zeros((1, 3, 2, 2), np.float32)
LIMITS = Limits(predict_waiting_images=12, predict_waiting_bytes=100)


def encoded(count: int, size: int = 1, **more: Any) -> Call:
    """A call with images that are to be decoded."""
    more.setdefault("predictor", VERSIONS[0])
    return Call(sources=deque((index, bytes(size)) for index in range(count)), **more)


def in_bulk(count: int, **more: Any) -> Call:
    more.setdefault("predictor", VERSIONS[0])
    return Call(bulk=True, ready=deque((index, PIXELS) for index in range(count)), **more)


def answers(batch: list[Prepared]) -> Answers:
    """Answers that tell which image they are of."""
    numbers = np.array([[index] for _, index, _ in batch], np.float32)
    return Answers(numbers, numbers, numbers, numbers[:, 0])


def decode_all(turns: Turns, now: float = 0.0) -> list[tuple[Call, int]]:
    """Decode until there is nothing to decode, or no room; return what, in its order."""
    order = []
    while image := turns.next_image(now):
        call, index, _ = image
        turns.prepared(call, index, PIXELS)
        order.append((call, index))
    return order


def run_all(turns: Turns, now: float = 0.0, seconds: float = 0.0) -> list[list[tuple[Call, int]]]:
    """Run the model until nothing waits for it; return the batches."""
    order = []
    while batch := turns.next_batch(now):
        now += seconds
        turns.classified(batch, answers(batch), now - seconds, now)
        order.append([(call, index) for call, index, _ in batch])
    return order


def test_calls_take_turns() -> None:
    turns = Turns(LIMITS, runs=1)
    large, small, middle = encoded(5), encoded(1), encoded(2)
    for call in (large, small, middle):
        turns.enter(call, 0.0)
    expected = [(large, 0), (small, 0), (middle, 0), (large, 1), (middle, 1)]
    expected += [(large, 2), (large, 3), (large, 4)]
    assert decode_all(turns) == expected
    assert [batch[0] for batch in run_all(turns)] == expected
    assert turns.settled == [small, middle, large]


def test_a_batch_is_of_one_version_and_takes_of_each_call() -> None:
    turns = Turns(LIMITS, runs=1)
    turns.batch = 3
    large, other, small = encoded(4), encoded(2, predictor=VERSIONS[1]), encoded(1)
    for call in (large, other, small):
        turns.enter(call, 0.0)
    decode_all(turns)
    assert run_all(turns) == [
        [(large, 0), (small, 0), (large, 1)],
        [(other, 0), (other, 1)],
        [(large, 2), (large, 3)],
    ]


def test_no_more_is_decoded_than_keeps_the_model_busy() -> None:
    turns = Turns(Limits(), runs=2)
    turns.enter(encoded(256), 0.0)
    assert len(decode_all(turns)) == 32
    assert len(run_all(turns)) == 32
    assert len(decode_all(turns)) == 32


def test_what_is_in_bulk_leaves_a_run_to_others() -> None:
    turns = Turns(LIMITS, runs=3)
    bulk = in_bulk(9)
    turns.enter(bulk, 0.0)
    held = [turns.next_batch(0.0) for _ in range(3)]
    assert [len(batch) for batch in held] == [1, 1, 0]
    call = encoded(1)
    turns.enter(call, 0.0)
    decode_all(turns)
    assert turns.next_batch(0.0)[0][0] is call
    turns.classified(held[0], answers(held[0]), 0.0, 1.0)
    assert turns.next_batch(1.0)[0][0] is bulk


def test_with_one_run_what_is_in_bulk_takes_turns() -> None:
    turns = Turns(LIMITS, runs=1)
    bulk, call = in_bulk(3), encoded(2)
    for each in (bulk, call):
        turns.enter(each, 0.0)
    decode_all(turns)
    order = [batch[0][0] for batch in run_all(turns)]
    assert order == [bulk, call, bulk, call, bulk]


@pytest.mark.parametrize(("count", "size"), [(13, 0), (1, 101), (6, 11)])
def test_a_full_queue_refuses_and_takes_again(count: int, size: int) -> None:
    turns = Turns(LIMITS, runs=1)
    first, second = encoded(count, size), encoded(7, 5)
    turns.enter(first, 0.0)  # alone, it may be larger than what may wait
    with pytest.raises(LimitExceededError, match="retry later"):
        turns.enter(second, 0.0)
    turns.leave(first)
    turns.enter(second, 0.0)
    assert turns.images == 7


def test_evaluations_do_not_fill_the_queue() -> None:
    turns = Turns(LIMITS, runs=1)
    turns.enter(in_bulk(500), 0.0)
    turns.enter(encoded(12), 0.0)
    turns.enter(in_bulk(500), 0.0)


def busy(turns: Turns, seconds: float) -> None:
    """Have ``turns`` learn that a run takes that long."""
    turns.enter(call := encoded(12), 0.0)
    decode_all(turns)
    run_all(turns, seconds=seconds)
    assert call.ended


def test_what_cannot_be_answered_in_time_is_refused_at_once() -> None:
    turns = Turns(Limits(), runs=1)
    for _ in range(4):
        busy(turns, 1.0)
    turns.enter(encoded(10), 0.0)
    with pytest.raises(DeadlineError, match="10 images come first"):
        turns.enter(encoded(10, deadline=15.0), 0.0)
    # It takes turns: only one image of the other comes before its own.
    turns.enter(encoded(1, deadline=3.0), 0.0)
    turns.enter(encoded(10, deadline=40.0), 0.0)


def test_what_waited_too_long_is_not_begun_with() -> None:
    turns = Turns(LIMITS, runs=1)
    late, other = encoded(2, deadline=5.0), encoded(1)
    for call in (late, other):
        turns.enter(call, 0.0)
    first = turns.next_image(4.0)
    assert first is not None
    assert decode_all(turns, 5.0) == [(other, 0)]
    assert turns.settled == []  # an image of it is under way
    turns.prepared(late, 0, PIXELS)
    assert turns.settled == [late]
    assert late.fault is not None
    assert isinstance(late.fault[1], DeadlineError)
    run_all(turns, 5.0)
    assert turns.idle


def test_a_stall_does_not_refuse_calls_for_good() -> None:
    """A machine that was asleep for an hour: from the next call on, a second is enough again."""
    turns = Turns(LIMITS, runs=1)
    busy(turns, 3600.0)
    refused = 0
    while refused < 100:
        turns.enter(other := encoded(1), 0.0)
        try:
            turns.enter(encoded(1, deadline=1.0), 0.0)
            break
        except DeadlineError:
            turns.leave(other)
            refused += 1
    assert 0 < refused < 100


def test_refusing_many_does_not_take_in_what_is_hopeless() -> None:
    """Calls that are refused are no sign of a stall while others are answered."""
    turns = Turns(Limits(), runs=1)
    for _ in range(8):
        busy(turns, 1.0)
    turns.enter(encoded(1), 0.0)
    for round_ in range(20):
        for _ in range(50):
            with pytest.raises(DeadlineError):
                turns.enter(encoded(1, deadline=round_ + 0.5), round_)
        turns.enter(encoded(1), round_)
        decode_all(turns, round_)
        batch = turns.next_batch(round_)
        turns.classified(batch, answers(batch), round_, round_ + 1)


def test_when_nothing_waits_a_slow_model_refuses_nothing() -> None:
    turns = Turns(LIMITS, runs=1)
    busy(turns, 3600.0)
    turns.enter(encoded(3, deadline=1.0), 0.0)
    assert len(decode_all(turns)) == 3


def test_time_without_work_is_not_taken_for_slowness() -> None:
    turns = Turns(LIMITS, runs=1)
    for start in range(0, 100_000, 1000):
        turns.enter(encoded(1), start)
        decode_all(turns, start)
        run_all(turns, start, seconds=0.01)
    turns.enter(encoded(11), 0.0)
    turns.enter(encoded(1, deadline=1.0), 0.0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_first_image_at_fault_is_named(order: tuple[int, ...]) -> None:
    turns = Turns(LIMITS, runs=1)
    call = encoded(5)
    turns.enter(call, 0.0)
    for _ in range(3):
        turns.next_image(0.0)
    for index in order:
        error = InvalidImageError("damaged", field=f"images[{index}]")
        turns.prepared(call, index, error if index else PIXELS)
    assert turns.next_image(0.0) is None
    assert turns.settled == [call]
    assert call.fault is not None
    assert call.fault[0] == 1
    assert turns.idle


def test_runs_are_as_many_as_are_allowed_by_now() -> None:
    turns = Turns(LIMITS, runs=3)
    for _ in range(3):
        turns.enter(encoded(1), 0.0)
    decode_all(turns)
    turns.runs = 2
    first, second = turns.next_batch(0.0), turns.next_batch(0.0)
    assert (len(first), len(second), turns.next_batch(0.0)) == (1, 1, [])
    turns.classified(first, answers(first), 0.0, 1.0)
    assert len(turns.next_batch(1.0)) == 1


def test_alone_is_who_shares_the_processors_with_nobody() -> None:
    turns = Turns(LIMITS, runs=3)
    first, second = encoded(1), encoded(2)
    turns.enter(first, 0.0)
    decode_all(turns)
    batch = turns.next_batch(0.0)
    assert turns.is_alone(batch)
    turns.enter(second, 0.0)
    decode_all(turns)
    one, two = turns.next_batch(0.0), turns.next_batch(0.0)
    assert not turns.is_alone(one)
    turns.leave(first)
    for each in (batch, one):
        turns.classified(each, answers(each), 0.0, 1.0)
    assert turns.is_alone(two)


class History(RuleBasedStateMachine):
    """Calls come, go and fail in any order; threads take and give back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.runs = 2
        self.turns = Turns(LIMITS, self.runs)
        self.calls: list[Call] = []
        self.decoding: list[Image] = []
        self.running: list[list[Prepared]] = []
        self.ended: list[Call] = []
        self.given_up: set[Call] = set()

    @rule(
        count=st.integers(1, 5),
        version=st.sampled_from(VERSIONS),
        bulk=st.booleans(),
        deadline=st.sampled_from([FOREVER, 0.0, 2.0, 50.0]),
    )
    def come(self, count: int, version: Predictor, bulk: bool, deadline: float) -> None:
        if bulk:
            call = in_bulk(count, predictor=version)
        else:
            call = encoded(count, predictor=version, deadline=self.now + deadline)
        try:
            self.turns.enter(call, self.now)
        except (LimitExceededError, DeadlineError):
            assert call not in self.turns.calls
        else:
            self.calls.append(call)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))
        self.turns.leave(call)
        if call not in self.ended:
            self.given_up.add(call)

    @rule(most=st.integers(1, 4))
    def take_batches(self, most: int) -> None:
        self.turns.batch = most

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take_image(self) -> None:
        if image := self.turns.next_image(self.now):
            assert not image[0].ended
            self.decoding.append(image)

    @precondition(lambda self: self.decoding)
    @rule(data=st.data(), fails=st.booleans())
    def prepare(self, data: st.DataObject, fails: bool) -> None:
        image = data.draw(st.sampled_from(self.decoding))
        self.decoding.remove(image)
        call, index, _ = image
        self.turns.prepared(call, index, InvalidImageError("no") if fails else PIXELS)

    @precondition(lambda self: len(self.running) < self.runs)
    @rule()
    def take_batch(self) -> None:
        if batch := self.turns.next_batch(self.now):
            assert len(batch) <= self.turns.batch
            assert len({id(call.predictor) for call, _, _ in batch}) == 1
            assert not any(call.ended for call, _, _ in batch)
            self.running.append(batch)
            bulk = [each for each in self.running if any(call.bulk for call, _, _ in each)]
            assert len(bulk) < self.runs

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def classified(self, data: st.DataObject, fails: bool) -> None:
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        outcome = RuntimeError("no") if fails else answers(batch)
        self.turns.classified(batch, outcome, self.now, self.now)

    @invariant()
    def calls_end_once(self) -> None:
        for call in self.turns.settled:
            assert call not in self.ended
            assert call not in self.given_up
            assert not call.under_way
            self.ended.append(call)
            if call.fault is None:
                rows = [call.answers[index].logits[0, 0] for index in sorted(call.answers)]
                assert rows == list(range(len(rows)))
                assert not call.left
        self.turns.settled.clear()
        for call in self.ended:
            assert call not in self.turns.calls

    def teardown(self) -> None:
        """Once everybody has given back what they hold and all is done, every call has ended."""
        for call, index, _ in self.decoding:
            self.turns.prepared(call, index, PIXELS)
        for batch in self.running:
            self.turns.classified(batch, answers(batch), self.now, self.now)
        while not self.turns.idle:
            decoded, run = decode_all(self.turns, self.now), run_all(self.turns, self.now)
            self.calls_end_once()
            assert decoded or run or self.turns.idle
        self.calls_end_once()
        assert {*self.ended, *self.given_up} >= set(self.calls)
        assert not self.turns.images


History.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestHistory = History.TestCase
