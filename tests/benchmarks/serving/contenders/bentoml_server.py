"""BentoML: an image as the body of a request; copies of the model are worker processes."""

from __future__ import annotations

import bentoml
import PIL.Image
from model import WORKERS, Model


@bentoml.service(workers=WORKERS, traffic={"timeout": 60})
class Classify:
    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api
    def classify(self, image: PIL.Image.Image, /) -> dict[str, str]:
        return {"label": self.model.labels(self.model.resize(image))[0]}
