"""What a flow takes from the manifest, checked before anything is computed with it: one that was edited is refused in a
line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaphoid.export.artefacts import MANIFEST, ManifestError
from scaphoid.export.precision import HINTS
from scaphoid.trainer.contracts import STAGES, Tensor
from scaphoid.trainer.flows import FLOWS


def check(artefacts: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ManifestError, naming the first part of the `manifest` of `artefacts` that is missing or cannot be."""

    def expect(good: bool, part: str, what: str) -> None:
        if not good:
            raise ManifestError(f"{artefacts / MANIFEST}: expected {part} to be {what}: export the weights again")

    flows, stages, thresholds = manifest.get("flows"), manifest.get("stages"), manifest.get("thresholds", {})
    known = isinstance(flows, list) and flows and all(flow in list(FLOWS) for flow in flows)
    expect(known, "flows", f"some of {', '.join(FLOWS)}")
    expect(manifest.get("precision") in list(HINTS), "precision", f"one of {', '.join(HINTS)}")
    expect(_is_size(manifest.get("image_size")), "image_size", "a number of pixels")
    probabilities = isinstance(thresholds, dict) and all(map(_is_probability, thresholds.values()))
    expect(probabilities, "thresholds", "numbers from 0 to 1 by flow")
    expect(isinstance(stages, dict), "stages", "stages by name")
    for name, stage in stages.items():
        kind = STAGES[name].kind if name in STAGES else None
        expect(isinstance(stage, dict) and stage.get("kind") == kind, f"stages.{name}", "a stage of this version")
    for name in dict.fromkeys(name for flow in flows for name in FLOWS[flow].stages):
        expect(name in stages, f"stages.{name}", "there")
        for side, tensors in (("inputs", STAGES[name].inputs), ("outputs", STAGES[name].outputs)):
            expect(_describes(stages[name].get(side), tensors), f"stages.{name}.{side}", "the contract's, with dims")


def _describes(described: Any, tensors: tuple[Tensor, ...]) -> bool:
    """Whether `described` has each tensor's name and dims, all of them numbers."""
    try:
        return len(described) == len(tensors) and all(
            real["name"] == tensor.name and len(real["dims"]) == len(tensor.dims) and all(map(_is_size, real["dims"]))
            for real, tensor in zip(described, tensors, strict=True)
        )
    except (LookupError, TypeError):
        return False


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1
