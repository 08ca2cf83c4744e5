"""Class activation maps of a plain classifier: the baseline that the two systems' boxes stand beside.

    python -m scaphoid.trainer.cam plain.safetensors --index DATA --split valid --validation TRAINING --out cam.jsonl
    scaphoid-evaluate results/predictions.jsonl --index DATA --beside cam.jsonl

The map is (W1 - W0) . F, enlarged bilinearly and scaled to [0, 1]; the box is that of the largest component at or above
a threshold, the one of 0.05 ... 0.95 whose boxes hit most lesions of a *validation* index.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from scaphoid.trainer.checkpoint import load_model
from scaphoid.trainer.contracts import PREDICTION_SCHEMA
from scaphoid.trainer.data.index import Index, read_index
from scaphoid.trainer.data.pipeline import BATCH, load_images
from scaphoid.trainer.localization import CAM_THRESHOLDS, cam_boxes, choose_threshold, map_peaks
from scaphoid.trainer.models.plain import Plain
from scaphoid.trainer.stages.result import abnormal_probability


@dataclass(frozen=True)
class Options:
    """Boxes of a plain classifier by class activation maps, written as predictions (scaphoid-evaluate --beside)."""

    weights: tyro.conf.Positional[Path]
    """Weights of a plain classifier, from scaphoid-train plain."""
    index: Path
    """The data set to predict: index.csv, or its folder."""
    validation: Path
    """Another data set with boxes, on which the threshold of the maps is chosen."""
    out: Path
    """File for the predictions, JSON lines."""
    split: str | None = None
    """Only this split of the index."""
    validation_images: int = 300
    """The threshold is chosen on at most so many radiographs with a visible lesion."""


@torch.inference_mode()
def activation_maps(model: Plain, index: Index) -> Iterator[tuple[NDArray, NDArray]]:
    """Probabilities [B] and maps [B, h, w] of the index's radiographs, in order, a batch at a time."""
    weight = model.encoder.classifier.weight
    for start in range(0, len(index), BATCH):
        part = index.radiographs[start : start + BATCH]
        images, _ = load_images([index.path(each) for each in part], model.config.image_size, progress=False)
        features = model.encoder.features(torch.from_numpy(images))
        probabilities = abnormal_probability(model.encoder.classifier(features.mean((2, 3))))
        maps = torch.einsum("bchw,c->bhw", features, weight[1] - weight[0])
        yield probabilities.squeeze(1).numpy(), maps.numpy()


def threshold_of(model: Plain, index: Index, images: int) -> float:
    """The threshold whose boxes hit most of the first `images` visible lesions of `index`. Raises ValueError without
    any."""
    shown = tuple(each for each in index.radiographs if each.label and each.boxes)[:images]
    if not shown:
        raise ValueError(f"validation: no radiograph below {index.root} has a box to choose the threshold by")
    maps = np.concatenate([maps for _, maps in activation_maps(model, Index(index.root, shown))])
    boxes = [cam_boxes(cam, (each.height, each.width)) for cam, each in zip(maps, shown, strict=True)]
    return CAM_THRESHOLDS[choose_threshold(np.stack(boxes, axis=1), [each.boxes for each in shown])]


def predict(model: Plain, index: Index, threshold: float) -> Iterator[dict]:
    """A prediction record for every radiograph of `index`."""
    radiographs = iter(index.radiographs)
    for probabilities, maps in activation_maps(model, index):
        for probability, cam in zip(probabilities, maps, strict=True):
            one = next(radiographs)
            size = (one.height, one.width)
            yield {
                "schema": PREDICTION_SCHEMA,
                **{"image": str(index.path(one)), "study": one.study, "flow": "cam", "status": "ok"},
                **{"width": one.width, "height": one.height, "probability": float(probability), "threshold": 0.5},
                "box": cam_boxes(cam, size, [threshold])[0].tolist(),
                "peak": map_peaks([cam], [size])[0].tolist(),
            }


def run(options: Options) -> float:
    """Write the predictions; returns the threshold of the maps. Raises ValueError for what cannot be used."""
    model = load_model(options.weights)
    if not isinstance(model, Plain):
        raise ValueError(f"{options.weights} is of {model.system}: class activation maps need a plain classifier")
    index, validation = read_index(options.index), read_index(options.validation)
    index = index if options.split is None else index.where(split=options.split)
    reported = {index.path(each).resolve() for each in index.radiographs}
    if shared := [each.image for each in validation.radiographs if validation.path(each).resolve() in reported]:
        raise ValueError(f"validation: {shared[0]} is among the radiographs to predict; choose on other ones")
    threshold = threshold_of(model, validation, options.validation_images)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for record in predict(model, index, threshold):
            file.write(json.dumps(record) + "\n")
    return threshold


def main() -> None:
    options = tyro.cli(Options, prog="python -m scaphoid.trainer.cam", description=__doc__)
    try:
        print(f"{options.out}: boxes at {run(options):g} of each map's range")
    except (ValueError, OSError) as error:
        sys.exit(f"scaphoid.trainer.cam: {error}")


if __name__ == "__main__":
    main()
