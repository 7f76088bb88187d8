"""Which images ``inflora predict`` asks about, several a call, and what became of each."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from inflora_client import InvalidArgumentError, PredictResult
from inflora_client.cli.render import FileAnswer
from inflora_client.cli.session import EXIT_REFUSED, EXIT_USAGE, fail, note, of_file
from inflora_client.cli.sources.common import SUFFIXES, is_image

STDIN = Path("-")

_CALL_IMAGES = 32
_CALL_BYTES = 8 << 20
"""Most of one call, below what a server takes by default, so that answers come soon."""

_IMAGE_FIELD = re.compile(r"images\[(\d+)\]")

Found = Path | OSError
"""A file that is meant, or why what was named means none."""

Contents = Sequence[bytes]
Ask = Callable[[Contents], PredictResult]


@dataclass(slots=True)
class Problems:
    """Images that were not answered, and folders without any.

    Attributes:
        keep_going: Whether the others are asked about all the same.
        count: How many there were.
    """

    keep_going: bool
    count: int = 0

    def met(self, message: str, code: int) -> None:
        """Note an image; end the command with the code unless it is to go on."""
        if not self.keep_going:
            fail(f"{message}; leave it out, or go on without it with --keep-going", code)
        note(f"inflora: {message}")
        self.count += 1

    def end(self) -> None:
        """End the command if there were any."""
        if self.count:
            fail(f"{self.count} images or folders were not answered: see above", EXIT_REFUSED)


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was read."""

    file: Path
    content: bytes


def files_of(paths: Iterable[Path], names: bool) -> Iterator[Found]:
    """Yield the files that are meant; folders are looked through for images.

    Args:
        paths: Files, folders, and ``-`` for what comes over stdin.
        names: Whether names come over stdin, one a line, and not an image.
    """
    paths = list(paths)
    if paths.count(STDIN) > 1:
        fail("'-' is given more than once, but there is one stdin: give it once", EXIT_USAGE)
    if names and STDIN not in paths:
        fail("--list is for names that come over stdin: give '-', too", EXIT_USAGE)
    for path in paths:
        if path == STDIN and names:
            for line in typer.get_binary_stream("stdin"):
                if name := os.fsdecode(line.rstrip(b"\r\n")):
                    yield from _files_in(Path(name))
        else:
            yield from _files_in(path)


def _files_in(path: Path) -> Iterator[Found]:
    if not path.is_dir():
        yield path
        return
    found = False
    unread: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=unread.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if is_image(name) and not name.startswith("."):
                found = True
                yield Path(folder, name)
    yield from unread
    if not found and not unread:
        yield FileNotFoundError(errno.ENOENT, f"holds no {SUFFIXES} files", str(path))


def answers(files: Iterable[Found], ask: Ask, problems: Problems) -> Iterator[list[FileAnswer]]:
    """Yield answers in the order of the files, a call's at a time."""
    for images in _calls(files, problems):
        yield from _answers(images, ask, problems)


def _calls(files: Iterable[Found], problems: Problems) -> Iterator[list[Image]]:
    images: list[Image] = []
    size = 0
    for file in files:
        try:
            if isinstance(file, OSError):
                raise file
            content = _read(file)
        except OSError as error:
            if not problems.keep_going:
                yield images  # what came before is answered
            problems.met(of_file(error), EXIT_USAGE)
            continue
        if images and (len(images) == _CALL_IMAGES or size + len(content) > _CALL_BYTES):
            yield images
            images, size = [], 0
        images.append(Image(file, content))
        size += len(content)
    yield images


def _read(file: Path) -> bytes:
    return typer.get_binary_stream("stdin").read() if file == STDIN else file.read_bytes()


def _answers(images: list[Image], ask: Ask, problems: Problems) -> Iterator[list[FileAnswer]]:
    """Ask about images, and again without one that is refused."""
    while images:
        try:
            result = ask([image.content for image in images])
        except InvalidArgumentError as error:
            number, why = _refused(error, len(images))
            if not problems.keep_going:
                yield from _answers(images[:number], ask, problems)
            problems.met(f"{images[number].file}: {why}", EXIT_REFUSED)
            images = images[:number] + images[number + 1 :]
        else:
            yield [
                FileAnswer(image.file, result.version, each.scores, each.novelty)
                for image, each in zip(images, result.predictions, strict=True)
            ]
            return


def _refused(error: InvalidArgumentError, images: int) -> tuple[int, str]:
    """Return which image of a call was refused, and why.

    Raises:
        InvalidArgumentError: It is none of them, but the version, say.
    """
    for violation in error.field_violations:
        match = _IMAGE_FIELD.fullmatch(violation.field)
        if match and int(match[1]) < images:
            known = violation.description in error.message
            why = error.message if known else f"{error.message}: {violation.description}"
            return int(match[1]), why
    raise error
