"""Holds a served flow against eager fp32, image by image: what a client gets, over gRPC from the real Triton server.

    python -m scaphoid.bench.server_parity msfm.safetensors artefacts radiographs/*.png --repository repository

Exits 1 when a tolerance of the engine's precision is missed; every image beyond it is shown with its margin. A server
cannot be given eager's suppressed image: msfm_fma is judged by its scores, which need an index.csv for the images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from scaphoid.export import parity
from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.export.flow_parity import Answers, Parity, answers
from scaphoid.export.formats import SERVED
from scaphoid.export.gate import report_of
from scaphoid.export.gate_images import of_files
from scaphoid.export.parity_report import tables
from scaphoid.export.precision import effective_precision
from scaphoid.export.runner import eager_stages, load_served
from scaphoid.export.tolerances import PIXELWISE
from scaphoid.trainer.flows import FLOWS, Flow
from scaphoid.triton_repo.client import Client, ServerUnavailable
from scaphoid.triton_repo.supervisor.server import ServerError, running_server


@dataclass(frozen=True, kw_only=True)
class Arguments(parity.Arguments):
    """Compare the answers of a Triton server, started for the purpose, with the eager fp32 model. The map error that
    may explain a difference is the one that the artefacts' gate measured."""

    repository: Path
    """Model repository that was assembled from the artefacts."""


def ask(url: str, flow: Flow, encoded: list[bytes]) -> Answers:
    with Client(url, flow.name) as client:
        rows = [client.infer(each).tensors for each in encoded]
    return {name: np.stack([row[name] for row in rows]) for name in flow.outputs}


def main() -> None:
    arguments = tyro.cli(Arguments)
    if arguments.flow not in FLOWS:
        sys.exit(f"server_parity: unknown flow {arguments.flow!r}: expected one of {', '.join(FLOWS)}")
    flow = FLOWS[arguments.flow]
    try:
        manifest = read_manifest(arguments.artefacts)
        images = of_files(arguments.images)
        model = load_served(arguments.weights)
        with running_server(arguments.repository, [flow.name]) as server:  # first: it refuses what cannot be served
            found = ask(server.grpc_url, flow, images.encoded)
        expected = answers(flow, eager_stages(model, model.config.image_size), images.encoded)
    except (ManifestError, ServerError, ServerUnavailable, OSError, ValueError) as error:
        sys.exit(f"server_parity: {error}")
    pixelwise = bool(PIXELWISE & set(flow.stages))
    compared = Parity(
        flow,
        "Triton",
        effective_precision(manifest["precision"]),
        expected,
        found,
        parity.map_error(arguments.artefacts, flow.name, SERVED["encoder"]),
        images.radiographs,
        places=images.places,
        each_image=not pixelwise,
        note="judged by its scores" if pixelwise else "",
    )
    report = report_of(manifest, images, [], [compared])
    for part in tables(report):
        Console().print(part)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
