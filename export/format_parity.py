"""Holds every exported file that runs here against eager fp32, stage by stage and output by output.

Each stage gets the eager stages' own inputs, so that a decision that flipped in one stage does not blur the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from scaphoid.export.flow_module import FLOW, flow_stage
from scaphoid.export.formats import SERVED, Format, named
from scaphoid.export.precision import effective_precision
from scaphoid.export.runner import load_stage
from scaphoid.export.tolerances import MAPS, SMALLEST_SCALE, at_most, precision_of
from scaphoid.trainer.contracts import STAGES, Stage
from scaphoid.trainer.flows import Flow


@dataclass(frozen=True)
class Engine:
    """One format's file suffix that encoders are exported to; glue is the format's own, or what is served.

    `precision` is the one that it runs in on this machine, but for stages of `precision_of` f32."""

    format: Format
    suffix: str
    precision: str

    def path(self, artefacts: Path, stage: Stage) -> Path | None:
        """Its file of a stage or a flow; None where it has none."""
        path = self.format.path(artefacts, stage, self.suffix)
        return path if stage.kind in self.format.kinds and path.is_file() else None

    def stages(self, artefacts: Path, flow: Flow, manifest: Mapping, threads: int) -> dict[str, "ExportedStage"]:
        """The flow's stages behind preprocessing, loaded."""
        loaded = {}
        for stage in [STAGES[name] for name in flow.stages if STAGES[name].kind != "preprocess"]:
            if path := self.path(artefacts, stage):
                run = self.format.load(path, stage, precision_of(stage, self.precision), threads)
                loaded[stage.name] = ExportedStage(stage, self.format.name, self.precision, run)
            else:
                run = load_stage(artefacts, stage, manifest, threads)
                loaded[stage.name] = ExportedStage(stage, SERVED[stage.kind], "f32", run)
        return loaded

    def whole(self, artefacts: Path, flow: Flow, threads: int) -> Callable | None:
        """Its one file of the whole flow, loaded; None where it has none."""
        path = self.path(artefacts, flow_stage(flow)) if FLOW in self.format.kinds else None
        return self.format.load(path, flow_stage(flow), self.precision, threads) if path else None


def engines(artefacts: Path, manifest: Mapping) -> list[Engine]:
    """What the encoders were exported to, as far as this machine has its packages."""
    formats = [each for each in named(manifest["formats"]) if not each.missing()]
    found = [
        Engine(each, suffix, stored or effective_precision(manifest["precision"]))
        for each in formats
        for suffix, stored in each.files.items()
    ]
    encoders = [STAGES[name] for name in manifest["stages"] if STAGES[name].kind == "encoder"]
    return [each for each in found if any(each.path(artefacts, stage) for stage in encoders)]


@dataclass
class ExportedStage:
    """An exported stage as a function, which remembers what it was asked about the present batch: a flow whose tensors
    are still eager's costs no second run. `precision`: of the files that its own is one of, which it may not be in
    itself (`precision_of`)."""

    stage: Stage
    format: str
    precision: str
    run: Callable
    _known: list[tuple[tuple, tuple]] = field(default_factory=list)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for known, outputs in self._known:
            if all(map(torch.equal, known, inputs)):
                return outputs
        outputs = self.run(*inputs)
        outputs = tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)
        self._known.append((inputs, outputs))
        return outputs

    def forget(self) -> None:
        self._known.clear()


@dataclass
class OutputError:
    """One output of one exported file, over all images of every step that uses the stage. `mean` is over elements."""

    format: str
    precision: str
    stage: Stage
    output: str
    largest: float = 0.0
    total: float = 0.0
    elements: int = 0

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        errors = errors_of(self.output, expected, found)
        self.largest = max(self.largest, float(errors.max()))
        self.total += float(errors.sum())
        self.elements += errors.size

    @property
    def mean(self) -> float:
        return self.total / max(self.elements, 1)

    @property
    def at_most(self) -> tuple[float | None, float | None]:
        return at_most(self.stage, precision_of(self.stage, self.precision))

    @property
    def failure(self) -> str:
        """What is beyond the tolerance; empty when nothing is."""
        largest, mean = self.at_most
        where = f"{self.stage.name}, {self.format} {self.precision}: {self.output}"
        if not np.isfinite(self.largest):
            return f"{where} has another shape, or gave no number"
        if largest is not None and self.largest > largest:
            return f"{where} differs by {self.largest:.2g}, at most {largest:g}"
        if mean is not None and self.mean > mean:
            return f"{where} differs by {self.mean:.2g} in the mean, at most {mean:.2g}"
        return ""


def errors_of(name: str, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Difference of every element [B, ...], of maps and large logits relative to the image's largest value; infinite
    where the shapes, or a NaN, differ."""
    if expected.shape != found.shape:
        return np.full(1, np.inf)
    errors = np.abs(expected.astype(np.float64) - found)
    if name in SMALLEST_SCALE:
        largest = np.abs(expected).reshape(len(expected), -1).max(1).astype(np.float64)
        errors = errors / np.maximum(largest, SMALLEST_SCALE[name]).reshape(-1, *[1] * (expected.ndim - 1))
    return np.nan_to_num(errors, nan=np.inf)


class Errors:
    """The errors of every output of every exported file, as they come."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str, str], OutputError] = {}

    def add(self, stage: ExportedStage, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
        for tensor, wanted, given in zip(stage.stage.outputs, expected, found, strict=True):
            key = (stage.format, stage.precision, stage.stage.name, tensor.name)
            row = self.rows.setdefault(key, OutputError(stage.format, stage.precision, stage.stage, tensor.name))
            row.add(wanted.numpy(), given.numpy())

    def map_error(self, format: str, precision: str) -> float:
        """The largest error of an activation map of one engine, relative to the map's largest value."""
        errors = [
            row.largest for key, row in self.rows.items() if key[:2] == (format, precision) and row.output in MAPS
        ]
        return max(errors, default=0.0)
