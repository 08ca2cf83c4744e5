"""`scaphoid-serve`: the real Triton server on an assembled repository, until Ctrl-C.

scaphoid-serve repository --flows msfm kalm
scaphoid-serve versions --help
scaphoid-serve drift --help
"""

import json
import math
import signal
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro

from scaphoid.export.artefacts import ManifestError, accepted, read_manifest
from scaphoid.export.precision import fallback
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.certificates import CertificateError
from scaphoid.triton_repo.monitoring import drift_command
from scaphoid.triton_repo.supervisor.installation import in_container
from scaphoid.triton_repo.supervisor.server import Report, ServerError, running_server
from scaphoid.triton_repo.supervisor.watch import Watcher
from scaphoid.triton_repo.versioning import versions_command

SIGNALS = (signal.SIGINT, signal.SIGTERM)
COMMANDS = {"versions": versions_command.main, "drift": drift_command.main}


@dataclass(frozen=True)
class Arguments:
    """Serve a model repository with the real Triton server, on this machine's CPU.

    Other commands: `scaphoid-serve versions` adds versions of the models, switches and rolls back while requests run;
    `scaphoid-serve drift` holds served predictions against the model's own."""

    repository: tyro.conf.Positional[Path]
    """Folder that scaphoid.triton_repo.assemble wrote; a file that changed since is refused."""
    flows: tuple[str, ...] = ()
    """Flows to load, by default all of the repository's: msfm, msfm_fma, kalm (commas or spaces between)."""
    host: str = "127.0.0.1"
    """Address to listen on, of IPv4 or IPv6, or a name. Anything but loopback is for the vendor's container alone."""
    tls: Path | None = None
    """Folder with the certificates of scaphoid.triton_repo.certificates: gRPC encrypted, for clients with one of their
    own; HTTP then stays on loopback."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    health_port: int = 8003
    """Port of the supervisor's own /ready, /live and /metrics."""
    canary_interval_s: float = 10.0
    """Seconds between the inferences that check every flow, and recover it when they fail."""
    journals: tuple[Path, ...] = ()
    """Growing predictions.jsonl files of clients on this machine: /metrics tells their spread and drift."""
    log_json: bool = False
    """Log a JSON object on each line, with the parts of every event by name."""


def main() -> None:
    if command := COMMANDS.get("".join(sys.argv[1:2])):
        return command(sys.argv[2:])
    arguments = tyro.cli(Arguments)
    tell = tell_json if arguments.log_json else tell_line
    flows = tuple(flow for group in arguments.flows for flow in group.split(",") if flow)
    if unknown := [flow for flow in flows if flow not in FLOWS]:
        sys.exit(f"scaphoid-serve: unknown flow {unknown[0]}: expected one of {', '.join(FLOWS)}")
    if not 0 < arguments.canary_interval_s < math.inf:
        sys.exit(f"scaphoid-serve: --canary-interval-s: expected more than 0 s, got {arguments.canary_interval_s}")
    try:
        interruptible(tell)
        serve(arguments, flows, tell)
    except (ManifestError, ServerError, CertificateError, OSError) as error:
        sys.exit(f"scaphoid-serve: {error}")
    except KeyboardInterrupt:
        tell("stopped", event="stopped")


def serve(arguments: Arguments, flows: tuple[str, ...], tell: Report) -> None:
    """Until KeyboardInterrupt. Raises ManifestError, ServerError, CertificateError, OSError when it does not start."""
    ports = (arguments.http_port, arguments.grpc_port, arguments.metrics_port)
    tell(f"starting Triton on {arguments.repository} ...", event="starting")
    with running_server(
        arguments.repository,
        flows,
        arguments.host,
        ports,
        report=tell,
        health_port=arguments.health_port,
        journals=arguments.journals,
        tls=arguments.tls,
    ) as server:
        manifest = read_manifest(arguments.repository)
        if line := accepted(manifest):
            tell(line, event="accepted", level="warning")
        wanted = manifest["precision"]
        if not in_container() and (line := fallback(wanted)):
            tell(f"the engines were {line}", event="precision", level="warning")
        tell(
            f"ready after {server.start_s:.1f} s: {', '.join(server.flows)} at grpc {server.grpc_url}, "
            f"http http://{server.http_url}, metrics http://{server.metrics_url}/metrics; "
            f"health http://{server.health_url}/ready; Ctrl-C stops it",
            event="ready",
            seconds=round(server.start_s, 1),
        )
        Watcher(server).watch(threading.Event(), arguments.canary_interval_s)


def interruptible(tell: Report) -> None:
    """On the first signal leave through every `finally`; a second one must not cut the stopping short."""

    def interrupt(*_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        tell("stopping: requests in flight finish ...", event="stopping")
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)


def tell_line(line: str, **fields: object) -> None:
    print(f"scaphoid-serve: {line}", file=sys.stderr, flush=True)


def tell_json(line: str, level: str = "info", **fields: object) -> None:
    record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, **fields, "message": line}
    print(json.dumps(record), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
