"""AUROC on the frozen held-out phantoms against the number of training images, for every run of `demo_weights`.

python -m scaphoid.trainer.learning_curves --runs runs --out trainer/weights
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.progress import track

from scaphoid.trainer.checkpoint import load_model, read_metadata
from scaphoid.trainer.data.index import FILE_NAME, read_index
from scaphoid.trainer.data.phantom.generate import GENERATOR_VERSION, TEST, generate_frozen
from scaphoid.trainer.data.pipeline import load_images
from scaphoid.trainer.figures import learning_curves
from scaphoid.trainer.metrics import Estimate, classification_metrics
from scaphoid.trainer.models.msfm import MsfmConfig

BATCH = 16
IMAGE_SIZE = MsfmConfig.image_size
# Run and probability -> the curve's name.
CURVES = {
    ("plain", "probability"): "plain classifier",
    ("more", "probability"): "plain, trained on",
    ("kalm", "probability"): "KALM",
    ("kalm", "local_probability"): "KALM, local alone",
    ("msfm", "probability"): "MSFM",
    ("msfm", "probability_with_parts"): "MSFM with parts",
}


@torch.inference_mode()
def probabilities(weights: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every probability that a checkpoint gives on images uint8 [N, 1, S, S], each [N]."""
    model = load_model(weights)
    batches = [
        model.probabilities(model.phases[-1], torch.from_numpy(images[start : start + BATCH]))
        for start in range(0, len(images), BATCH)
    ]
    return {name: torch.cat([batch[name] for batch in batches])[:, 0].numpy() for name in batches[0]}


def main(runs: Path = Path("runs"), out: Path = Path("trainer/weights")) -> None:
    """Evaluate every finished run and write learning_curves.json and learning_curves.png.

    Args:
        runs: folder of the runs that demo_weights wrote.
        out: folder for the result.
    """
    test = runs / "phantoms_test"
    if not (test / FILE_NAME).exists():
        generate_frozen(test, TEST, workers=2)
    index = read_index(test)
    labels = [radiograph.label for radiograph in index.radiographs]
    patients = [radiograph.patient for radiograph in index.radiographs]
    images, _ = load_images([index.path(radiograph) for radiograph in index.radiographs], IMAGE_SIZE)
    curves: dict[str, list[tuple[int, Estimate]]] = {}
    for weights in track(sorted(runs.glob("images_*/*/best.safetensors")), "evaluating runs"):
        found = probabilities(weights, images)
        for (run, score), name in CURVES.items():
            if run == weights.parent.name:
                auroc = classification_metrics(labels, found[score], patients)["auroc"]
                curves.setdefault(name, []).append((read_metadata(weights)["images"], auroc))
    curves = {name: sorted(points) for name, points in curves.items()}
    learning_curves(curves, out / "learning_curves.png")
    table = {
        name: [{"images": n, **dataclasses.asdict(auroc)} for n, auroc in points] for name, points in curves.items()
    }
    content = {"generator": GENERATOR_VERSION, "test_images": len(labels), "auroc": table}
    (out / "learning_curves.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
