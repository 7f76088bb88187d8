"""From the learner's steps to ``Progress`` for people who wait."""

from __future__ import annotations

import time
from collections.abc import Callable

from inflora_core.model import Progress, Stage

# Cost of a stage in passes over the task's images, one pass forward being 1: how far the bar moves.
_WEIGHTS = {
    Stage.DECODING: 1.0,
    Stage.DESIGNING: 1.0,
    Stage.TRAINING: 3.0,  # for each epoch: forward, and backward at twice its cost
    Stage.EXTENDING: 1.0,
    Stage.MERGING: 0.2,
    Stage.EXPORTING: 0.3,
    Stage.CHECKING: 0.5,
    Stage.PUBLISHING: 0.2,
}

USUAL_EPOCHS = 5
"""Until it is known how many there will be."""


class Tracker:
    """Turns stages and steps into ``Progress``, and measures each stage.

    Args:
        on_progress: Called at every step; may raise ``CancelledError`` to stop the learner.
        on_stage: Called with each stage that begins.

    Attributes:
        epochs: Epochs of training in all; 0 as long as nobody knows.
        seconds: Wall-clock seconds of each stage that has ended, in order.
        losses: Loss of every training step, by epoch.
    """

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        on_stage: Callable[[Stage], None] = lambda stage: None,
    ) -> None:
        self.epochs = 0
        self.seconds: dict[Stage, float] = {}
        self.losses: list[list[float]] = []
        self._on_progress = on_progress
        self._on_stage = on_stage
        self._stage: Stage | None = None
        self._since = 0.0
        self._fraction = 0.0

    def start(self, stage: Stage) -> None:
        """End the stage before, and begin ``stage``."""
        self.finish()
        self._stage, self._since = stage, time.monotonic()
        self._on_stage(stage)
        self.step(0.0)

    def finish(self) -> None:
        """End the running stage."""
        if self._stage is not None:
            self.seconds[self._stage] = time.monotonic() - self._since
            self._stage = None

    def step(self, share: float) -> None:
        """Report that ``share`` of the running stage is done; more than 1 counts as 1."""
        if self._on_progress is None or self._stage is None:
            return
        weights = dict(_WEIGHTS)
        weights[Stage.TRAINING] *= self.epochs or USUAL_EPOCHS
        stages = list(weights)
        done = sum(weights[stage] for stage in stages[: stages.index(self._stage)])
        # Where the last batch is not full, counting batches comes to more than there is.
        done += min(share, 1.0) * weights[self._stage]
        # It must not fall when the number of epochs becomes known.
        self._fraction = max(self._fraction, min(done / sum(weights.values()), 1.0))
        recent = self.losses[-1] if self.losses else []
        self._on_progress(
            Progress(
                stage=self._stage,
                fraction=self._fraction,
                epoch=len(self.losses),
                epochs=self.epochs,
                loss=sum(recent) / len(recent) if recent else 0.0,
            )
        )
