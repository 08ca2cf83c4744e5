"""What a prediction run writes: a JSON line per image as it comes, a line per study and a CSV at the end; reading back.

The journal (`predictions.jsonl`) only ever grows; when an image stands in it twice, the later line counts. A run that
was killed leaves at most one half-written last line, which is cut off when the journal is opened again.
"""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from scaphoid.trainer.contracts import PREDICTION_SCHEMA

STUDY_SCHEMA = "scaphoid.study/1"
STAGES = ("main", "object", "parts", "global", "local")


@dataclass(frozen=True)
class Prediction:
    """One image's line. Boxes are `[x0, y0, x1, y1]`, half-open, in pixels of the original radiograph with its EXIF
    orientation applied; `windows` are `{"box": ..., "score": ...}` in order of choice; `stages` holds each stage's
    probability of abnormal. `status` is `ok`, `rejected` (the input is at fault: `reason` says how) or `failed` (the
    server was: the next run tries again)."""

    image: str
    study: str
    flow: str
    model_version: str
    parts: bool
    status: str
    threshold: float
    reason: str | None = None
    duplicate_of: str | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    probability: float | None = None
    probability_with_parts: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    box: list[float] | None = None
    main_box: list[float] | None = None
    windows: list[dict[str, Any]] = field(default_factory=list)
    margin: float | None = None
    verdict: str | None = None

    @property
    def score(self) -> float | None:
        """The probability that the verdict is drawn from: with the parts when they were classified."""
        return self.probability if self.probability_with_parts is None else self.probability_with_parts

    def judged(self, threshold: float) -> "Prediction":
        """The same prediction with its verdict at `threshold`."""
        return replace(self, threshold=threshold, verdict=verdict(self.score, threshold))

    def line(self) -> str:
        return json.dumps({"schema": PREDICTION_SCHEMA, **asdict(self)}, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Study:
    """One study's line: the mean probability over its predicted images and the verdict on that mean."""

    study: str
    flow: str
    model_version: str
    probability: float | None
    verdict: str | None
    threshold: float
    images: list[str]
    not_predicted: list[str]

    def line(self) -> str:
        return json.dumps({"schema": STUDY_SCHEMA, **asdict(self)}, allow_nan=False) + "\n"


def verdict(probability: float | None, threshold: float) -> str | None:
    """`abnormal` when the probability reaches the threshold; None without a probability."""
    return None if probability is None else "abnormal" if probability >= threshold else "normal"


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
            )
        )
    return sorted(studies, key=lambda study: -1.0 if study.probability is None else study.probability, reverse=True)


def read_predictions(path: Path) -> dict[str, Prediction]:
    """The journal's predictions by image, the latest line of each. A half-written last line is left out.

    Raises ValueError when a line is not a prediction of this schema version, naming the line.
    """
    return {prediction.image: prediction for prediction in _read_lines(path)[0]}


class Journal:
    """The growing `predictions.jsonl`; use as a context manager. What it held when opened answers `find`, unless
    `resume` is off: then every image is predicted, and its line written, anew.

    Raises ValueError when the file holds something else, OSError when it cannot be written.
    """

    def __init__(self, path: Path, resume: bool = True) -> None:
        self._known: dict[tuple[str, str, str, bool], Prediction] = {}
        if path.exists():
            predictions, complete_bytes = _read_lines(path)
            if complete_bytes < path.stat().st_size:
                os.truncate(path, complete_bytes)
            if resume:
                self._known = {_key(prediction): prediction for prediction in predictions}
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, prediction: Prediction) -> None:
        """Write one line, whole, at once; a line that the journal already holds is not repeated."""
        if self._known.get(_key(prediction)) == prediction:
            return
        self._known[_key(prediction)] = prediction
        self._file.write(prediction.line())
        self._file.flush()

    def find(self, image: str, sha256: str, flow: str, version: str, parts: bool) -> Prediction | None:
        """The finished prediction of these very bytes by this very model, if there is one."""
        known = self._known.get((image, flow, version, parts))
        return known if known and known.status == "ok" and known.sha256 == sha256 else None


def write_studies(path: Path, studies: Iterable[Study]) -> None:
    """`studies.jsonl`, replaced as a whole."""
    _replace(path, "".join(study.line() for study in studies))


def write_csv(path: Path, predictions: Iterable[Prediction]) -> None:
    """One row per image for a spreadsheet, boxes in pixels; the windows are in the JSON lines only."""
    corners = ("x0_px", "y0_px", "x1_px", "y1_px")
    plain = ("image", "study", "status", "reason", "verdict", "probability", "probability_with_parts", "threshold")
    columns = [
        *plain,
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


def _key(prediction: Prediction) -> tuple[str, str, str, bool]:
    return prediction.image, prediction.flow, prediction.model_version, prediction.parts


def _read_lines(path: Path) -> tuple[list[Prediction], int]:
    """The predictions in file order and how many bytes the complete lines take."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    predictions = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            record = json.loads(line)
            if (found := record.pop("schema", None)) != PREDICTION_SCHEMA:
                raise ValueError(f"its schema is {found!r}, expected {PREDICTION_SCHEMA!r}")
            predictions.append(Prediction(**record))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a prediction ({error}): choose another --out, or move the file away"
            ) from error
    return predictions, len(complete)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
