"""Runs the real Triton server on an assembled repository; watch.py looks after it.

    with running_server(Path("repository")) as server:
        print(server.http_url, server.grpc_url)

A server is ready when a canary inference has answered for every flow. Triton's own readiness is not enough: after the
death of a backend's process it stays 200 while every request fails. Imports no torch.
"""

import math
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from scaphoid.export.artefacts import ManifestError
from scaphoid.triton_repo import keys
from scaphoid.triton_repo.certificates import server_options
from scaphoid.triton_repo.configs import CONFIG
from scaphoid.triton_repo.monitoring.drift import JournalReader
from scaphoid.triton_repo.monitoring.metrics import SupervisorCollector
from scaphoid.triton_repo.supervisor import canary as canaries
from scaphoid.triton_repo.supervisor import leftovers
from scaphoid.triton_repo.supervisor.api import ServerError, TritonApi
from scaphoid.triton_repo.supervisor.canary import CanaryLate
from scaphoid.triton_repo.supervisor.endpoint import Endpoint
from scaphoid.triton_repo.supervisor.health import STOPPING, Health
from scaphoid.triton_repo.supervisor.installation import Installation, in_container, installation
from scaphoid.triton_repo.supervisor.ports import address_of, bracketed, check_ports, free_ports, is_loopback
from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY_PREFIX, TritonProcess
from scaphoid.triton_repo.supervisor.watch import Watcher
from scaphoid.triton_repo.versioning import switch, versions

START_TIMEOUT_S = 120.0
DRAIN_S = 10  # for requests in flight; a model whose process died would make Triton wait its default 30 s

Report = Callable[..., None]


def print_line(line: str, **fields: object) -> None:
    """A `Report`: receives one line for each event worth telling, and its parts by name."""
    print(line, file=sys.stderr)


class Server:
    """One Triton server. `ports` are HTTP, gRPC, metrics; `report` is told what happens. With certificates in the
    folder `tls` (certificates.py) gRPC is encrypted, and HTTP, which Triton cannot encrypt, stays on loopback."""

    def __init__(
        self,
        repository: Path,
        flows: Sequence[str],
        host: str,
        ports: tuple[int, int, int],
        report: Report,
        tls: Path | None = None,
    ) -> None:
        self.repository, self.flows, self.host, self.ports, self.report = repository, tuple(flows), host, ports, report
        self._tls, self._http_host = tls, host if tls is None else "127.0.0.1"
        hosts = (self._http_host, host, host)
        self.places = dict(zip(("http", "grpc", "metrics"), zip(hosts, ports, strict=True), strict=True))
        self.http_url, self.grpc_url, self.metrics_url = (
            f"{bracketed(address)}:{port}" for address, port in self.places.values()
        )
        self.api = TritonApi(self._http_host, ports[0])
        self.health = Health(self.flows)
        self.process: TritonProcess | None = None
        self.folder: Path | None = None
        self.start_s = math.nan
        self.health_url = ""
        self._local_key = self.api.local_key = secrets.token_urlsafe(24)
        self._prefix = f"{SHARED_MEMORY_PREFIX}{os.getpid()}-{ports[0]}-"
        self.generation = 0  # of what is served: a start of the process or a switch begins another
        self.serving = threading.Event()

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> None:
        """Start the process and wait until every flow has answered, `start_s` seconds. Raises ServerError; `stop` it
        then, too."""
        began = time.monotonic()
        leftovers.remove(Path(tempfile.gettempdir()))
        self.folder = leftovers.make_folder()
        keys.leave_local_key(self.folder, self.ports[:2], self._local_key)
        found = installation(self.repository, self.folder)
        self.process = TritonProcess(self._command(found), found.environment, self._prefix, self._request_failed)
        self.launch(threading.Event())
        self.start_s = time.monotonic() - began
        self.health.serving()

    def _command(self, found: Installation) -> list[str]:
        http, grpc, metrics = map(str, self.ports)
        return [
            *(str(found.binary), *found.options, f"--model-repository={self.repository.resolve()}"),
            *("--model-control-mode=explicit", *(f"--load-model={flow}" for flow in self.flows)),
            *(f"--exit-timeout-secs={DRAIN_S}", "--disable-auto-complete-config"),
            f"--http-address={_listened(self._http_host)}",
            *(f"--grpc-address={bracketed(self.host)}", f"--metrics-address={_listened(self.host)}"),
            *(server_options(self._tls) if self._tls else ()),
            *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
            *keys.restrictions(self.api.key, self._local_key, guard_http=found.loopback_only),
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
        ]

    def _request_failed(self, event: dict) -> None:
        self.health.request_refused(event["model"], event["status"])
        if event["request_id"]:  # there is nothing to look for otherwise
            line = f"request {event['request_id']} refused by {event['model']}: {event['status']}"
            self.report(line, event="request_refused", **event)

    def launch(self, stop: threading.Event) -> None:
        """Start the process and wait until every flow has answered. Raises ServerError, also once `stop` is set."""
        deadline = time.monotonic() + START_TIMEOUT_S
        self.process.launch()
        waiting = list(self.flows)
        while waiting:
            self.health.beat()
            if (code := self.process.exit_code) is not None:
                raise ServerError(f"the server ended with exit code {code}: {self.process.errors}")
            if time.monotonic() > deadline:
                raise ServerError(f"no answer from {', '.join(waiting)} in time: {self.process.errors}")
            if stop.wait(0.1):
                raise ServerError("stopped while starting")
            try:
                if self.api.is_ready(waiting[0]):
                    self.canary(waiting[0])
                    waiting.pop(0)
            except (OSError, CanaryLate):
                pass  # not listening yet, or slow to begin
        self.process.note_backends()
        self.generation += 1
        self.serving.set()

    def canary(self, flow: str) -> None:
        """One inference through every stage of `flow`. Raises ServerError, CanaryLate when nothing comes back."""
        began = time.monotonic()
        try:
            canaries.canary(self.api, flow)
        except CanaryLate:
            raise
        except ServerError as error:
            self.health.failed(flow, str(error))
            raise
        self.health.answered(flow, time.monotonic() - began)

    def switch(self, version: int) -> dict:
        """Serve `version` of the repository in place of the present one, with no request lost. Raises ServerError; the
        present one is served further then."""
        if not self.serving.is_set():
            raise ServerError("the server is not serving at present: see its log, and try again")
        served = switch.switch(self.api, self.repository, self.flows, version, self.report)
        self.generation += 1
        return served

    def drain(self) -> None:
        """Unload the flows, and wait until the requests in flight have ended, `DRAIN_S` at most: their stages stay. On
        SIGTERM Triton stops the stages at once, and a request on its way from one to the next is lost."""
        self.health.not_serving(STOPPING)
        if not self.serving.is_set():
            return
        self.serving.clear()
        with suppress(ServerError):  # the process is gone, or hangs
            for flow in self.flows:
                self.api.unload(flow)
            for version in {version for flow, version in self.api.versions() if flow in self.flows}:
                self.api.await_unloaded(self.flows, int(version), DRAIN_S)

    def stop(self) -> None:
        """End the server and everything it started, and remove what it left behind. Requests in flight finish first.
        Safe to call twice."""
        self.drain()
        if self.process is not None:
            self.process.end()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def _listened(address: str) -> str:
    """As Triton's HTTP servers want an address; one of IPv6 in brackets, as the vendor writes it, they take for all."""
    return f"ipv6:{address}" if ":" in address else address


