"""How the predictions of a run agree with the labels of its index: a first look; `scaphoid-evaluate` tells the rest."""

from dataclasses import dataclass

from scaphoid.trainer.metrics import Estimate, classification_metrics, study_level
from scaphoid.triton_repo.report.outcome import Outcome

FEW = 50  # normal or abnormal images below which a figure says that the plumbing works, not how good the model is


@dataclass(frozen=True)
class Agreement:
    """Of the images, or of the studies, that the index labels. Metrics by name, as in `classification_metrics`."""

    level: str
    count: int
    abnormal: int
    metrics: dict[str, Estimate]

    @property
    def is_few(self) -> bool:
        return min(self.abnormal, self.count - self.abnormal) < FEW


def agreement(outcome: Outcome) -> list[Agreement]:
    """Image level, then study level; nothing when no predicted image is in the index. Intervals resample patients."""
    known = [
        (prediction.score, outcome.truth[prediction.image])
        for prediction in outcome.predictions
        if prediction.status == "ok" and prediction.image in outcome.truth
    ]
    if not known:
        return []
    scores = [score for score, _ in known]
    labels = [truth.label for _, truth in known]
    patients = [truth.patient for _, truth in known]
    names = [f"{truth.body_part}/{truth.patient}/{truth.study}" for _, truth in known]
    levels = {"images": (labels, scores, patients), "studies": study_level(labels, scores, names, patients)}
    return [
        Agreement(level, len(arrays[0]), int(sum(arrays[0])), classification_metrics(*arrays, outcome.threshold))
        for level, arrays in levels.items()
    ]
