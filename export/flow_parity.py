"""Holds a flow over an engine against eager fp32: probabilities, boxes, verdicts and scores, over all images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scaphoid.export.runner import run
from scaphoid.export.tolerances import ENOUGH, TOLERANCES, Tolerance
from scaphoid.trainer.contracts import BOX, MARGIN, PROBABILITY, PROBABILITY_WITH_PARTS
from scaphoid.trainer.data.index import Radiograph
from scaphoid.trainer.flows import Flow
from scaphoid.trainer.localization import inside, iou
from scaphoid.trainer.metrics import Estimate, classification_metrics, mean_estimate, paired_differences

Answers = Mapping[str, NDArray]  # a flow's outputs by name, a row for each image
SHOWN = 20  # images beyond the tolerance that a report lists
FINAL = {"": PROBABILITY.name, "_with_parts": PROBABILITY_WITH_PARTS.name}  # what a verdict may be drawn from
SCORES = ("auroc", "kappa")


@dataclass(frozen=True)
class Parity:
    """One engine's answers to all images beside eager's. `map_error`: the largest error of an activation map, relative
    to its largest value. `each_image`: whether single images are judged, or the scores alone. `places`: what the
    images are called, or none where they are counted."""

    flow: Flow
    engine: str
    precision: str
    expected: Answers
    found: Answers
    map_error: float
    radiographs: Sequence[Radiograph] = ()
    threshold: float = 0.5
    each_image: bool = True
    note: str = ""
    places: Sequence[str] = ()
    tolerance: Tolerance = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", TOLERANCES[self.precision])

    def __len__(self) -> int:
        return len(self.expected[PROBABILITY.name])

    def _called(self, number: int) -> str:
        return self.places[number] if self.places else f"image {number}"

    def _difference(self, name: str) -> NDArray:
        """Absolute, [N, elements]; infinite where the engine gave no number."""
        difference = np.abs(self.expected[name].astype(np.float64) - self.found[name]).reshape(len(self), -1)
        return np.nan_to_num(difference, nan=np.inf)

    @cached_property
    def probability(self) -> dict[str, NDArray]:
        return {name: self._difference(name) for name in self.flow.outputs if PROBABILITY.name in name}

    @cached_property
    def pixels(self) -> dict[str, NDArray]:
        return {name: self._difference(name) for name in self.flow.outputs if BOX.name in name}

    @cached_property
    def iou(self) -> dict[str, NDArray]:
        """Of every box with eager's, [N, boxes of an image]."""
        return {
            name: iou(self.expected[name], self.found[name]).reshape(len(self), -1)
            for name in self.flow.outputs
            if BOX.name in name
        }

    @cached_property
    def worst(self) -> tuple[NDArray, NDArray, NDArray]:
        """Of each image: the largest difference of a probability and of a box coordinate, the smallest IoU: [N]."""

        def columns(figures: Mapping[str, NDArray]) -> NDArray:
            return np.concatenate(list(figures.values()), axis=1)

        return columns(self.probability).max(1), columns(self.pixels).max(1), columns(self.iou).min(1)

    @property
    def margin(self) -> NDArray:
        return self.expected[MARGIN.name].reshape(-1)

    @cached_property
    def beyond(self) -> NDArray:
        """Numbers of the images beyond the tolerance."""
        probability, pixels, _ = self.worst
        limits = (self.tolerance.probability, self.tolerance.pixels)
        limits = tuple(math.inf if limit is None else limit for limit in limits)
        return np.flatnonzero((probability > limits[0]) | (pixels > limits[1]))

    @cached_property
    def flips(self) -> NDArray:
        """Numbers of the images whose verdict is another."""
        called = [answers[PROBABILITY.name].reshape(-1) >= self.threshold for answers in (self.expected, self.found)]
        return np.flatnonzero(called[0] != called[1])

    @cached_property
    def scores(self) -> dict[str, tuple[float, float, Estimate]]:
        """AUROC, kappa and localisation (box centre in a lesion): eager's, the engine's, and their difference with an
        interval, patients resampled. Empty where the images have no labels."""
        if not self.radiographs or not all(np.isfinite(self.found[name]).all() for name in self.flow.outputs):
            return {}
        labels, patients = zip(*((each.label, each.patient) for each in self.radiographs), strict=True)
        scores = {}
        for suffix, output in FINAL.items():
            if output in self.flow.outputs:
                both = [answers[output].reshape(-1) for answers in (self.expected, self.found)]
                values = [classification_metrics(labels, each, patients, self.threshold, resamples=0) for each in both]
                differences = paired_differences(labels, *both, patients, self.threshold)
                for name in SCORES:
                    scores[name + suffix] = (*(each[name].value for each in values), differences[name])
        shown = [number for number, each in enumerate(self.radiographs) if each.boxes]
        if shown:
            lesions = [self.radiographs[number].boxes for number in shown]
            hits = []
            for boxes in (answers[BOX.name][shown].reshape(-1, 4) for answers in (self.expected, self.found)):
                hits.append(inside((boxes[:, :2] + boxes[:, 2:]) / 2, lesions).astype(float))
            difference = mean_estimate(hits[1] - hits[0], [patients[number] for number in shown])
            scores["centre_hit"] = (hits[0].mean(), hits[1].mean(), difference)
        return scores

    @property
    def failures(self) -> list[str]:
        """What is beyond the tolerance, a line each; empty when the engine passed."""
        where = f"{self.flow.name}, {self.engine} {self.precision}"
        if broken := int((~np.isfinite(self.worst[0] + self.worst[1])).sum()):
            return [f"{where}: {broken} of {len(self)} images gave no number"]
        found = [*(self._image_failures() if self.each_image else ()), *self._score_failures()]
        return [f"{where}: {line}" for line in found]

    def _image_failures(self) -> list[str]:
        bar, (probability, pixels, _), lines = self.tolerance, self.worst, []
        if len(self.beyond) > max(1, int((1 - bar.share) * len(self) + 1e-9)):
            lines.append(
                f"{len(self.beyond)} of {len(self)} images differ by more than {bar.probability:g} in a probability"
                + (f" or {bar.pixels:g} pixels in a box" if bar.pixels else "")
                + f", at most {1 - bar.share:.1%} may; largest {probability.max():.2g} and {pixels.max():.2g} pixels"
            )
        if bar.explained:
            lines += [
                f"{self._called(number)}: probability differs by {probability[number]:.2g}, a box by "
                f"{pixels[number]:.2g} pixels, though its margin {self.margin[number]:.2g} is above the map error "
                f"{self.map_error:.2g}"
                for number in self.beyond
                if self.margin[number] > self.map_error
            ][:SHOWN]
        for name, values in self.iou.items():
            if values.shape[1] == 1 and (np.median(values) < bar.median_iou or np.quantile(values, 0.05) < bar.low_iou):
                lines.append(
                    f"{name}: IoU with eager's has median {np.median(values):.3f} and 5th percentile "
                    f"{np.quantile(values, 0.05):.3f}, at least {bar.median_iou:g} and {bar.low_iou:g} wanted"
                )
        return lines

    def _score_failures(self) -> list[str]:
        if len(self) < ENOUGH:
            return []
        return [
            f"{name} {after:.4f} instead of {before:.4f}, at most {bar:g} may lie between"
            for score, bar in zip(SCORES, (self.tolerance.auroc, self.tolerance.kappa), strict=True)
            for name, (before, after, difference) in self.scores.items()
            if name.startswith(score) and abs(difference.value) > bar
        ]

    def summary(self) -> dict:
        """Every figure, for a report. No image is called by its file's name, which might be a patient's."""
        probability, pixels, overlap = self.worst
        return {
            "flow": self.flow.name,
            "engine": self.engine,
            "precision": self.precision,
            "note": self.note,
            "images": len(self),
            "map_error": short(self.map_error),
            "probability": {
                name: {"largest": short(each.max()), "mean": short(each.mean())}
                for name, each in self.probability.items()
            },
            "boxes": {
                name: {
                    "largest_pixels": short(self.pixels[name].max()),
                    "within_1_pixel": short((self.pixels[name].max(1) <= 1).mean()),
                    "iou_median": short(np.median(each)),
                    "iou_5th_percentile": short(np.quantile(each, 0.05)),
                }
                for name, each in self.iou.items()
            },
            "beyond": len(self.beyond),
            "images_beyond": [
                {
                    "image": self._called(number),
                    "probability": short(probability[number]),
                    "pixels": short(pixels[number]),
                    "iou": short(overlap[number]),
                    "margin": short(self.margin[number]),
                }
                for number in self.beyond[np.argsort(-probability[self.beyond], kind="stable")][:SHOWN]
            ],
            "verdict_flips": len(self.flips),
            "verdicts_flipped": [
                {
                    "image": self._called(number),
                    "eager": short(self.expected[PROBABILITY.name][number].item()),
                    "engine": short(self.found[PROBABILITY.name][number].item()),
                    "margin": short(self.margin[number]),
                }
                for number in self.flips[:SHOWN]
            ],
            "scores": {
                name: {"eager": short(before), "engine": short(after), **_short(difference)}
                for name, (before, after, difference) in self.scores.items()
            },
            "failures": self.failures,
        }


def answers(flow: Flow, stages: Mapping[str, Callable], encoded: Sequence[bytes]) -> Answers:
    """The outputs of `flow` over `stages` for encoded images, run one by one."""
    rows = [run(flow, stages, [each], flow.outputs) for each in encoded]
    return {name: np.concatenate([row[name].numpy() for row in rows]) for name in flow.outputs}


def short(value: float) -> float | None:
    """Four significant digits, for a report; None for what is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _short(estimate: Estimate) -> dict:
    values = asdict(estimate)
    return {
        "difference": short(values["value"]),
        "low": short(values["low"]),
        "high": short(values["high"]),
        "reason": values["reason"],
    }
