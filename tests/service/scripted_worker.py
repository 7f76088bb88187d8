"""A learning worker that does what a test says, at the other end of the real protocol.

At every point (``POINTS``) it asks the test, over a Unix socket, what to do next: go on, fail, or
end at once. What it "learns" is the mean colour of each class. The test publishes that for it, in
the real store: this program imports next to nothing, so that a test can afford several.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import sys
import threading
from typing import Any

STAGES = (
    "DECODING",
    "DESIGNING",
    "TRAINING",
    "EXTENDING",
    "MERGING",
    "EXPORTING",
    "CHECKING",
    "PUBLISHING",
)
POINTS = ("START", "PREPARE", *STAGES, "LEARNED")
"""At ``LEARNED`` the version is durable, and the server does not know yet."""


class CancelledError(Exception):
    pass


class FailedError(Exception):
    pass


class Worker:
    def __init__(self, store: str, script: str) -> None:
        self.store = store
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self.commands: list[dict[str, Any]] = []
        self.cancelled: set[str] = set()
        self.questions = 0
        self.script = socket.socket(socket.AF_UNIX)
        self.script.connect(script)
        threading.Thread(target=self.read_commands, daemon=True).start()
        threading.Thread(target=self.read_script, daemon=True).start()

    def read_commands(self) -> None:
        for line in sys.stdin:
            self.inbox.put(json.loads(line))
        os._exit(0)

    def read_script(self) -> None:
        for line in self.script.makefile():
            self.inbox.put(json.loads(line))

    def send(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)

    def reach(self, point: str, command: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the test what to do here; return its answer if it is to go on."""
        self.questions += 1
        question = {"at": point, "pid": os.getpid(), "number": self.questions}
        question |= {"command": command or {}, "store": self.store}
        self.script.sendall(json.dumps(question).encode() + b"\n")
        while True:
            task = command and command.get("task")
            if task in self.cancelled and POINTS.index(point) < POINTS.index("PUBLISHING"):
                raise CancelledError
            message = self.inbox.get()
            if message.get("number") == self.questions:
                break
            self.take(message)
        match message["do"]:
            case "fail":
                raise FailedError(message)
            case "exit":
                os._exit(message["status"])
            case "say":
                print(message["line"], flush=True)
        return message

    def take(self, message: dict[str, Any]) -> None:
        if message.get("command") == "cancel":
            self.cancelled.add(message["task"])
        elif "command" in message:
            self.cancelled.discard(message.get("task"))
            self.commands.append(message)

    def next_command(self) -> dict[str, Any]:
        while not self.commands:
            self.take(self.inbox.get())
        return self.commands.pop(0)

    def serve(self) -> None:
        self.reach("START")
        self.send("ready")
        while True:
            command = self.next_command()
            task = command.get("task")
            try:
                if command["command"] == "prepare":
                    self.reach("PREPARE")
                    self.send("prepared")
                else:
                    self.learn(command)
            except CancelledError:
                self.send("cancelled", task=task)
            except FailedError as error:
                (message,) = error.args
                fields = {key: message[key] for key in ("reason", "message", "field")}
                self.send("failed", task=task, **fields)

    def learn(self, command: dict[str, Any]) -> None:
        task, epochs = command["task"], command.get("settings", {}).get("epochs") or 5
        first = STAGES.index("EXPORTING") if command["command"] == "edit" else 0
        for number, stage in enumerate(STAGES[first:], first):
            trains = stage == "TRAINING"
            self.send(
                "progress",
                task=task,
                stage=stage,
                fraction=number / len(STAGES),
                epoch=1 if trains else 0,
                epochs=epochs if trains else 0,
                loss=0.5 if trains else 0.0,
            )
            self.reach(stage, command)
        answer = self.reach("LEARNED", command)
        self.send("learned", task=task, version=answer["version"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--nice", type=int, required=True)
    arguments = parser.parse_args()
    Worker(arguments.store, arguments.script).serve()


if __name__ == "__main__":
    main()
