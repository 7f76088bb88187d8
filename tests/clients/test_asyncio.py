"""What only the asyncio client can do: asynchronous sources, and being cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from inflora_client import AsyncClient, UnavailableError
from tests.clients.peer import QUICK, Peer, status


async def test_learns_from_an_asynchronous_iterable(peer: Peer) -> None:
    async def examples() -> AsyncIterator[tuple[bytes, str]]:
        for number in range(3):
            await asyncio.sleep(0)
            yield b"image", f"class {number}"

    async with AsyncClient(peer.address, retry=QUICK) as client:
        task = await client.learn(examples())
    assert [c.label for c in task.classes] == ["class 0", "class 1", "class 2"]


async def test_evaluates_an_asynchronous_iterable(peer: Peer) -> None:
    async def examples() -> AsyncIterator[tuple[bytes, str]]:
        for number in range(3):
            await asyncio.sleep(0)
            yield b"image", f"class {number}"

    async with AsyncClient(peer.address, retry=QUICK) as client:
        assert (await client.evaluate(examples(), version=2)).images == 3
    _, batch, _ = peer.calls["Evaluate"][0]
    assert [e.label for e in batch.examples.examples] == ["class 0", "class 1", "class 2"]


async def test_does_not_repeat_an_asynchronous_iterable(peer: Peer) -> None:
    async def examples() -> AsyncIterator[tuple[bytes, str]]:
        yield b"image", "a"

    peer.failures["LearnTask"].append(status("UNAVAILABLE"))
    async with AsyncClient(peer.address, retry=QUICK) as client:
        with pytest.raises(UnavailableError):
            await client.learn(examples())
    assert len(peer.calls["LearnTask"]) == 1


async def test_raises_an_error_of_an_asynchronous_iterable(peer: Peer) -> None:
    async def examples() -> AsyncIterator[tuple[bytes, str]]:
        yield b"image", "a"
        raise KeyError("camera")

    async with AsyncClient(peer.address, retry=QUICK) as client:
        with pytest.raises(KeyError, match="camera"):
            await client.learn(examples())
    assert await asyncio.to_thread(peer.upload_ended.wait, 10)
    assert not peer.tasks


async def test_an_upload_can_be_cancelled(peer: Peer) -> None:
    waiting = asyncio.Event()

    async def examples() -> AsyncIterator[tuple[bytes, str]]:
        yield bytes(600_000), "a"
        assert await asyncio.to_thread(peer.upload_begun.wait, 10)
        waiting.set()
        await asyncio.Event().wait()

    async with AsyncClient(peer.address, retry=QUICK) as client:
        upload = asyncio.create_task(client.learn(examples()))
        await waiting.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert await asyncio.to_thread(peer.upload_ended.wait, 10)


async def test_asks_on_from_its_answers(peer: Peer) -> None:
    """A camera that sends the next image only once the last is answered."""
    images: asyncio.Queue[list[bytes]] = asyncio.Queue()

    async def requests() -> AsyncIterator[list[bytes]]:
        while True:
            yield await images.get()

    await images.put([b"0"])
    labels = []
    async with (
        AsyncClient(peer.address, retry=QUICK) as client,
        aclosing(client.predict_stream(requests())) as results,
    ):
        async for result in results:
            labels.append(result.predictions[0].label)
            if len(labels) == 3:
                break
            await images.put([str(len(labels)).encode()])
    assert labels == ["0", "1", "2"]


async def test_predicts_concurrently(peer: Peer) -> None:
    async with AsyncClient(peer.address, retry=QUICK) as client:
        texts = [str(number).encode() for number in range(20)]
        results = await asyncio.gather(*(client.predict([text]) for text in texts))
    assert [r.predictions[0].label for r in results] == [t.decode() for t in texts]


async def test_a_client_that_was_never_used_closes(peer: Peer) -> None:
    async with AsyncClient(peer.address):
        pass
