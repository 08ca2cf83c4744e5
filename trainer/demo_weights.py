"""Train what the demo ships, and its learning curves, on the frozen phantoms: one command, resumable, hours on 2 cores.

    python -m scaphoid.trainer.demo_weights --runs runs --weights trainer/weights

For each number of training images: a plain classifier; the same one trained on for as many epochs as the systems get
(the baseline: the same backbone and epochs, though not seconds: an MSFM epoch costs 3.75 passes); MSFM and KALM, both
started from the plain classifier. The backbone is EfficientNet-Lite0 from packaged ImageNet weights, its stem and first
three of seven stages frozen, on the 448 image shrunk to 224.
"""

from dataclasses import replace
from pathlib import Path

import tyro

from scaphoid.trainer import learning_curves
from scaphoid.trainer.checkpoint import load_model, save_model
from scaphoid.trainer.config import Schedule, TrainConfig
from scaphoid.trainer.data.index import FILE_NAME
from scaphoid.trainer.data.phantom.generate import TRAINING, generate_frozen, generator_of
from scaphoid.trainer.models.backbone import PACKAGED
from scaphoid.trainer.models.kalm import KalmConfig
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.models.plain import PlainConfig
from scaphoid.trainer.train import train

CURVE = (None, 500, 1000, 2000)  # training images; None: all but the validation patients'
FROZEN = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")

PLAIN = Schedule((4,), 32, "adam", 5e-4, drop_after=0.75, frozen=FROZEN)
MORE = Schedule((1,), 32, "adam", 2e-4, frozen=FROZEN)
# Chosen on the validation patients: at 2e-4, with moving statistics, the joint epoch undoes what plain training learnt.
JOINT = Schedule((0, 1), 16, "adam", 2e-5, loss="alpha-wfl", frozen=FROZEN, frozen_statistics=True)
SYSTEMS = {
    "more": (PlainConfig(PACKAGED, scale=0.5), MORE),
    "msfm": (MsfmConfig(PACKAGED, scale=0.5), JOINT),
    "kalm": (KalmConfig(PACKAGED, global_scale=0.5), replace(MORE, epochs=(0, 1))),
}


def run(runs: Path, index: Path, images: int | None) -> dict[str, Path]:
    """The best checkpoint of the plain classifier, the baseline and both systems for one number of training images."""
    folder = runs / f"images_{images or 'all'}"

    def trained(name: str, config: TrainConfig) -> Path:
        best = folder / name / "best.safetensors"
        return best if best.exists() else train(config)

    config = TrainConfig(index, folder / "plain", PlainConfig(PACKAGED, scale=0.5), PLAIN, images=images)
    best = {"plain": trained("plain", config)}
    for name in ("msfm", "kalm", "more"):
        model, schedule = SYSTEMS[name]
        started = replace(config, out=folder / name, model=model, schedule=schedule, start=best["plain"])
        best[name] = trained(name, started)
    return best


def main(runs: Path = Path("runs"), weights: Path = Path("trainer/weights")) -> None:
    """Train and write the demo weights, then the learning curves' smaller runs.

    Args:
        runs: folder of the runs; give the same one again to continue.
        weights: folder for the compact weights files.
    """
    phantoms = runs / "phantoms"
    if not (phantoms / FILE_NAME).exists():
        generate_frozen(phantoms, TRAINING)
    for images in CURVE:
        best = run(runs, phantoms, images)
        if images is None:
            weights.mkdir(parents=True, exist_ok=True)
            for system in ("msfm", "kalm"):
                model = load_model(best[system])
                facts = {"phantoms": generator_of(phantoms), "licence": "Apache-2.0"}
                save_model(weights / f"{system}.safetensors", model, compact=True, **facts)
    learning_curves.main(runs, weights)


if __name__ == "__main__":
    tyro.cli(main)
