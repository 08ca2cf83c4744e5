"""Classification metrics with bootstrap intervals, on plain arrays: used by `scaphoid-evaluate` and while training.

An interval resamples patients, not images: views of one patient are not independent. A resample is a row of image
weights (how often each image's patient was drawn), the first row being all ones, so that every metric is written once,
over rows, and its first value is the estimate itself. Labels are 1 = abnormal, 0 = normal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 2_000_000  # weights held at once, 16 MB


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its bootstrap 95 % interval. What is undefined is NaN, and `reason` says why."""

    value: float
    low: float = np.nan
    high: float = np.nan
    reason: str = ""


class Studies(NamedTuple):
    """One entry per study: label (1 if any image is abnormal), mean probability of its images, and its patient."""

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    patients: NDArray[np.str_]


def classification_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: Sequence[object] | None = None,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Accuracy, F1, AUROC, Cohen's kappa, sensitivity, specificity and JPE (MSFM eq. 12, 0 is best).

    labels [N] in {0, 1}; probabilities [N] of abnormal; patients [N] (default: every image its own). An image is called
    abnormal when its probability reaches `threshold`. `resamples=0` leaves the intervals out. One class only, or no
    image at all, gives NaN with a reason. Raises ValueError on lengths that differ, other labels, or a probability
    outside [0, 1].
    """
    labels, probabilities = _checked(labels, probabilities)
    values = _resampled(labels, probabilities, patients, threshold, resamples, seed)
    return {name: _estimate(rows, _why_undefined(name, labels)) for name, rows in values.items()}


def paired_differences(
    labels: ArrayLike,
    probabilities: ArrayLike,
    others: ArrayLike,
    patients: Sequence[object] | None = None,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each metric of `others` [N] minus that of `probabilities` [N], both of the same images: a resample of patients is
    drawn once and used for both, so that what they share cancels. Arguments and errors are `classification_metrics`'.
    """
    labels, probabilities = _checked(labels, probabilities)
    _, others = _checked(labels, others)
    before, after = (_resampled(labels, each, patients, threshold, resamples, seed) for each in (probabilities, others))
    return {name: _estimate(after[name] - before[name], _why_undefined(name, labels)) for name in before}


