"""Runs of the accuracy benchmark on a tiny backbone: killed, resumed, cached, written down."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inflora_core.backbone import create_backbone
from tests.benchmarks import accuracy, head_study, layouts, runs, teaching
from tests.benchmarks.runs import Bench, Plan
from tests.core import tiny

LABELS = ("red", "green", "blue", "yellow", "cyan", "magenta")


@pytest.fixture(autouse=True)
def _few_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = head_study.RidgeHead.empty.__func__.__defaults__
    monkeypatch.setattr(head_study.RidgeHead.empty.__func__, "__defaults__", (60, *defaults[1:]))
    for function in (head_study.study, head_study.novelty_study):
        monkeypatch.setitem(function.__kwdefaults__, "random_features", 60)
    monkeypatch.setitem(head_study.aligned.__kwdefaults__, "epochs", 2)


def splits() -> layouts.Splits:
    return {
        label: (
            [tiny.png(label, i) for i in range(10)],
            [tiny.png(label, 100 + i) for i in range(4)],
        )
        for label in LABELS
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def bench(weights: Path, tmp_path: Path) -> Bench:
    return open_bench(weights, tmp_path)


def open_bench(weights: Path, out: Path) -> Bench:
    """A bench as a new process has it."""
    backbone = create_backbone(str(weights))
    images = runs.prepare(splits(), backbone, out, lambda _: None)
    return Bench.open(backbone, images, runs.backbone_digest(backbone), out, lambda _: None)


def plan(bench: Bench, row: str = "default", **changes: Any) -> Plan:
    config = accuracy.preset("default").updated(epochs=2, rank=4, batch_size=8, **changes)
    settings = config.model_dump() if row in runs.TRAINED else {}
    return Plan(row, 1, 3, settings, bench.images.digest, "backbone", "code")


def answers(folder: Path) -> list[dict[str, Any]]:
    return runs.read(folder).stages


def assert_equal(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("row", ["default", "sequential"])
def test_a_killed_run_goes_on_where_it_was(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    whole = open_bench(weights, tmp_path / "whole")
    expected = answers(runs.execute(plan(whole, row), whole))
    taught = []
    teach = teaching.teach

    def killed(*arguments: Any) -> Any:
        taught.append(arguments[3])
        if taught == ["task-1", "task-2"]:
            raise KeyboardInterrupt
        return teach(*arguments)

    monkeypatch.setattr(teaching, "teach", killed)
    cut = open_bench(weights, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        runs.execute(plan(cut, row), cut)
    again = open_bench(weights, tmp_path / "cut")
    folder = runs.execute(plan(again, row), again)
    assert taught == ["task-1", "task-2", "task-2", "task-3"]
    assert_equal(answers(folder), expected)
    assert [path.name for path in folder.glob("model-*")] == ["model-03.npz"]


@pytest.mark.parametrize("at", ["write_arrays", "write_report"])
def test_a_kill_between_the_files_of_a_task(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Features without a model, or both without the report: the task never happened."""
    expected = answers(runs.execute(plan(bench), bench))
    write, calls = getattr(runs, at), []

    def killed(*arguments: Any, **more: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments, **more)

    monkeypatch.setattr(runs, at, killed)
    with pytest.raises(KeyboardInterrupt):
        runs.execute(plan(bench, seed=5), bench)
    folder = bench.out / "runs" / plan(bench, seed=5).name
    assert runs.finished_tasks(folder) == 1
    runs.execute(plan(bench, seed=5), bench)
    assert len(answers(folder)) == len(expected) == 3


def test_what_is_done_is_not_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.execute(plan(bench), bench)
    monkeypatch.setattr(teaching, "teach", None)
    runs.execute(plan(bench), bench)
    with pytest.raises(TypeError):
        runs.execute(plan(bench, learning_rate=0.1), bench)


def test_two_processes_do_not_work_on_one_run(bench: Bench) -> None:
    folder = bench.out / "runs" / plan(bench).name
    folder.mkdir(parents=True)
    with runs.locked(folder), pytest.raises(runs.BusyError):
        runs.execute(plan(bench), bench)
    runs.execute(plan(bench), bench)


