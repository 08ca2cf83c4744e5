"""What a training run is made of. The resolved configuration is written into the run's folder as config.json."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaphoid.trainer.losses import Kind
from scaphoid.trainer.models.kalm import KalmConfig
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.models.plain import PlainConfig


@dataclass(frozen=True)
class Schedule:
    """How the weights move. `epochs`: how many in each of the model's phases, in order (0 skips a phase)."""

    epochs: tuple[int, ...]
    batch: int
    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    """Of SGD."""
    drop_after: float = 1.0
    """The share of a phase's epochs after which the learning rate falls to a tenth."""
    loss: Kind = "ce"
    augment: bool = True
    """Horizontal flip, brightness and contrast jitter of 0.2."""
    frozen: tuple[str, ...] = ()
    """Modules of the backbone that keep their starting weights and statistics, by name: conv_stem bn1 blocks.0 ..."""
    frozen_statistics: bool = False
    """Keep every batch norm's running statistics. In MSFM three kinds of picture update them in turn (radiograph,
    object, windows), and what is left at the end fits none of the three."""


@dataclass(frozen=True)
class TrainConfig:
    """Train on the radiographs of an index. The run's folder holds config.json, history.jsonl, last.pt and
    best.safetensors."""

    index: Path
    """A canonical index (index.csv, or the folder that holds it)."""
    out: Path
    """The run's folder. An interrupted run continues when the same command is given again."""
    model: PlainConfig | KalmConfig | MsfmConfig
    schedule: Schedule
    images: int | None = None
    """Train on this many radiographs, whole patients, instead of all (learning curves)."""
    validation: float = 0.1
    """The share of the training patients on which the best checkpoint is chosen."""
    start: Path | None = None
    """Weights of a plain classifier to start every encoder from, instead of ImageNet's."""
    pretrained: bool = True
    """Start from ImageNet weights: packaged for tf_efficientnet_lite0, else timm's download."""
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str, sort_keys=True)


# The papers' settings; those of a plain classifier are KALM's first stage's, with the jitter of MSFM.
PAPER = {
    "plain": (PlainConfig(), Schedule((30,), 64, "adam", 1e-5, drop_after=2 / 3)),
    "kalm": (KalmConfig(), Schedule((30, 30), 64, "adam", 1e-5, drop_after=2 / 3, augment=False)),
    "msfm": (MsfmConfig(), Schedule((1, 29), 5, "sgd", 1e-4, weight_decay=1e-4, loss="alpha-wfl")),
}
