"""Holds a served flow against eager fp32, image by image: what a client gets, over gRPC from the real Triton server.

    python -m scaphoid.bench.server_parity msfm.safetensors artefacts radiographs/*.png --repository repository

Exits 1 when the bar of the engine's precision is missed; every image beyond it is shown with its margin.
"""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from scaphoid.export import parity
from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.export.parity import answers, compare, eager_answers, table
from scaphoid.export.precision import effective_precision
from scaphoid.export.runner import Runner
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import FlowClient, ServerUnavailable
from scaphoid.triton_repo.server import ServerError, running_server


@dataclass(frozen=True, kw_only=True)
class Arguments(parity.Arguments):
    """Compare the answers of a Triton server, started for the purpose, with the eager fp32 model. The artefacts'
    engines, in process, show the maps that a server does not."""

    repository: Path
    """Model repository that was assembled from the artefacts."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    if arguments.flow not in FLOWS:
        sys.exit(f"server_parity: unknown flow {arguments.flow!r}: expected one of {', '.join(FLOWS)}")
    flow = FLOWS[arguments.flow]
    try:
        precision = effective_precision(read_manifest(arguments.artefacts)["precision"])
        engine = answers(flow, Runner(arguments.artefacts, flow.name).stages)
        eager = eager_answers(arguments.weights, flow)
        with running_server(arguments.repository, [flow.name]) as server, asyncio.Runner() as loop:
            client = FlowClient(server.grpc_url, flow.name, flow.outputs)
            loop.run(client.__aenter__())
            try:
                found = compare(
                    flow, arguments.images, eager, lambda data: loop.run(client.predict(data)), engine, precision
                )
            finally:
                loop.run(client.__aexit__(None, None, None))
    except (ManifestError, ServerError, ServerUnavailable, OSError, ValueError) as error:
        sys.exit(f"server_parity: {error}")
    for part in table(found):
        Console().print(part)
    sys.exit(0 if found.passed else 1)


if __name__ == "__main__":
    main()