def test_images_are_decoded_once(
    bench: Bench, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "decode", None)
    again = open_bench(weights, bench.out)
    assert np.array_equal(again.images.train, bench.images.train)
    assert again.images.names == LABELS
    pixels = np.array(Image.open(io.BytesIO(tiny.png("red", 0))))
    assert np.array_equal(bench.images.train[0], bench.backbone.resize(pixels))


def test_a_model_survives_being_written(bench: Bench) -> None:
    folder = runs.execute(plan(bench), bench)
    content = (folder / "model-03.npz").read_bytes()
    assert teaching.dump(teaching.load(content)) == content


def test_features_are_those_of_each_stage(bench: Bench) -> None:
    stages = answers(runs.execute(plan(bench), bench))
    order = runs.class_order(6, 1)
    assert sorted(order) == list(range(6))
    assert order.tolist() != list(range(6))
    frozen = bench.frozen["train"]
    names = [LABELS[i] for i in order]
    for number, stage in enumerate(stages):
        assert set(stage["train_labels"]) == {2 * number, 2 * number + 1}
        assert stage["logits"].shape == (24, 2 * number + 2)
        assert (stage["train_before"] != stage["train_after"]).any()
    first = stages[0]
    mine = [frozen[10 * LABELS.index(names[i]) :][:10] for i in (0, 1)]
    assert np.array_equal(first["train_before"], np.concatenate(mine))
    recorded = runs.read(bench.out / "runs" / plan(bench).name)
    assert np.allclose(recorded.fresh()[-1], stages[-1]["train_after"], atol=1e-6)


def test_the_frozen_backbone_stays_frozen(bench: Bench) -> None:
    stages = answers(runs.execute(plan(bench, "frozen-head"), bench))
    report = json.loads(
        (bench.out / "runs" / plan(bench, "frozen-head").name / "task-03.json").read_text()
    )
    assert set(report["ranks"]) == {0}
    assert np.array_equal(stages[-1]["test"], bench.frozen["test"])


def test_nothing_is_protected_in_the_sequential_row(bench: Bench) -> None:
    for row in ("sequential", "default"):
        runs.execute(plan(bench, row), bench)
    reports = {
        row: json.loads((bench.out / "runs" / plan(bench, row).name / "task-03.json").read_text())
        for row in ("sequential", "default")
    }
    assert max(reports["sequential"]["interference"], 1e-9) > reports["default"]["interference"]


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    path = tmp_path / "benchmarks.md"
    path.write_text("before\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nafter\n")
    return path


def folder_of_images(root: Path, labels: tuple[str, ...], each: int, first: int = 0) -> Path:
    for label in labels:
        (root / label).mkdir(parents=True)
        for i in range(each):
            (root / label / f"{i:02}.png").write_bytes(tiny.png(label, first + i))
    return root


