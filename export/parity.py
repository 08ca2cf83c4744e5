"""Repeats the gate of scaphoid-export (gate.py) on given images: every exported file, and every served flow.

python -m scaphoid.export.parity msfm.safetensors artefacts radiographs/*.png --flow msfm
python -m scaphoid.export.parity msfm.safetensors artefacts index.csv
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from scaphoid.export.artefacts import PARITY, ManifestError, verify
from scaphoid.export.gate import hold
from scaphoid.export.gate_images import of_files
from scaphoid.export.parity_report import tables
from scaphoid.export.runner import eager_stages, load_served
from scaphoid.trainer.flows import FLOWS


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare exported engines, run in process, with the eager fp32 model: every output of every exported file, and
    every flow as a whole. Exits 1 when a tolerance is missed."""

    weights: tyro.conf.Positional[Path]
    """The weights file that the artefacts were exported from."""
    artefacts: tyro.conf.Positional[Path]
    """Folder that scaphoid-export wrote."""
    images: tyro.conf.Positional[list[Path]]
    """Radiographs: PNG, JPEG, BMP, TIFF or PGM files; or one index.csv, for scores too."""
    flow: str = "msfm"
    """msfm, msfm_fma or kalm."""


def map_error(artefacts: Path, flow: str, format: str) -> float:
    """The map error of one flow that the gate of the `artefacts` measured over the engines of one format."""
    flows = json.loads((artefacts / PARITY).read_text())["flows"]
    return max((each["map_error"] for each in flows if (each["flow"], each["engine"]) == (flow, format)), default=0.0)


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        manifest = verify(arguments.artefacts)
        if arguments.flow not in manifest["flows"]:
            raise ManifestError(f"{arguments.artefacts} has no flow {arguments.flow!r}: it has {manifest['flows']}")
        model = load_served(arguments.weights)
        stages = eager_stages(model, model.config.image_size)
        if missing := set(FLOWS[arguments.flow].stages) - set(stages):
            raise ValueError(f"{arguments.weights} has no stage {missing.pop()}: name the weights of {arguments.flow}")
        manifest["flows"] = [arguments.flow]
        quantized = manifest.pop("quantization", [])  # its failures are of another day, and of all flows
        report = hold(arguments.artefacts, manifest, stages, of_files(arguments.images))
        report["notes"] = [note for each in quantized for note in each.get("notes", ())] + report["notes"]
    except (ManifestError, OSError, ValueError) as error:
        sys.exit(f"parity: {error}")
    for part in tables(report):
        Console().print(part)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
