"""What is written of every radiograph, and the file that it is written to: a JSON line each, as it comes; reading back.

The journal (`predictions.jsonl`) only ever grows; when an image stands in it twice, the later line counts. A run that
was killed leaves at most one half-written last line, which is cut off when the journal is opened again. Imports neither
torch nor a server's client: scaphoid-predict and scaphoid-edge write the same lines.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from scaphoid.trainer.contracts import PREDICTION_SCHEMA

JOURNAL = "predictions.jsonl"
STAGES = ("main", "object", "parts", "global", "local")
Key = tuple[str, str, str, bool, tuple[float, ...]]  # image, flow, model version, parts, band of a triage


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a flow says about one radiograph. Boxes are `[x0, y0, x1, y1]`, half-open, in pixels of the original
    radiograph with its EXIF orientation applied; `windows` are `{"box": ..., "score": ...}` in order of choice;
    `stages` holds each stage's probability of abnormal; what was not asked for is None or empty."""

    width: int | None = None
    height: int | None = None
    probability: float | None = None
    probability_with_parts: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    box: list[float] | None = None
    main_box: list[float] | None = None
    windows: list[dict[str, Any]] = field(default_factory=list)
    margin: float | None = None

    @property
    def score(self) -> float | None:
        """The probability that a verdict is drawn from: with the parts when they were classified."""
        return self.probability if self.probability_with_parts is None else self.probability_with_parts


@dataclass(frozen=True, kw_only=True)
class Prediction(Answer):
    """One image's line. `status` is `ok`, `rejected` (the input is at fault: `reason` says how) or `failed` (the server
    was: the next run tries again). `whole` False: a triage's first stage answered alone, as the image lies outside the
    `band` [from, to]; then `probability` is that stage's, and there is no box."""

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
    request_id: str | None = None  # what the server's logs call it
    verdict: str | None = None
    whole: bool | None = None  # None: not answered, or not said
    band: list[float] | None = None  # None: no triage

    @property
    def first_stage_only(self) -> bool:
        return self.whole is False

    def judged(self, threshold: float) -> "Prediction":
        """The same prediction with its verdict at `threshold`."""
        return replace(self, threshold=threshold, verdict=verdict(self.score, threshold))

    def line(self) -> str:
        first = {"schema": PREDICTION_SCHEMA, "image": self.image, "study": self.study, "status": self.status}
        return json.dumps(first | asdict(self), allow_nan=False) + "\n"


def verdict(probability: float | None, threshold: float) -> str | None:
    """`abnormal` when the probability reaches the threshold; None without a probability."""
    return None if probability is None else "abnormal" if probability >= threshold else "normal"


def weights_of(model_version: str) -> str:
    """The hash in a journal's model version, `2@3f2a9c1b`; empty where the server did not tell."""
    return model_version.partition("@")[2]


def answered(outputs: Mapping[str, NDArray]) -> dict[str, Any]:
    """The fields of an `Answer` that a flow's outputs about one image settle. Raises ValueError when a number is not
    finite."""
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise ValueError(f"answered {name} with a value that is not finite")

    def number(name: str) -> float | None:
        return float(outputs[name].item()) if name in outputs else None

    boxes, scores = outputs.get("window_boxes", ()), outputs.get("window_scores", ())
    probabilities = {stage: number(f"{stage}_probability") for stage in STAGES}
    return {
        "probability": number("probability"),
        "probability_with_parts": number("probability_with_parts"),
        "stages": {stage: value for stage, value in probabilities.items() if value is not None},
        "box": outputs["box"].astype(float).tolist() if "box" in outputs else None,
        "main_box": outputs["main_box"].astype(float).tolist() if "main_box" in outputs else None,
        "windows": [
            {"box": box.astype(float).tolist(), "score": float(score)} for box, score in zip(boxes, scores, strict=True)
        ],
        "margin": number("margin"),
    }


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
        self._known: dict[Key, Prediction] = {}
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

    def sync(self) -> None:
        """Wait until what was appended is on disk."""
        os.fsync(self._file.fileno())

    def find(
        self, image: str, sha256: str, flow: str, version: str, parts: bool, band: Sequence[float] | None = None
    ) -> Prediction | None:
        """The finished prediction of these very bytes by this very model and triage, if there is one."""
        known = self._known.get((image, flow, version, parts, tuple(band or ())))
        return known if known and known.status == "ok" and known.sha256 == sha256 else None


def _key(prediction: Prediction) -> Key:
    band = tuple(prediction.band or ())
    return prediction.image, prediction.flow, prediction.model_version, prediction.parts, band


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
