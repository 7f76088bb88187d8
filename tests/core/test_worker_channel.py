"""The worker's end of the pipes."""

from __future__ import annotations

import io
import json
import os
import threading

import pytest

from inflora_core.errors import CancelledError
from inflora_core.model import Progress, Stage
from inflora_core.worker import Channel


def test_a_task_that_was_given_up_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    # With the end of its commands a worker ends its process, which is the tests' here.
    monkeypatch.setattr(os, "_exit", lambda status: over.set())
    reading, writing = os.pipe()
    learn = {"command": "learn", "task": "t"}
    progress = Progress(Stage.TRAINING, 0.5)
    with os.fdopen(reading) as incoming, os.fdopen(writing, "w") as commands:
        channel = Channel(incoming, io.StringIO())
        received = channel.commands()

        def send(*sent: dict[str, str]) -> None:
            # Once the last one is there, those before it are known.
            for each in (*sent, {"command": "edit", "task": "other"}):
                commands.write(json.dumps(each) + "\n")
            commands.flush()

        send(learn, {"command": "cancel", "task": "t"})
        assert [next(received), next(received)["command"]] == [learn, "edit"]
        with pytest.raises(CancelledError):
            channel.report("t", progress)
        send(learn)
        assert [next(received), next(received)["command"]] == [learn, "edit"]
        channel.report("t", progress)
        commands.close()
        assert over.wait(60)