def mean_estimate(
    values: ArrayLike, patients: Sequence[object] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of values [N] (hits of a localisation metric, for one), patients resampled."""
    values = np.asarray(values, np.float64)
    weights = _patient_weights(_per_image(patients, len(values)), resamples, seed)
    with np.errstate(invalid="ignore"):
        rows = np.concatenate([chunk @ values / chunk.sum(axis=1) for chunk in weights])
    return _estimate(rows, "no images")


def median_estimate(
    values: ArrayLike, patients: Sequence[object] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Median of values [N], patients resampled."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return Estimate(np.nan, reason="no images")
    order = np.argsort(values, kind="stable")
    rows = []
    for chunk in _patient_weights(_per_image(patients, len(values)), resamples, seed):
        reached = np.cumsum(chunk[:, order], axis=1)
        half = reached[:, -1:] / 2
        lower, upper = (reached >= half).argmax(axis=1), (reached > half).argmax(axis=1)
        rows.append((values[order][lower] + values[order][upper]) / 2)
    return _estimate(np.concatenate(rows), "")


def study_level(
    labels: ArrayLike, probabilities: ArrayLike, studies: Sequence[object], patients: Sequence[object]
) -> Studies:
    """Images [N] to studies: mean probability; a study is abnormal if any of its images is. `studies` [N] are ids."""
    labels, probabilities = _checked(labels, probabilities)
    _, first, member = np.unique(_per_image(studies, len(labels)), return_index=True, return_inverse=True)
    means = np.bincount(member, probabilities) / np.bincount(member)
    abnormal = np.bincount(member, labels) > 0
    return Studies(abnormal.astype(np.int64), means, _per_image(patients, len(labels))[first])


def _checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray, NDArray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 1:
        raise ValueError(f"labels and probabilities must both be [N], got {labels.shape} and {probabilities.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 (normal) or 1 (abnormal), got {np.unique(labels)[:5].tolist()}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        wrong = probabilities[~((probabilities >= 0) & (probabilities <= 1))]
        raise ValueError(f"probabilities must lie in [0, 1], got {wrong[0]}; pass softmax(logits)[:, 1], not logits")
    return labels.astype(np.int64), probabilities


def _per_image(ids: Sequence[object] | None, images: int) -> NDArray:
    names: NDArray = np.arange(images) if ids is None else np.asarray([str(one) for one in ids], dtype=np.str_)
    if len(names) != images:
        raise ValueError(f"one patient (or study) per image is needed: {images} images, {len(names)} given")
    return names


def _resampled(
    labels: NDArray,
    probabilities: NDArray,
    patients: Sequence[object] | None,
    threshold: float,
    resamples: int,
    seed: int,
) -> dict[str, NDArray]:
    """Every metric on all images and on every resample: [1 + resamples]."""
    weights = _patient_weights(_per_image(patients, len(labels)), resamples, seed)
    chunks = [_statistics(labels, probabilities, threshold, rows) for rows in weights]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _patient_weights(patients: NDArray, resamples: int, seed: int) -> Iterator[NDArray]:
    """Chunks [r, N] of image weights: a row of ones, then `resamples` rows (none when there is only one patient)."""
    names, member = np.unique(patients, return_inverse=True)
    yield np.ones((1, len(patients)))
    if len(names) < 2:
        return
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(patients))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(len(names), size=(rows, len(names))) + np.arange(rows)[:, None] * len(names)
        counts = np.bincount(drawn.ravel(), minlength=rows * len(names)).reshape(rows, len(names))
        yield counts[:, member].astype(np.float64)


def _statistics(labels: NDArray, probabilities: NDArray, threshold: float, weights: NDArray) -> dict[str, NDArray]:
    """Every metric for every row of weights [R, N]: each [R], NaN where it is undefined."""
    called = probabilities >= threshold
    true_positive, false_positive = weights @ (called & (labels == 1)), weights @ (called & (labels == 0))
    false_negative, true_negative = weights @ (~called & (labels == 1)), weights @ (~called & (labels == 0))
    positive, negative = true_positive + false_negative, true_negative + false_positive
    images = positive + negative
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy = (true_positive + true_negative) / images
        by_chance = (
            positive * (true_positive + false_positive) + negative * (true_negative + false_negative)
        ) / images**2
        f1 = 2 * true_positive / (2 * true_positive + false_positive + false_negative)
        f1_normal = 2 * true_negative / (2 * true_negative + false_positive + false_negative)
        return {
            "accuracy": accuracy,
            "f1": f1,
            "auroc": _auroc(labels, probabilities, weights),
            "kappa": (accuracy - by_chance) / (1 - by_chance),
            "sensitivity": true_positive / positive,
            "specificity": true_negative / negative,
            "jpe": ((1 - f1) ** 2 + (1 - f1_normal) ** 2) / 2,
        }


def _auroc(labels: NDArray, probabilities: NDArray, weights: NDArray) -> NDArray:
    """Chance that an abnormal image scores above a normal one, ties counting half: one sort for all rows of weights."""
    if not len(labels):
        return np.full(len(weights), np.nan)
    order = np.argsort(probabilities, kind="stable")
    ordered = probabilities[order]
    ties = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    positive = np.add.reduceat(weights[:, order] * labels[order], ties, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - labels[order]), ties, axis=1)
    beaten = np.cumsum(negative, axis=1) - negative / 2
    return (positive * beaten).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _estimate(rows: NDArray, why_undefined: str) -> Estimate:
    """The first row is the value, the others the resamples; resamples in which the metric is undefined are left out."""
    value, resampled = float(rows[0]), rows[1:][~np.isnan(rows[1:])]
    if np.isnan(value):
        return Estimate(value, reason=why_undefined)
    if not len(resampled):
        return Estimate(value, reason="no interval: one patient only, or no resample asked for")
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def _why_undefined(name: str, labels: NDArray) -> str:
    if not len(labels):
        return "no images"
    absent = "abnormal" if not labels.any() else "normal" if labels.all() else None
    return f"{name} is undefined: no {absent} images" if absent else f"{name} is undefined for these predictions"
