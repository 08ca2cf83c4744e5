"""`scaphoid-serve`: the real Triton server on an assembled repository, until Ctrl-C.

scaphoid-serve repository --flows msfm kalm
"""

import math
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import tyro

from scaphoid.export.artefacts import ManifestError, accepted, read_manifest
from scaphoid.export.precision import effective_precision
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.server import ServerError, running_server

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Arguments:
    """Serve a model repository with the real Triton server, on this machine's CPU."""

    repository: tyro.conf.Positional[Path]
    """Folder that scaphoid.triton_repo.assemble wrote; a file that changed since is refused."""
    flows: tuple[str, ...] = ()
    """Flows to load, by default all of the repository's: msfm, msfm_fma, kalm (commas or spaces between)."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback exposes an unencrypted, unauthenticated server."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    canary_interval_s: float = 10.0
    """Seconds between the inferences that check every flow, and recover it when they fail."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    flows = tuple(flow for group in arguments.flows for flow in group.split(",") if flow)
    if unknown := [flow for flow in flows if flow not in FLOWS]:
        sys.exit(f"scaphoid-serve: unknown flow {unknown[0]}: expected one of {', '.join(FLOWS)}")
    if not 0 < arguments.canary_interval_s < math.inf:
        sys.exit(f"scaphoid-serve: --canary-interval-s: expected more than 0 s, got {arguments.canary_interval_s}")
    for number in SIGNALS:
        signal.signal(number, interrupt)
    ports = (arguments.http_port, arguments.grpc_port, arguments.metrics_port)
    try:
        tell(f"starting Triton on {arguments.repository} ...")
        with running_server(arguments.repository, flows, arguments.host, ports, report=tell) as server:
            manifest = read_manifest(arguments.repository)
            if line := accepted(manifest):
                tell(line)
            wanted = manifest["precision"]
            if (real := effective_precision(wanted)) != wanted:
                tell(f"the engines were exported for {wanted}, which this CPU does not have: they run in {real}")
            tell(
                f"ready after {server.start_s:.1f} s: {', '.join(server.flows)} at grpc {server.grpc_url}, "
                f"http http://{server.http_url}, metrics http://{server.metrics_url}/metrics; Ctrl-C stops it"
            )
            server.watch(threading.Event(), arguments.canary_interval_s)
    except (ManifestError, ServerError, OSError) as error:
        sys.exit(f"scaphoid-serve: {error}")
    except KeyboardInterrupt:
        tell("stopped")


def interrupt(*_: object) -> None:
    """On the first signal leave through every `finally`; a second one must not cut the stopping short."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    tell("stopping ...")
    raise KeyboardInterrupt


def tell(line: str) -> None:
    print(f"scaphoid-serve: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
