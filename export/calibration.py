"""What quantisation is calibrated on and held to: radiographs of the training split, and figures of a flow against
eager fp32."""

import importlib.util
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from scaphoid.export.runner import StageFunction
from scaphoid.export.tolerances import TOLERANCES
from scaphoid.trainer.contracts import BOX, IMAGE, ORIGINAL_SIZE, PROBABILITY, PROBABILITY_WITH_PARTS, Stage
from scaphoid.trainer.data.index import Index, read_index, split_by_patient
from scaphoid.trainer.data.pipeline import load_images
from scaphoid.trainer.flows import Flow
from scaphoid.trainer.localization import iou
from scaphoid.trainer.metrics import classification_metrics

SPLIT = "train"
OF_EACH_CLASS = 32  # the least that the training split must hold
CALIBRATION, VALIDATION = 128, 256  # images taken, or as many as there are
BATCH = 8
SPARE = 0.8  # share of the tolerance that the search may use


class CalibrationError(ValueError):
    """A data set, or a machine, that int8 cannot be calibrated with. One line: what was expected, what to do."""


@dataclass(frozen=True)
class Radiographs:
    """Decoded images uint8 [N, 1, size, size], original sizes int32 [N, 2] and labels [N]."""

    images: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    labels: NDArray[np.int64]


def choose_images(index: Index, seed: int = 0) -> tuple[Index, Index]:
    """Up to CALIBRATION images to measure ranges on and VALIDATION images of other patients to judge the result by:
    from the training split alone, as many normal as abnormal ones, the same for the same seed. Raises
    CalibrationError."""
    train = index.where(split=SPLIT)
    where, count = index.root, Counter(radiograph.label for radiograph in train.radiographs)
    if not train.radiographs:
        splits = ", ".join(sorted({radiograph.split for radiograph in index.radiographs}))
        raise CalibrationError(
            f"{where}: no radiograph of the split {SPLIT!r}, only of {splits}: int8 is calibrated on training images"
        )
    if len(count) == 1:
        name = "abnormal" if count[1] else "normal"
        raise CalibrationError(f"{where}: all {len(train)} training radiographs are {name}: calibrate on both classes")
    if min(count.values()) < OF_EACH_CLASS:
        raise CalibrationError(
            f"{where}: {count[0]} normal and {count[1]} abnormal training radiographs, expected at least "
            f"{OF_EACH_CLASS} of each: calibrate on a larger data set"
        )
    halves = split_by_patient(train, 0.5, seed)
    if any({radiograph.label for radiograph in half.radiographs} != {0, 1} for half in halves):
        raise CalibrationError(
            f"{where}: the images of a class are of too few patients to measure on some and judge by others: "
            "calibrate on a data set with several patients of each class"
        )
    return tuple(balanced(half, images, seed) for half, images in zip(halves, (CALIBRATION, VALIDATION), strict=True))


def balanced(index: Index, images: int, seed: int) -> Index:
    """Up to `images` of them, half of each class, drawn by `seed` whatever their order in the index."""
    classes = [sorted((r for r in index.radiographs if r.label == label), key=lambda r: r.image) for label in (0, 1)]
    each = min(images // 2, *map(len, classes))
    return replace(index, radiographs=tuple(r for own in classes for r in random.Random(seed).sample(own, each)))


def prepare(index: Path) -> tuple[Index, Index]:
    """The images to calibrate on and to judge by. Raises CalibrationError, also when nncf is missing,
    InvalidIndexError and FileNotFoundError."""
    if not importlib.util.find_spec("nncf"):
        raise CalibrationError("int8 needs nncf: pip install 'scaphoid[int8]'")
    return choose_images(read_index(index))


def decoded(index: Index, image_size: int) -> Radiographs:
    """Raises RejectedImage, or OSError, naming the first file that cannot be read."""
    images, sizes = load_images([index.path(each) for each in index.radiographs], image_size)
    return Radiographs(images, sizes, np.array([each.label for each in index.radiographs]))


def run_flow(flow: Flow, stages: Mapping[str, StageFunction], radiographs: Radiographs) -> dict[str, NDArray]:
    """Every tensor of `flow` that follows from the decoded images, all images along the first dim."""
    found: dict[str, list[NDArray]] = {}
    for start in range(0, len(radiographs.images), BATCH):
        part = slice(start, start + BATCH)
        given = {
            IMAGE.name: torch.from_numpy(radiographs.images[part]),
            ORIGINAL_SIZE.name: torch.from_numpy(radiographs.sizes[part]),
        }
        with torch.inference_mode():
            tensors = flow.run(stages, given, flow.outputs)
        for name, tensor in tensors.items():
            found.setdefault(name, []).append(tensor.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def inputs_of(stage: Stage, flow: Flow, tensors: Mapping[str, NDArray]) -> NDArray:
    """What every step of `flow` that uses the encoder `stage` was fed, one row an image: `tensors` are of a run."""
    (port,) = stage.inputs
    return np.concatenate([tensors[step.inputs[port.name]] for step in flow.steps if step.stage == stage])


@dataclass(frozen=True)
class Figures:
    """A flow beside eager fp32. `auroc`, `kappa`: the largest difference of any final probability's; `probability`: the
    largest difference of any image's; `iou_median`, `iou_p5`: median and 5th percentile of the box's IoU."""

    auroc: float
    kappa: float
    probability: float
    iou_median: float
    iou_p5: float

    @property
    def missed(self) -> list[str]:
        """By what the tolerance of int8 is missed, with some to spare for images that this was not measured on."""
        bar, lines = TOLERANCES["int8"], []
        for name, value, most in (("AUROC", self.auroc, bar.auroc), ("kappa", self.kappa, bar.kappa)):
            if not value <= SPARE * most:
                lines.append(f"{name} differs by {value:.4f}, at most {SPARE * most:g} wanted")
        overlaps = (("median", self.iou_median, bar.median_iou), ("5th percentile", self.iou_p5, bar.low_iou / SPARE))
        for name, value, least in overlaps:
            if not value >= least:
                lines.append(f"IoU of the box has {name} {value:.3f}, at least {least:g} wanted")
        return lines

    @property
    def passed(self) -> bool:
        return not self.missed


def compare_flow(
    flow: Flow, labels: Sequence[int], reference: Mapping[str, NDArray], candidate: Mapping[str, NDArray]
) -> Figures:
    """Both hold the tensors of `flow`, [N, ...]."""
    scores = [name for name in (PROBABILITY.name, PROBABILITY_WITH_PARTS.name) if name in flow.outputs]
    pairs = [(reference[name].ravel(), candidate[name].ravel()) for name in scores]
    metrics = [[classification_metrics(labels, probabilities, resamples=0) for probabilities in pair] for pair in pairs]
    overlaps = iou(reference[BOX.name], candidate[BOX.name])
    return Figures(
        *(max(abs(a[name].value - b[name].value) for a, b in metrics) for name in ("auroc", "kappa")),
        probability=max(float(np.abs(a - b).max()) for a, b in pairs),
        iou_median=float(np.median(overlaps)),
        iou_p5=float(np.quantile(overlaps, 0.05)),
    )
