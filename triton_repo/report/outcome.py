"""What one prediction run came to: all that its report and its overlays are drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaphoid.trainer.band import Band
from scaphoid.trainer.data.index import Radiograph
from scaphoid.trainer.journal import Prediction
from scaphoid.triton_repo.results import Study


@dataclass(frozen=True)
class Outcome:
    """`truth` holds the index's rows by image, for those images that an index knows. A box whose margin is below
    `unstable_margin` is marked unstable. `phantoms`: the generator's version when the weights were trained on drawn
    radiographs, else empty. `accepted`: a line when the artefacts failed the gate of their export, else empty. `band`:
    that of a triage, None without one."""

    flow: str
    model_version: str
    phantoms: str
    url: str
    parts: bool
    threshold: float
    unstable_margin: float
    predictions: Sequence[Prediction]
    studies: Sequence[Study]
    truth: Mapping[str, Radiograph]
    accepted: str = ""
    band: Band | None = None

    @property
    def first_stage_only(self) -> list[Prediction]:
        return [prediction for prediction in self.predictions if prediction.first_stage_only]

    def is_unstable(self, prediction: Prediction) -> bool:
        return prediction.margin is not None and prediction.margin < self.unstable_margin
