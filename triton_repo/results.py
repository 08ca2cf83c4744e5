"""What a prediction run writes beside the journal (trainer/journal.py): a line for each study, and a CSV."""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from scaphoid.trainer.journal import STAGES, Prediction, verdict

STUDY_SCHEMA = "scaphoid.study/1"


@dataclass(frozen=True)
class Study:
    """One study's line: the mean probability over its predicted images and the verdict on that mean.
    `first_stage_only` are those among them that a triage's first stage answered alone."""

    study: str
    flow: str
    model_version: str
    probability: float | None
    verdict: str | None
    threshold: float
    images: list[str]
    not_predicted: list[str]
    first_stage_only: list[str]

    def line(self) -> str:
        return json.dumps({"schema": STUDY_SCHEMA, **asdict(self)}, allow_nan=False) + "\n"


def studies_of(predictions: Iterable[Prediction], threshold: float) -> list[Study]:
    """The studies of `predictions`, most suspicious first, those without a predicted image last.

    Two copies of one radiograph count once within a study; a copy in another study counts there too.
    """
    predictions = list(predictions)
    by_image = {prediction.image: prediction for prediction in predictions}
    members: dict[str, dict[str, Prediction]] = {}
    missing: dict[str, list[str]] = {}
    for prediction in predictions:
        found = members.setdefault(prediction.study, {})
        original = by_image.get(prediction.duplicate_of or "", prediction)
        if original.status == "ok":
            found[original.image] = original
        else:
            missing.setdefault(prediction.study, []).append(prediction.image)
    studies = []
    for name, found in members.items():
        scores = [prediction.score for prediction in found.values() if prediction.score is not None]
        mean = sum(scores) / len(scores) if scores else None
        any_member = next(iter(found.values()), predictions[0])
        studies.append(
            Study(
                study=name,
                flow=any_member.flow,
                model_version=any_member.model_version,
                probability=mean,
                verdict=verdict(mean, threshold),
                threshold=threshold,
                images=list(found),
                not_predicted=missing.get(name, []),
                first_stage_only=[image for image, prediction in found.items() if prediction.first_stage_only],
            )
        )
    return sorted(studies, key=lambda study: -1.0 if study.probability is None else study.probability, reverse=True)


def write_studies(path: Path, studies: Iterable[Study]) -> None:
    """`studies.jsonl`, replaced as a whole."""
    _replace(path, "".join(study.line() for study in studies))


def write_csv(path: Path, predictions: Iterable[Prediction]) -> None:
    """One row per image for a spreadsheet, boxes in pixels; the windows are in the JSON lines only."""
    corners = ("x0_px", "y0_px", "x1_px", "y1_px")
    plain = ("image", "study", "status", "reason", "verdict", "probability", "probability_with_parts", "threshold")
    columns = [
        *plain,
        "whole",  # False: a triage's first stage answered alone, so there is no box
        *(f"{stage}_probability" for stage in STAGES),
        *(f"{box}_{corner}" for box in ("box", "main_box") for corner in corners),
        *("margin", "width", "height", "flow", "model_version", "sha256", "duplicate_of"),
    ]
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for prediction in predictions:
            row = asdict(prediction)
            row.update({f"{stage}_probability": value for stage, value in prediction.stages.items()})
            for name in ("box", "main_box"):
                row.update(zip([f"{name}_{corner}" for corner in corners], row[name] or (), strict=False))
            writer.writerow(row)
    temporary.replace(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
