"""`scaphoid-bench`: how fast a flow is here, in process and behind the real Triton server, and how fast the ops are.

scaphoid-bench flow --backbone resnet50 --flow msfm       untrained ResNet-50: eager, engines, Triton, in one run
scaphoid-bench flow --weights msfm.safetensors            a trained model
scaphoid-bench server 127.0.0.1:8001 radiographs/*.png    load on a server that already runs
scaphoid-bench soak --minutes 30                          mixed load: no answer wrong or lost, nothing grows
scaphoid-bench tail --repository repository               p99 at 70 % of saturation, beside a queueing simulation
scaphoid-bench triage --repository repository             cost against AUROC when the first stage is asked first
scaphoid-bench capacity --cores 16                        what a GPU serves on paper, replicas, the next bottleneck
scaphoid-bench fuzz --repository repository               10,000 damaged images and malformed requests
scaphoid-bench peaks                                      what this machine reaches at best
scaphoid-bench ops --device cpu --threads 1 2             every op beside its baseline in torch, NumPy, scikit-image
scaphoid-bench kernels                                    what the compiler made of the CUDA kernels; needs no GPU
"""

import asyncio
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from scaphoid.bench.capacity import Capacity, capacity
from scaphoid.bench.comparison import RATE_COLUMNS, Comparison, compare, rate_cells, tell
from scaphoid.bench.fuzz import Fuzz, fuzz
from scaphoid.bench.kernel_report.report import KernelsBench, bench_kernels
from scaphoid.bench.kernel_report.sass import ToolMissing
from scaphoid.bench.ops import Disagreement, OpsBench, bench_ops
from scaphoid.bench.peaks import machine, peaks
from scaphoid.bench.report import Report, Table
from scaphoid.bench.server_load import LoadError, ensemble, server_load
from scaphoid.bench.soak import Soak, soak
from scaphoid.bench.tail import Tail, tail
from scaphoid.bench.triage import Triage, triage
from scaphoid.export.artefacts import ManifestError
from scaphoid.export.export import ExportError
from scaphoid.triton_repo.client import ServerUnavailable, wanted_outputs
from scaphoid.triton_repo.supervisor.server import ServerError


@dataclass(frozen=True)
class ServerBench:
    """Put load on a flow of a server that already runs, and report images/s and latency."""

    url: tyro.conf.Positional[str]
    """host:port of the server's gRPC endpoint."""
    images: tyro.conf.Positional[list[Path]]
    """Radiographs to send, over and over: PNG, JPEG, BMP, TIFF or PGM files."""
    flow: str = "msfm"
    """msfm, msfm_fma or kalm."""
    clients: int = 8
    """Connections, each with one request in flight."""
    requests: int = 1000
    """Stop after so many answers ..."""
    seconds: float = 30.0
    """... or after so long."""
    parts: bool = True
    """Classify MSFM's windows as well."""


@dataclass(frozen=True)
class PeaksBench:
    """Measure the machine's limits: matrix products and memory copies."""


def bench_server(arguments: ServerBench) -> Report:
    """Load on a running server. Raises ValueError, ServerUnavailable, LoadError and OSError."""
    wanted = wanted_outputs(arguments.flow, arguments.parts)
    here = machine()
    images = [path.read_bytes() for path in arguments.images]
    bounds = (arguments.clients, arguments.requests, arguments.seconds)
    load = asyncio.run(server_load(arguments.url, ensemble(arguments.url, arguments.flow, wanted), images, *bounds))
    columns = ("clients (count)", "counted (images)", *RATE_COLUMNS, "failed (requests)")
    row = (arguments.clients, load.rate.images, *rate_cells(load.rate), len(load.failures))
    table = Table("Throughput and latency", columns, (row,))
    subject = {"flow": arguments.flow, "server": arguments.url, "input": f"{len(images)} files"}
    facts = ("the machine below is the clients', not the server's", *(f"failed: {line}" for line in load.failures[:1]))
    return Report(f"Load on {arguments.flow}", subject, facts, here, peaks(), (table,))


def bench_peaks(_: PeaksBench) -> Report:
    return Report("Peaks of this machine", {}, (), machine(), peaks(), ())


COMMANDS = {
    Comparison: compare,
    ServerBench: bench_server,
    Soak: soak,
    Tail: tail,
    Triage: triage,
    Capacity: capacity,
    Fuzz: fuzz,
    PeaksBench: bench_peaks,
    OpsBench: bench_ops,
    KernelsBench: bench_kernels,
}
ERRORS = (
    *(ExportError, ManifestError, ServerError, ServerUnavailable, LoadError),
    *(Disagreement, ToolMissing, OSError, ValueError),
)


def main() -> None:
    arguments = tyro.cli(
        Annotated[Comparison, tyro.conf.subcommand("flow")]
        | Annotated[ServerBench, tyro.conf.subcommand("server")]
        | Annotated[Soak, tyro.conf.subcommand("soak")]
        | Annotated[Tail, tyro.conf.subcommand("tail")]
        | Annotated[Triage, tyro.conf.subcommand("triage")]
        | Annotated[Capacity, tyro.conf.subcommand("capacity")]
        | Annotated[Fuzz, tyro.conf.subcommand("fuzz")]
        | Annotated[PeaksBench, tyro.conf.subcommand("peaks")]
        | Annotated[OpsBench, tyro.conf.subcommand("ops")]
        | Annotated[KernelsBench, tyro.conf.subcommand("kernels")],
        description=__doc__,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped and cleaned up after either
    try:
        report = COMMANDS[type(arguments)](arguments)
        print(report.json() if getattr(arguments, "json", False) else report.markdown())
        if out := getattr(arguments, "out", None):
            tell("report in " + " and ".join(map(str, report.write(out, arguments.name))))
        if report.missed:
            sys.exit("scaphoid-bench: missed: " + "; ".join(report.missed))
    except ERRORS as error:
        sys.exit(f"scaphoid-bench: {error}")
    except KeyboardInterrupt:
        sys.exit("scaphoid-bench: interrupted; no report was written")


if __name__ == "__main__":
    main()