def test_the_whole_command(
    tmp_path: Path, weights: Path, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of_images(tmp_path / "data", LABELS, 12)
    command = ["--data", str(data), "--backbone", str(weights), "--tasks", "3 2"]
    command += ["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    command += ["--docs", str(docs)]
    two = accuracy.main([*command, "--only", "frozen-ncm default", "--seeds", "0,1"])
    assert two["plain_final"] is None
    assert two["orders"] == 2
    assert "| our default | 2 |" in docs.read_text()
    command += ["--seeds", "0"]
    part = accuracy.main([*command, "--no-run"])
    whole = accuracy.main(command)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == whole
    assert whole["default_final"] == part["default_final"]
    assert whole["missing"] == []
    for key in ("default_final", "plain_final", "frozen_ridge_final", "frozen_same_head_final",
                "joint_final", "ece"):  # fmt: skip
        assert 0 <= whole[key] <= 1, key
    for key in ("default_forgetting", "plain_forgetting"):
        assert -1 <= whole[key] <= 1
    # There is no stream of ten tasks here.
    assert whole["novelty_auroc"] is whole["default_final_10x5"] is None
    text = docs.read_text()
    assert text.startswith("before\n<!-- accuracy -->\n")
    assert text.endswith("<!-- /accuracy -->\nafter\n")
    assert "old" not in text
    assert str(tmp_path) not in text, "no path of this machine"
    for title in runs.ROWS.values():
        assert text.count(f"| {title} | 1 |") == 2, title
    assert "**3 x 2**" in text
    assert "**2 x 3**" in text
    assert "Heads on the same features: our default, 3 x 2" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["runs"]) == 2 * 6 + 1


def test_rows_that_are_missing_are_named(tmp_path: Path, weights: Path, docs: Path) -> None:
    data = folder_of_images(tmp_path / "data", LABELS[:4], 6)
    command = ["--data", str(data), "--backbone", str(weights), "--tasks", "2", "--seeds", "0"]
    command += ["--epochs", "1", "--out", str(tmp_path / "out"), "--docs", str(docs)]
    accuracy.main([*command, "--rows", "frozen-ncm"])
    accuracy.main([*command, "--no-run"])
    text = docs.read_text()
    assert "frozen, nearest class mean | 1 |" in text
    assert "Not measured yet: frozen-ridge, order 0 (0 of 2 tasks);" in text
    assert "our default |" not in text


def test_settings_that_are_tried_out_stay_out_of_the_docs(
    tmp_path: Path, weights: Path, docs: Path
) -> None:
    data = folder_of_images(tmp_path / "data", LABELS[:2], 6)
    command = ["--data", str(data), "--backbone", str(weights), "--tasks", "1", "--seeds", "0"]
    command += ["--out", str(tmp_path / "out"), "--docs", str(docs), "--rows", "default"]
    accuracy.main([*command, "--set", "rank=2", "--set", "epochs=1"])
    assert "old" in docs.read_text()
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert (run["settings"]["rank"], run["settings"]["epochs"]) == (2, 1)


@pytest.mark.parametrize("text", ["no marks", "<!-- accuracy -->", "<!-- /accuracy -->"])
def test_a_file_without_the_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "docs.md"
    path.write_text(text)
    with pytest.raises(SystemExit, match="has no <!-- accuracy -->"):
        accuracy.put_between_marks(path, "table")
    assert path.read_text() == text


def test_the_documentation_has_the_marks(tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks.md"
    copy.write_text(accuracy.DOCS.read_text())
    accuracy.put_between_marks(copy, "table")
    assert "<!-- accuracy -->\n\ntable\n\n<!-- /accuracy -->" in copy.read_text()


def test_comments_do_not_change_the_method(tmp_path: Path) -> None:
    path = tmp_path / "code.py"

    def digest(text: str) -> str:
        path.write_text(text)
        return teaching.code_digest(path)

    code = digest('"""Doc."""\ndef f(x):\n    """More."""\n    return x + 1\n')
    assert digest("def f(x):  # why\n\n    return (x + 1)\n") == code
    assert digest("def f(x):\n    return x + 2\n") != code


# -- published experiments ------------------------------------------------------------------------


def write_cifar100(root: Path) -> Path:
    """Two pickles as Python 2 wrote them, and one of names."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"{label}".encode() for label in LABELS[:4]]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
    for split, each, first in (("train", 8, 0), ("test", 3, 50)):
        rows, labels = [], []
        for i in range(each):
            for label, name in enumerate(LABELS[:4]):
                pixels = tiny.pattern(name, first + i, side=32)
                rows.append(pixels.transpose(2, 0, 1).reshape(-1))
                labels.append(label)
        content = {
            b"data": np.array(rows),
            b"fine_labels": labels,
            b"filenames": [b"x"] * len(rows),
        }
        (folder / split).write_bytes(pickle.dumps(content, protocol=2))
    return root


def write_imagenet_r(root: Path, *, split: bool = True) -> Path:
    folder = root / "imagenet-r"
    if split:
        folder_of_images(folder / "train", LABELS[:4], 8)
        folder_of_images(folder / "test", LABELS[:4], 3, 50)
    else:
        folder_of_images(folder, LABELS[:4], 10)
    return root


def write_domainnet(root: Path) -> Path:
    folder = root / "domainnet"
    for number, domain in enumerate(layouts.DOMAINS):
        for split, each in (("train", 2), ("test", 1)):
            lines = []
            # Numbers of classes need not follow the alphabet.
            for label, name in enumerate(LABELS[:4]):
                for i in range(each):
                    path = folder / domain / name / f"{split}_{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tiny.png(name, 10 * number + i + 5 * (split == "test")))
                    lines.append(f"{path.relative_to(folder)} {label}")
            (folder / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


WRITERS = {"cifar100": write_cifar100, "imagenet-r": write_imagenet_r, "domainnet": write_domainnet}
EACH = {"cifar100": (8, 3), "imagenet-r": (8, 3), "domainnet": (12, 6)}


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("inside", [False, True])
def test_published_layouts(tmp_path: Path, name: str, inside: bool) -> None:
    root = WRITERS[name](tmp_path)
    root = next(root.iterdir()) if inside else root
    found = layouts.splits_of(name, str(root), 0)
    order = sorted(LABELS[:4]) if name == "imagenet-r" else list(LABELS[:4])
    assert list(found) == order
    assert {(len(a), len(b)) for a, b in found.values()} == {EACH[name]}
    if name == "cifar100":
        assert np.array_equal(found["blue"][0][3], tiny.pattern("blue", 3, side=32))
    digest = layouts.digest(found)
    assert layouts.digest(layouts.splits_of(name, str(root), 0)) == digest
    found["red"][1].pop()
    assert layouts.digest(found) != digest


def test_imagenet_r_without_a_split_is_cut_80_to_20(tmp_path: Path) -> None:
    root = write_imagenet_r(tmp_path, split=False)
    found, again, other = (layouts.splits_of("imagenet-r", str(root), s) for s in (0, 0, 1))
    assert {(len(a), len(b)) for a, b in found.values()} == {(8, 2)}
    assert found == again != other
    for train, test in found.values():
        assert not set(train) & set(test)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    root = write_cifar100(tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    (root / "cifar-100-python" / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match="print: not loaded"):
        layouts.splits_of("cifar100", str(root), 0)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda: json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_one_command_for_a_published_experiment(
    tmp_path: Path, weights: Path, docs: Path, name: str, printed: Any
) -> None:
    root = WRITERS[name](tmp_path / "data")
    command = [
        "--stream",
        name,
        "--data",
        str(root),
        "--backbone",
        str(weights),
        "--docs",
        str(docs),
    ]
    command += ["--out", str(tmp_path / "out"), "--tasks", "2", "--seeds", "0", "--epochs", "1"]
    accuracy.main(command)
    last = printed()
    assert 0 <= last["plain_final"] <= 1
    assert 0 <= last["default_final"] <= 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = {run["row"]: run["settings"] for run in results["runs"]}
    assert settings["plain"]["preset"] == f"published-{name}"
    assert settings["plain"]["expected_tasks"] == 2
    assert settings["default"]["preset"] == "default"
    assert f"make bench-{name} DATA=data" in (tmp_path / "out" / "table.md").read_text()
    assert "old" in docs.read_text()


def test_published_experiments_as_they_are_run() -> None:
    expected = {
        "cifar100": (10, {"rank": 10, "epochs": 20, "learning_rate": 5e-4, "batch_size": 128,
                          "threshold_first": 0.95, "optimizer": "adam"}),
        "imagenet-r": (10, {"rank": 10, "epochs": 50, "learning_rate": 5e-4, "batch_size": 128,
                            "threshold_first": 0.98, "optimizer": "adam"}),
        "domainnet": (5, {"rank": 30, "epochs": 5, "learning_rate": 5e-3, "batch_size": 128,
                          "threshold_first": 0.95, "optimizer": "sgd",
                          "head_learning_rate": 1e-2, "schedule": "step"}),
    }  # fmt: skip
    for name, (tasks, values) in expected.items():
        options = accuracy.parser().parse_args(["--stream", name, "--data", "somewhere"])
        accuracy.fill_in(options)
        assert options.backbone == "vit_base_patch16_224.augreg_in21k"
        assert options.tasks == [tasks]
        assert options.rows == ["plain", "default"]
        settings = accuracy.settings_of(options, "plain", tasks, 0)
        assert settings["expected_tasks"] == tasks
        assert {key: settings[key] for key in values} == values


def test_a_published_experiment_needs_data() -> None:
    options = accuracy.parser().parse_args(["--stream", "cifar100"])
    with pytest.raises(SystemExit, match="DATA=folder"):
        accuracy.fill_in(options)
