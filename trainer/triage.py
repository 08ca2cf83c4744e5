"""Two-call triage: every radiograph gets the first stage, and only those within an uncertainty band the whole flow.

The band is fitted on the predictions of a validation set and then kept. A flow skips the steps whose outputs nobody
asked for, so the first call costs its stage alone; the second one repeats it, which the cost counts. Needs numpy alone.

    python -m scaphoid.trainer.triage validation/predictions.jsonl --index validation/index.csv --first-cost 0.35
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from numpy.typing import ArrayLike, NDArray

from scaphoid.trainer.data.index import Index, read_index
from scaphoid.trainer.metrics import classification_metrics
from scaphoid.trainer.predictions import Record, join, read_predictions

FIRST = {"msfm": "main_probability", "msfm_fma": "main_probability"}
"""The output of each flow that its first stage gives. KALM's comes out of its last step, after both CNNs: nothing would
be saved."""
FULL = ("probability_with_parts", "probability")  # the score of a whole answer: the first of them that it has
STEPS = 20


class Band(NamedTuple):
    """First-stage probabilities from `low` to `high`, both included, are uncertain; none are when `low` > `high`."""

    low: float
    high: float

    def holds(self, probability: ArrayLike) -> NDArray[np.bool_]:
        probability = np.asarray(probability)
        return (probability >= self.low) & (probability <= self.high)


NOBODY, EVERYBODY = Band(1.0, 0.0), Band(0.0, 1.0)


class Scores(NamedTuple):
    """Per image [N]: label (1 abnormal), probability of the first stage and of the whole flow, patient."""

    labels: NDArray[np.int64]
    first: NDArray[np.float64]
    full: NDArray[np.float64]
    patients: NDArray[np.str_]


@dataclass(frozen=True)
class Point:
    """What a band gives: `share` of the images within it, `cost` relative to a whole answer for every image, AUROC of
    the scores that come out."""

    band: Band
    share: float
    cost: float
    auroc: float


def scores_of(records: Sequence[Record], index: Index) -> Scores:
    """From a journal of whole answers. Raises ValueError when no image is in the index, a score is missing, or the
    flow has no first stage."""
    cases = [case for case in join(records, index)[0] if case.record["status"] == "ok"]
    if not cases:
        raise ValueError(f"none of the predicted images is in the index below {index.root}")
    flow = cases[0].record["flow"]
    if flow not in FIRST:
        raise ValueError(f"{flow} has no first stage of its own to ask: expected one of {', '.join(FIRST)}")
    full = next(name for name in FULL if cases[0].record.get(name) is not None)
    columns = []
    for name in (FIRST[flow], full):
        values = [case.record.get(name) for case in cases]
        if None in values:
            raise ValueError(f"a prediction of {flow} lacks {name}: triage is fitted on whole answers")
        columns.append(np.array(values, np.float64))
    labels = np.array([case.radiograph.label for case in cases], np.int64)
    return Scores(labels, *columns, np.array([case.radiograph.patient for case in cases]))


def cascade(scores: Scores, band: Band) -> NDArray[np.float64]:
    """The score of every image [N]: the whole flow's within the band, the first stage's outside."""
    return np.where(band.holds(scores.first), scores.full, scores.first)


def point(scores: Scores, band: Band, first_cost: float) -> Point:
    """`first_cost` is that of a first call relative to a whole answer; an image within the band pays for both."""
    share = float(band.holds(scores.first).mean())
    metrics = classification_metrics(scores.labels, cascade(scores, band), resamples=0)
    return Point(band, share, first_cost + share if band != EVERYBODY else 1.0, metrics["auroc"].value)


def bands(scores: Scores, boxes: bool = False, steps: int = STEPS) -> list[Band]:
    """Nested bands around the probability at which the first stage tells the two classes apart best (the largest
    sensitivity + specificity), each with another 1 / `steps` of the images, as many on either side: one number to fit,
    for a free choice of both ends follows the validation set's noise. With `boxes` every band reaches up to 1: whatever
    is called abnormal then has a box. From nobody to everybody."""
    order = np.sort(scores.first)
    negatives, positives = (np.sort(scores.first[scores.labels == label]) for label in (0, 1))
    youden = np.searchsorted(negatives, order) / len(negatives) - np.searchsorted(positives, order) / len(positives)
    centre, last = int(np.argmax(youden)), len(order) - 1
    found = [NOBODY]
    for step in range(1, steps):
        half = step * len(order) / (2 * steps)
        low, high = centre - half, centre + half
        shift = max(0.0, -low) - max(0.0, high - last)  # at an end of the scale the other side has the rest
        low, high = (int(np.clip(round(edge + shift), 0, last)) for edge in (low, high))
        found.append(Band(float(order[low]), 1.0 if boxes else float(order[high])))
    return [*dict.fromkeys(found), EVERYBODY]


def curve(scores: Scores, first_cost: float, boxes: bool = False, steps: int = STEPS) -> list[Point]:
    """What each of the nested bands gives that costs less than a whole answer, and everybody. Raises ValueError for a
    cost outside (0, 1], or one class alone."""
    if not 0 < first_cost <= 1:
        raise ValueError(f"first_cost: expected more than 0 and at most 1, got {first_cost}")
    if len(np.unique(scores.labels)) < 2:
        raise ValueError("triage is fitted on normal and abnormal images, and one of them is absent")
    points = [point(scores, band, first_cost) for band in bands(scores, boxes, steps)]
    return [each for each in points if each.cost < 1 or each.band == EVERYBODY]


def fit(
    scores: Scores, first_cost: float, max_loss: float = 0.0, budget: float | None = None, boxes: bool = False
) -> Point:
    """The cheapest band whose AUROC is at most `max_loss` below that of a whole answer for every image; or, with a
    `budget`, the best AUROC at a cost of at most that. Raises ValueError for a budget below the first call's cost."""
    points = sorted(curve(scores, first_cost, boxes), key=lambda each: each.cost)
    if budget is not None:
        affordable = [each for each in points if each.cost <= budget]
        if not affordable:
            raise ValueError(f"budget: nothing costs {budget} or less; the cheapest band costs {points[0].cost:.3f}")
        return max(affordable, key=lambda each: (each.auroc, -each.cost))
    whole = next(each for each in points if each.band == EVERYBODY)
    return next(each for each in points if each.auroc >= whole.auroc - max_loss)


@dataclass(frozen=True)
class Arguments:
    """Fit a triage band on the whole answers of a validation set; prints it as JSON."""

    predictions: tyro.conf.Positional[Path]
    """predictions.jsonl of scaphoid-predict, with the parts where the flow has them."""
    index: Path
    """index.csv of the validation set, or its folder."""
    first_cost: float
    """Of the first stage alone, relative to a whole answer: scaphoid-bench triage measures it."""
    max_loss: float = 0.0
    """AUROC that may be lost."""
    boxes: bool = False
    """Everything above the band gets the whole answer too, for its box."""
    budget: float | None = None
    """In place of --max-loss: the mean cost of an image, relative to a whole answer."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        scores = scores_of(read_predictions(arguments.predictions), read_index(arguments.index))
        found = fit(scores, arguments.first_cost, arguments.max_loss, arguments.budget, arguments.boxes)
    except (ValueError, OSError) as error:
        sys.exit(f"triage: {error}")
    about = {"images": len(scores.labels), "share": found.share, "cost": found.cost, "auroc": found.auroc}
    print(json.dumps({"low": found.band.low, "high": found.band.high, "validation": about}))


if __name__ == "__main__":
    main()
