"""The HTML report: one self-contained file that a radiologist can read, print and archive. No scripts, nothing fetched.

Each picture is the plain radiograph as a JPEG with its boxes as SVG above it, so that the boxes can be hidden to see
the bone; chosen, it stands beside the closer look that the second stage took. Pictures share a budget of bytes, the
most suspicious studies first; what is left out is counted, and is in the JSON lines.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from scaphoid.trainer import pictures
from scaphoid.trainer.contracts import PREDICTION_SCHEMA
from scaphoid.trainer.data.index import Radiograph
from scaphoid.trainer.journal import Prediction
from scaphoid.triton_repo.report.agreement import FEW, agreement
from scaphoid.triton_repo.report.outcome import Outcome
from scaphoid.triton_repo.results import Study

MAX_PICTURES = 600
PICTURE_BUDGET_BYTES = 16_000_000  # of JPEG; base64 adds a third
MAX_PICTURE_BYTES = 90_000
MAX_ROWS = 2_000  # of the tables without pictures
PICTURE_SIZES = ((720, 82), (560, 78), (440, 74), (360, 70), (280, 65))  # longest side in pixels, JPEG quality
HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Picture:
    """One radiograph in the report. `data` is a data URI, None when the file could not be read again."""

    number: int
    prediction: Prediction
    name: str
    data: str | None
    unstable: bool
    abnormal: bool
    truth: Radiograph | None


@dataclass(frozen=True)
class Card:
    """One study in the report; `label` is the index's, None without one."""

    number: int
    study: Study
    name: str
    pictures: Sequence[Picture]
    label: str | None


def write_report(path: Path, outcome: Outcome) -> None:
    """Write the report, replacing an earlier one as a whole."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html.j2").render(_content(outcome))
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(html, encoding="utf-8", errors="replace")
    temporary.replace(path)


def _content(outcome: Outcome) -> dict[str, Any]:
    predicted = [prediction for prediction in outcome.predictions if prediction.status == "ok"]
    judged = [study for study in outcome.studies if study.probability is not None]
    cards, plain = _cards(outcome, judged)
    refused = [prediction for prediction in outcome.predictions if prediction.status != "ok"]
    return {
        "outcome": outcome,
        "colours": {
            "box": pictures.BOX_COLOUR,
            "main": pictures.MAIN_BOX_COLOUR,
            "window": pictures.WINDOW_COLOUR,
            "truth": pictures.TRUTH_COLOUR,
        },
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "schema": PREDICTION_SCHEMA,
        "release": _release(),
        "images": len(predicted),
        "studies": len(judged),
        "abnormal_images": sum(prediction.verdict == "abnormal" for prediction in predicted),
        "abnormal_studies": sum(study.verdict == "abnormal" for study in judged),
        "first_only": outcome.first_stage_only,
        "unstable": sum(outcome.is_unstable(prediction) for prediction in predicted),
        "histogram": _histogram([study.probability for study in judged]),
        "max_pictures": MAX_PICTURES,
        "cards": cards,
        "pictured": sum(len(card.pictures) for card in cards),
        "plain": plain[:MAX_ROWS],
        "plain_left_out": max(0, len(plain) - MAX_ROWS),
        "refused": refused[:MAX_ROWS],
        "refused_left_out": max(0, len(refused) - MAX_ROWS),
        "agreement": agreement(outcome),
        "few": FEW,
        "has_windows": any(prediction.windows for prediction in predicted),
        "has_main_box": any(prediction.main_box for prediction in predicted),
        "has_truth": any(item.boxes for item in outcome.truth.values()),
    }


def _cards(outcome: Outcome, studies: Sequence[Study]) -> tuple[list[Card], list[Card]]:
    """Cards with pictures, most suspicious study first, and the studies that find no room, without."""
    by_image = {prediction.image: prediction for prediction in outcome.predictions}
    room = min(MAX_PICTURES, sum(len(study.images) for study in studies))
    allowance = min(MAX_PICTURE_BYTES, PICTURE_BUDGET_BYTES // max(1, room))
    cards, plain, number = [], [], 0
    for position, study in enumerate(studies, start=1):
        fits = not plain and number + len(study.images) <= MAX_PICTURES
        drawn = []
        for image in sorted(study.images, key=lambda image: by_image[image].score, reverse=True) if fits else ():
            number += 1
            drawn.append(_picture(outcome, by_image[image], number, allowance))
        labels = {outcome.truth[image].label for image in study.images if image in outcome.truth}
        label = None if not labels else "abnormal" if max(labels) else "normal"
        (cards if fits else plain).append(Card(position, study, _short(study.study), drawn, label))
    return cards, plain


def _picture(outcome: Outcome, prediction: Prediction, number: int, allowance: int) -> Picture:
    try:
        data = _data_uri(pictures.load_radiograph(prediction.image), allowance)
    except (OSError, ValueError):
        data = None
    return Picture(
        number=number,
        prediction=prediction,
        name=Path(prediction.image).name,
        data=data,
        unstable=outcome.is_unstable(prediction),
        abnormal=prediction.verdict == "abnormal",
        truth=outcome.truth.get(prediction.image),
    )


def _data_uri(radiograph: np.ndarray, allowance: int) -> str:
    """The radiograph [H, W] uint8 as a JPEG data URI, as sharp as `allowance` bytes permit."""
    for side, quality in PICTURE_SIZES:
        buffer = io.BytesIO()
        small, _ = pictures.shrink(radiograph, side)
        Image.fromarray(small).save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= allowance:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _histogram(probabilities: Sequence[float]) -> list[dict[str, float]]:
    """Bars over the probability axis: from, to, count, and the height as a share of the tallest."""
    counts, edges = np.histogram(probabilities, HISTOGRAM_BINS, (0.0, 1.0))
    tallest = max(1, counts.max())
    return [
        {"start": float(edges[i]), "end": float(edges[i + 1]), "count": int(count), "height": float(count / tallest)}
        for i, count in enumerate(counts)
    ]


def _short(study: str) -> str:
    """The last three folders of a study's name: enough to find it, short enough to read."""
    return " / ".join(part for part in study.split("/")[-3:] if part)


def _release() -> str:
    try:
        return version("scaphoid")
    except PackageNotFoundError:
        return "not installed"
