"""The example client for Node, beside the Python client and a real server."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from inflora_client import Client
from tests.benchmarks.data import Example
from tests.certificates import Authority
from tests.edge.faults import Proxy
from tests.node.conftest import PROGRAM, QUICK, TASKS
from tests.running_server import RunningServer, running_server
from tests.service.security_cases import entry

LINE = re.compile(r"(.+): (.+) (\d+\.\d)%(, unlike anything learned)?")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", PROGRAM, *map(str, arguments)],
        capture_output=True, encoding="utf-8", timeout=240, check=False,
    )  # fmt: skip


def written(folder: Path, examples: Iterable[Example]) -> Path:
    """Write images into a sub-folder for each class."""
    for number, (image, label) in enumerate(examples):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:03}.png").write_bytes(image)
    return folder


def large(image: bytes) -> bytes:
    """Return the same picture in a file of 192 KiB: two of them fill a message."""
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").resize((256, 256)).save(file, "BMP")
    return file.getvalue()


def test_it_learns_a_folder_and_predicts_as_the_python_client_does(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    folder = written(tmp_path / "digits", TASKS[0].train)
    (folder / ".hidden").mkdir()
    (folder / TASKS[0].labels[0] / "notes.txt").write_text("no image")
    said = run("--server", server.address, "learn", folder)
    assert said.returncode == 0, said.stderr
    task = next(client.tasks())
    assert task.example_count == len(TASKS[0].train)
    assert [one.label for one in task.classes] == sorted(TASKS[0].labels)
    version = client.version()
    assert task.version == version.name
    assert said.stdout.startswith(f"{version.number}: version with {', '.join(TASKS[0].labels)}")
    progress = said.stderr.splitlines()
    count = len(TASKS[0].train)
    assert progress[0] == f"uploaded {count} of {count} images"
    assert any(
        re.match(r"training, epoch \d of 2, loss \d\.\d+, \d+\.\d% done", x) for x in progress
    )
    assert progress[-1] == "published"

    files = [tmp_path / f"{number}.png" for number in range(6)]
    images = [image for image, _ in (*TASKS[0].test[:2], *TASKS[0].test[-2:], *TASKS[1].test[:2])]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image)
    said = run("--server", server.address, "predict", *files)
    assert (said.returncode, said.stderr) == (0, "")
    expected = client.predict(images).predictions
    lines = said.stdout.splitlines()
    for file, line, answer in zip(files, lines, expected, strict=True):
        found = LINE.fullmatch(line)
        assert found
        assert found[1] == str(file)
        assert found[2] == answer.scores[0].label
        assert float(found[3]) == pytest.approx(100 * answer.scores[0].probability, abs=0.06)
        assert (found[4] is not None) == (answer.novelty > 0.95)
    # More than a call may have.
    said = run("--server", server.address, "predict", *[files[0]] * 600)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [lines[0]] * 600


def test_a_refused_image_is_named_and_nothing_is_learned(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    folder = written(tmp_path / "digits", TASKS[1].train)
    label = sorted(TASKS[1].labels)[1]
    bad = folder / label / "aaa.png"
    bad.write_text("no image")
    before = [task.id for task in client.tasks()]
    said = run("--server", server.address, "learn", folder)
    assert said.returncode == 1
    *_, last = said.stderr.splitlines()
    assert last.startswith(f"{bad}: INVALID_ARGUMENT: ")
    assert re.search(r"\(.*examples\[\d+\]\.image\)$", last)
    assert [task.id for task in client.tasks()] == before

    good = next(path for path in (folder / label).iterdir() if path != bad)
    said = run("--server", server.address, "predict", good, bad)
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith(f"{bad}: INVALID_ARGUMENT: ")
    assert "images[1]" in said.stderr


def test_an_upload_whose_connection_is_cut_goes_on_where_it_was(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    folder = written(tmp_path / "digits", [(large(x), label) for x, label in TASKS[2].train])
    before = len(list(client.tasks()))
    with Proxy(server.address) as proxy:
        # Less than half of it: begun anew each time, it would never arrive.
        proxy.cut_asked_after = 2_000_000
        said = run("--server", proxy.address, "learn", folder)
        assert said.returncode == 0, said.stderr
        assert proxy.cuts >= 2
    tasks = list(client.tasks())
    assert len(tasks) == before + 1
    assert tasks[0].example_count == len(TASKS[2].train)
    assert tasks[0].example_bytes == sum(x.stat().st_size for x in folder.rglob("*.png"))
    counts = [int(x[1]) for x in re.finditer(r"uploaded (\d+) of", said.stderr)]
    assert counts[-1] == len(TASKS[2].train)


def test_a_refused_image_is_named_after_a_cut_too(server: RunningServer, tmp_path: Path) -> None:
    """The server counts from the first one of all, not from where the upload went on."""
    folder = written(tmp_path / "digits", [(large(x), label) for x, label in TASKS[3].train])
    bad = folder / max(TASKS[3].labels) / "zzz.png"
    bad.write_text("no image")
    with Proxy(server.address) as proxy:
        proxy.cut_asked_after = 2_000_000
        said = run("--server", proxy.address, "learn", folder)
        assert proxy.cuts >= 2
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith(f"{bad}: INVALID_ARGUMENT: ")


@pytest.mark.slow
def test_a_server_that_comes_back_is_asked_again(tmp_path: Path) -> None:
    """It is killed while it learns, and another goes on with its store and its task."""
    folder = written(tmp_path / "digits", TASKS[3].train)
    with (
        running_server(tmp_path, (*QUICK, "--epochs", "40"), stop=False) as first,
        Proxy(first.address) as proxy,
    ):
        process = subprocess.Popen(
            ["node", PROGRAM, "--server", proxy.address, "learn", folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        try:
            assert process.stderr is not None
            while "training" not in (line := process.stderr.readline()):
                assert line, "it ended before it learned"
            first.process.kill()
            with running_server(tmp_path, QUICK) as second:
                proxy.lead_to(second.address)
                output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, errors
    assert output.startswith("1: version with ")


@pytest.mark.slow
def test_tls_and_tokens(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "certificates")
    files = authority.issue("server")
    (tokens := tmp_path / "tokens.toml").write_text(entry("learn") + entry("predict"))
    folder = written(tmp_path / "digits", TASKS[0].train)
    for name in ("learn", "predict", "nobody"):
        (tmp_path / name).write_text(f"token-of-{name}\n")
    options = ["--tls-cert", files.cert, "--tls-key", files.key, "--tokens", tokens]
    with running_server(tmp_path / "server", (*QUICK, *map(str, options))) as server:
        # By its name: Node does not like to ask for the certificate of a number.
        address = server.address.replace("127.0.0.1", "localhost")
        secure = ["--server", address, "--ca", authority.ca]
        said = run(*secure, "--token-file", tmp_path / "learn", "learn", folder)
        assert said.returncode == 0, said.stderr
        image = next(folder.rglob("*.png"))
        said = run(*secure, "--token-file", tmp_path / "predict", "predict", image)
        assert said.returncode == 0, said.stderr

        for given, command, why in (
            ("nobody", "predict", "UNAUTHENTICATED: "),
            ("nobody", "learn", "UNAUTHENTICATED: "),
            ("predict", "learn", "PERMISSION_DENIED: "),
        ):
            what = image if command == "predict" else folder
            said = run(*secure, "--token-file", tmp_path / given, command, what)
            assert (said.returncode, said.stdout) == (1, "")
            assert said.stderr.startswith(why)
            assert f"token-of-{given}" not in said.stderr
        said = run("--server", address, "--tls", "predict", image)
        assert said.returncode == 1
        assert "UNAVAILABLE" in said.stderr
        assert "certificate" in said.stderr


def test_a_token_is_not_sent_in_the_clear_to_another_machine(tmp_path: Path) -> None:
    (token := tmp_path / "token").write_text("secret")
    said = run("--server", "192.0.2.1:50051", "--token-file", token, "predict", token)
    assert said.returncode == 1
    assert said.stderr == (
        "the token would be sent in the clear to 192.0.2.1:50051: use TLS (--ca, or --tls)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ([], 2, "usage: inflora-node"),
        (["learn"], 2, "usage: inflora-node"),
        (["--colour", "predict", "x.png"], 2, "Unknown option '--colour'"),
        (["predict", "absent.png"], 1, "no such file or directory, open 'absent.png'"),
        (["learn", "absent"], 1, "no such file or directory, scandir 'absent'"),
        (["learn", "."], 1, "has no sub-folders: make one for each class"),
        (["--cert", "x.crt", "predict", "x.png"], 1, "--cert and --key belong together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_command_is_said(
    arguments: list[str], code: int, why: str, tmp_path: Path
) -> None:
    said = subprocess.run(
        ["node", PROGRAM, *arguments],
        cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip
    assert (said.returncode, said.stdout) == (code, "")
    assert why in said.stderr


def test_the_lock_is_of_hashes_and_no_addresses() -> None:
    lock = (PROGRAM.parents[1] / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    packages = re.findall(r'"node_modules/.+": \{', lock)
    assert lock.count('"integrity": "sha512-') == len(packages) > 10
