"""Training that is interrupted after any epoch ends with the bits of one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inflora_core import checkpoint
from inflora_core.backbone import Backbone, build_backbone, create_backbone, state_of
from inflora_core.checkpoint import Checkpoint
from inflora_core.config import LearnConfig
from inflora_core.errors import CancelledError
from inflora_core.learner import learn_task
from inflora_core.model import ContinualModel, Learned, Progress, Stage
from inflora_core.progress import Tracker
from inflora_core.spool import CHECKPOINT
from inflora_core.store import initial_layer
from tests.core import tiny
from tests.core.test_store import assert_same

CONFIG = LearnConfig(rank=2, batch_size=8, learning_rate=0.01, held_out_share=0.25)
EPOCHS = 6


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    made = create_backbone(str(tiny.write_backbone(tmp_path_factory.mktemp("backbone"))))
    return build_backbone(made.config, state_of(made))


@pytest.fixture(scope="module")
def blank(backbone: Backbone) -> ContinualModel:
    weights = state_of(backbone)
    layers = {name: initial_layer(weights[f"{name}.qkv.weight"]) for name in backbone.config.layers}
    return ContinualModel.untaught(layers, backbone.config.embedding_size)


class Teaching:
    """One task, taught as often as a test wants; counts the steps of training."""

    def __init__(self, before: ContinualModel, backbone: Backbone, folder: Path) -> None:
        self.before, self.backbone, self.folder = before, backbone, folder
        self.steps = 0

    def learn(self, until: int | None = None, **changes: Any) -> Learned:
        """Learn; give up at the first step after epoch ``until``."""
        self.steps = 0

        def on_progress(progress: Progress) -> None:
            if progress.stage is Stage.TRAINING:
                self.steps += 1
                if until is not None and progress.epoch > until:
                    raise CancelledError("the power is gone")

        return learn_task(
            self.before,
            self.backbone,
            tiny.images(["red", "green"], 40),
            "task",
            CONFIG.updated(**changes),
            Tracker(on_progress),
            checkpoint=Checkpoint(self.folder),
        )


@pytest.fixture
def teaching(blank: ContinualModel, backbone: Backbone, tmp_path: Path) -> Teaching:
    return Teaching(blank, backbone, tmp_path)


def assert_same_learned(left: Learned, right: Learned) -> None:
    assert_same(left.model, right.model)
    for name, factors in left.factors.items():
        assert factors.expansion.tobytes() == right.factors[name].expansion.tobytes()
        assert factors.reduction.tobytes() == right.factors[name].reduction.tobytes()
    assert left.report.epoch_losses == right.report.epoch_losses
    assert left.report.kept_epoch == right.report.kept_epoch


@pytest.mark.parametrize("changes", [{"epochs": EPOCHS}, {}, {"optimizer": "sgd", "epochs": 3}])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    teaching: Teaching, changes: dict[str, Any]
) -> None:
    """With a number of epochs, and with an early stop; interrupted again and again."""
    whole = teaching.learn(**changes)
    steps, epochs = teaching.steps, len(whole.report.epoch_losses)
    assert epochs > 2
    (teaching.folder / CHECKPOINT).unlink()
    for until in range(1, epochs):
        with pytest.raises(CancelledError):
            teaching.learn(until, **changes)
        assert (teaching.folder / CHECKPOINT).exists()
    resumed = teaching.learn(**changes)
    assert_same_learned(resumed, whole)
    assert teaching.steps < steps / 2, "what was trained is not trained again"
    again = teaching.learn(**changes)
    assert_same_learned(again, whole)
    assert teaching.steps == 1, "only the news that training begins"


def test_a_checkpoint_of_another_training_is_not_taken_up(teaching: Teaching) -> None:
    expected = teaching.learn(epochs=3, seed=1)
    with pytest.raises(CancelledError):
        teaching.learn(2, epochs=3)
    assert_same_learned(teaching.learn(epochs=3, seed=1), expected)


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "pickle"])
def test_a_damaged_checkpoint_is_not_taken_up(
    teaching: Teaching, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = teaching.learn(epochs=3)
    path = teaching.folder / CHECKPOINT
    path.unlink()
    with pytest.raises(CancelledError):
        teaching.learn(1, epochs=3)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    torch.save({"a": Path()}, teaching.folder / "other")
    path.write_bytes(
        {
            "flip": bytes(content),
            "truncate": bytes(content[:-9]),
            "empty": b"",
            "pickle": (teaching.folder / "other").read_bytes(),
        }[harm]
    )
    assert_same_learned(teaching.learn(epochs=3), expected)
    assert "training begins anew" in caplog.text


def test_a_disk_that_takes_no_checkpoint_does_not_end_training(
    teaching: Teaching, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(name: str) -> None:
        raise OSError(28, name)

    monkeypatch.setattr(checkpoint.failpoints, "reach", full)
    learned = teaching.learn(epochs=2)
    assert len(learned.report.epoch_losses) == 2
    assert "no checkpoint could be written" in caplog.text
    assert not (teaching.folder / CHECKPOINT).exists()