def check_host(host: str) -> None:
    """Raises ServerError for one that the Triton on this machine must not listen on."""
    if not in_container() and not is_loopback(host):
        raise ServerError(
            f"host {host}: the wheel's Triton is older than its security fixes and listens on loopback "
            "alone; what other machines reach is the vendor's container (triton_repo/deploy)"
        )


def _flows(repository: Path, manifest: dict, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Those to serve. Raises ManifestError."""
    if "target" not in manifest and not any(repository.glob(f"*/{CONFIG}")):  # the first is newer
        raise ManifestError(
            f"{repository} holds artefacts, not a model repository: assemble it first, with "
            f"python -m scaphoid.triton_repo.assemble {repository} REPOSITORY, and serve that"
        )
    available = manifest["flows"]
    flows = tuple(wanted or available)
    if missing := [flow for flow in flows if flow not in available]:
        raise ManifestError(
            f"{repository} has no flow {missing[0]}: it has {', '.join(available)}; export its weights too"
        )
    return flows


@contextmanager
def running_server(
    repository: Path,
    flows: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    ports: tuple[int, int, int] | None = None,
    watch_interval_s: float | None = None,
    report: Report = print_line,
    health_port: int | None = None,
    journals: Sequence[Path] = (),
    tls: Path | None = None,
) -> Iterator[Server]:
    """A server that has answered for every one of `flows` (default: all in the repository), stopped on leaving.

    `ports` are HTTP, gRPC, metrics (default: free ones). With `watch_interval_s` a thread sends canaries that often and
    recovers the server when they fail. With `health_port` (0: a free one) there is the endpoint of endpoint.py, whose
    metrics tell of the predictions in `journals`, too. `tls` is a folder of certificates for gRPC.

    Nobody changes the repository from the time when it is verified until the models are loaded, or replaces it as long
    as the server runs. Raises ManifestError for a damaged repository, and for one that another process holds too long,
    CertificateError for a certificate that is missing, ServerError when the server does not start.
    """
    stop = threading.Event()
    with ExitStack() as stack:  # left in the reverse order
        with versions.starting(repository) as manifest:
            stack.enter_context(versions.serving(repository))
            flows, host = _flows(repository, manifest, flows), address_of(host)
            check_host(host)
            if tls is not None:
                server_options(tls)
            server = Server(repository, flows, host, ports or free_ports(host), report, tls)
            check_ports(server.places | ({"health": (host, health_port)} if health_port else {}))
            endpoint = None
            if health_port is not None:
                collector = SupervisorCollector(server.health, server.api, repository, JournalReader(journals))
                endpoint = Endpoint(host, health_port, server.health, collector.text, server.switch)
                stack.callback(endpoint.close)
                server.health_url = endpoint.url
            stack.callback(server.stop)
            server.start()
            if endpoint is not None:
                endpoint.write_control(server.folder, repository)
        if watch_interval_s is not None:
            watcher = threading.Thread(target=Watcher(server).watch, args=(stop, watch_interval_s), daemon=True)
            watcher.start()
            stack.callback(watcher.join)
        stack.callback(stop.set)
        stack.callback(server.drain)  # before its watcher ends, and with it the process that it may have started
        yield server
