"""How much each principal may use: token buckets, and counts of calls. No gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from inflora_core.errors import QuotaExceededError
from inflora_service.principals import Principal, Quota

Clock = Callable[[], float]


class Bucket:
    """Fills at a constant rate; what was taken may be more than was in it, and is owed then.

    So over any time no more is taken than the time's worth, a second's worth at once, and what the
    last one took.

    Args:
        rate: Units a second.
        least: Units that fit in, should a second's worth be less.
        clock: Seconds.
    """

    def __init__(self, rate: float, least: float, clock: Clock) -> None:
        self._rate = rate
        self._size = max(rate, least)
        self._clock = clock
        self._level = self._size
        self._filled = clock()

    def delay(self) -> float:
        """Return the seconds until something may be taken; 0 for now."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._filled) * self._rate)
        self._filled = now
        # What is a unit but for rounding is one, or who has waited as told would be told to wait.
        return (1.0 - self._level) / self._rate if self._level < 1.0 - 1e-6 else 0.0

    def take(self, units: float) -> None:
        """Take so much."""
        self._level -= units


class Account:
    """What one principal uses. Belongs to one event loop.

    Args:
        name: Whose.
        quota: What it may use.
        clock: Seconds.

    Attributes:
        quota: What it may use.
    """

    def __init__(self, name: str, quota: Quota, clock: Clock = time.monotonic) -> None:
        self.quota = quota
        self._name = name
        self._calls = _bucket(quota.calls_per_second, clock)
        self._bytes = _bucket(quota.bytes_per_second, clock)
        self._running = 0

    def call(self) -> None:
        """Count a call.

        Raises:
            QuotaExceededError: it is one too many, or too much was sent.
        """
        self._refuse(self._bytes, "bytes_per_second")
        self._refuse(self._calls, "calls_per_second")
        if self._calls:
            self._calls.take(1)

    def begin(self) -> None:
        """Count a call as running, until ``end``.

        Raises:
            QuotaExceededError: too many are.
        """
        most = self.quota.concurrent_calls
        if most is not None and self._running >= most:
            raise QuotaExceededError(
                f"{self._name} is over its quota, concurrent_calls = {most}", retry_seconds=1.0
            )
        self._running += 1

    def end(self) -> None:
        """Count a call as running no more."""
        self._running -= 1

    def take(self, size: int) -> None:
        """Count the bytes of a call's only request.

        Raises:
            QuotaExceededError: too much came with other calls meanwhile.
        """
        if self._bytes:
            try:
                self._refuse(self._bytes, "bytes_per_second")
            finally:
                self._bytes.take(size)  # it has come, refused or not

    def charge(self, size: int) -> None:
        """Count bytes that cannot be refused any more."""
        if self._bytes:
            self._bytes.take(size)

    async def pace(self, size: int, *, as_call: bool = False) -> None:
        """Count a message of a stream, once there is room for it."""
        for bucket, units in ((self._calls if as_call else None, 1), (self._bytes, size)):
            if bucket:
                await _room(bucket)
                bucket.take(units)

    def _refuse(self, bucket: Bucket | None, which: str) -> None:
        if bucket and (delay := bucket.delay()):
            most = getattr(self.quota, which)
            raise QuotaExceededError(
                f"{self._name} is over its quota, {which} = {most:g}", retry_seconds=delay
            )


class Accounts:
    """The accounts of all principals.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def of(self, principal: Principal) -> Account:
        """Return a principal's account; a new one if its quota is another than before."""
        account, quota = self._accounts.get(principal.name), principal.quota
        # By identity first: to compare them takes longer than all else that is done for a call.
        if account is None or (account.quota is not quota and account.quota != quota):
            account = Account(principal.name, principal.quota, self._clock)
            self._accounts[principal.name] = account
        return account


async def _room(bucket: Bucket) -> None:
    # Again, since others may have waited for the same moment.
    while True:
        if not (delay := bucket.delay()):
            return
        await asyncio.sleep(delay)


def _bucket(rate: float | None, clock: Clock) -> Bucket | None:
    return None if rate is None else Bucket(rate, 1.0, clock)
