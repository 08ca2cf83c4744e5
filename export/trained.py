"""Trained weights, loaded for export: their stages, what crosses every stage's door, where they come from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from scaphoid.export.artefacts import PHANTOMS, sha256
from scaphoid.export.doors import Door, record
from scaphoid.export.runner import StageFunction, eager_stages, load_served
from scaphoid.trainer.checkpoint import Model, read_metadata
from scaphoid.trainer.flows import FLOWS, Flow

BEST = "best.safetensors"  # what scaphoid-train calls a run's best checkpoint
LICENCE = "licence"  # of the weights, in their metadata


class ExportError(Exception):
    """Weights that cannot be exported as asked. One line: which file, what was expected, what to do."""


@dataclass
class Trained:
    """Models that are exported together, their stages by name: `modules` alone, `eager` behind preprocessing."""

    image_size: int
    models: list[Model] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    eager: dict[str, StageFunction] = field(default_factory=dict)
    doors: dict[str, Door] = field(default_factory=dict)
    origins: list[dict] = field(default_factory=list)

    @property
    def flows(self) -> list[Flow]:
        return flows_of(self.modules)


def load_trained(weights: list[Path]) -> Trained:
    """Raises ExportError for files that cannot be exported together, DoorError for a stage that breaks its contract,
    ValueError for a file whose model does not load or is served by no flow."""
    trained = None
    for path in map(weights_file, weights):
        model = load_served(path)
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise ExportError(f"{path}: {name} has numbers that are not finite: export an earlier checkpoint")
        size, stages = model.config.image_size, model.stages()
        trained = trained or Trained(size)
        if size != trained.image_size:
            raise ExportError(
                f"{path} takes images of {size} pixels, {weights[0]} of {trained.image_size}: export them apart"
            )
        if taken := sorted(set(stages) & set(trained.modules)):
            raise ExportError(f"{path} has the stages of another weights file ({taken[0]}): export them apart")
        trained.models.append(model)
        trained.modules |= stages
        trained.eager |= eager_stages(model, size)
        trained.origins.append(origin(path, model, stages))
        for flow in flows_of(stages):
            trained.doors |= record(flow, trained.eager)
    if trained is None:
        raise ExportError("no weights: name at least one .safetensors file, or the folder of a run")
    return trained


def weights_file(path: Path) -> Path:
    """`path`, or the best checkpoint of a run's folder. Raises ExportError for a folder without one."""
    if path.is_dir() and not (path / BEST).is_file():
        raise ExportError(f"{path} holds no {BEST}: let scaphoid-train finish an epoch there, or name a weights file")
    return path / BEST if path.is_dir() else path


def origin(path: Path, model: Model, stages: Mapping[str, nn.Module]) -> dict:
    """What the manifest says of one weights file: the flows that run on it, and what its metadata tell: `phantoms`, the
    generator's version, when it was trained on drawn radiographs; threshold and licence."""
    facts = read_metadata(path)
    for key in (LICENCE, PHANTOMS):
        if not isinstance(facts.get(key, ""), str):
            raise ExportError(f"{path}: the {key} in its metadata is {facts[key]!r}, expected text")
    threshold = facts.get("threshold", 0.5)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ExportError(f"{path}: the threshold in its metadata is {threshold!r}, expected a number from 0 to 1")
    return {
        "file": path.name,
        "sha256": sha256(path),
        "system": model.system,
        "config": asdict(model.config),
        "flows": [flow.name for flow in flows_of(stages)],
        "threshold": threshold,
        "threshold_from": "the weights file" if "threshold" in facts else "the default: none was fitted",
        "probability_calibration": None,
        "licence": facts.get(LICENCE, "not stated in the weights file"),
        **{key: value for key, value in facts.items() if key == PHANTOMS},
    }


def flows_of(stages: Mapping[str, object]) -> list[Flow]:
    """The flows that can run on `stages`, which leave out preprocessing."""
    return [flow for flow in FLOWS.values() if set(flow.stages) <= {*stages, "preprocess"}]
