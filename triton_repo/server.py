"""Runs the real Triton server of the nvidia-pytriton wheel on an assembled repository, and watches it.

    with running_server(Path("repository")) as server:
        print(server.http_url, server.grpc_url)

A server is ready when a canary inference has answered for every flow. Triton's own readiness is not enough: after the
death of a backend's process it stays 200 while every request fails. Imports no torch.
"""

import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from scaphoid.export.artefacts import ManifestError, verify
from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.flows import FLOWS

CANARY = b"P5\n64 64\n255\n" + bytes((3 * x + 5 * y + x * y // 8) % 256 for y in range(64) for x in range(64))
START_TIMEOUT_S = 120.0
CANARY_TIMEOUT_S = 20.0
DRAIN_S = 10  # for requests in flight; a model whose process died would make Triton wait its default 30 s
STOP_TIMEOUT_S = 30.0  # Triton's own exit takes up to 7 s on an idle machine
UNAVAILABLE = 503  # a full queue
RESTRICTED = "model-repository,shared-memory,trace,logging"
KEY_HEADER = "scaphoid-key"
SHARED_MEMORY = Path("/dev/shm")
BACKENDS = Path(__file__).parent / "backends"
FOLDER_PREFIX = ".scaphoid-server-"  # then the supervisor's PID
MARKER = "made-by-scaphoid-server"
TRITON_ERROR = re.compile(r"E\d{4} |error: |.*error while loading shared libraries")
# Ends the server when the supervisor's thread that started it ends, however it ends (PR_SET_PDEATHSIG, SIGTERM).
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"

Report = Callable[[str], None]


class ServerError(Exception):
    """The server cannot be started or does not answer. One line: what is wrong and what to do."""


class CanaryLate(ServerError):
    """A flow did not answer its canary in time: it hangs, or it is busy."""


class Server:
    """One Triton server process. `ports` are HTTP, gRPC, metrics; `report` receives one line for each event worth
    telling."""

    def __init__(
        self, repository: Path, flows: Sequence[str], host: str, ports: tuple[int, int, int], report: Report
    ) -> None:
        self.repository, self.flows, self.host, self.ports, self.report = repository, tuple(flows), host, ports, report
        self.http_url, self.grpc_url, self.metrics_url = (f"{host}:{port}" for port in ports)
        self._key = secrets.token_urlsafe(24)
        self._prefix = f"scaphoid-server-{os.getpid()}-{ports[0]}-"
        self.start_s = math.nan
        self._folder: Path | None = None
        self._binary: Path | None = None
        self._process: subprocess.Popen | None = None
        self._log_start = 0  # in bytes: where the running process began to write

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Start the process and wait until every flow has answered, `start_s` seconds. Raises ServerError."""
        began = time.monotonic()
        for port in self.ports:
            check_port(self.host, port)
        remove_leftovers(Path(tempfile.gettempdir()))
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
        try:
            (self._folder / MARKER).touch()
            self._binary = install_backends(self._folder / "backends")
            self._launch()
            self._await_answers(began + START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - began

    def _launch(self) -> None:
        http, grpc, metrics = map(str, self.ports)
        command = [
            *(sys.executable, "-S", "-c", DIE_WITH_PARENT, str(self._binary)),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={self._folder / 'backends'}",
            *("--model-control-mode=explicit", *(f"--load-model={flow}" for flow in self.flows)),
            *(f"--exit-timeout-secs={DRAIN_S}", "--disable-auto-complete-config", "--allow-gpu-metrics=false"),
            *(f"--http-address={self.host}", f"--grpc-address={self.host}", f"--metrics-address={self.host}"),
            *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
            f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={self._key}",
            f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={self._key}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
        ]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{_site_packages() / 'nvidia_pytriton.libs'}",
        }
        with (self._folder / "server.log").open("ab") as log:  # its own session: Ctrl-C is for the supervisor
            self._log_start = log.tell()
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _await_answers(self, deadline: float) -> None:
        waiting = list(self.flows)
        while waiting:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with exit code {self._process.returncode}: {self._log_errors()}")
            if time.monotonic() > deadline:
                raise ServerError(f"no answer from {', '.join(waiting)} in time: {self._log_errors()}")
            try:
                if self._request("GET", f"/v2/models/{waiting[0]}/ready", timeout=2.0)[0] == 200:
                    self.canary(waiting[0])
                    waiting.pop(0)
                    continue
            except (OSError, CanaryLate):
                pass  # not listening yet, or slow to begin
            time.sleep(0.1)

    def _log_errors(self) -> str:
        """What Triton itself called an error since it was launched. Other lines are not passed on: what a library
        prints may quote the image that it worked on."""
        log = (self._folder / "server.log").read_bytes()[self._log_start :].decode(errors="replace")
        told = [line.strip() for line in log.splitlines() if TRITON_ERROR.match(line)]
        told = [line for line in told if "CudaDriverHelper" not in line]  # there is no GPU, and none is needed
        return " | ".join(told[-3:]) or "its log names no error"

    def _request(
        self, method: str, path: str, body: dict | None = None, timeout: float = CANARY_TIMEOUT_S
    ) -> tuple[int, dict]:
        """Status and decoded body. Raises OSError when the server cannot be reached or hangs."""
        connection = HTTPConnection(self.host, self.ports[0], timeout=timeout)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {KEY_HEADER: self._key, "Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content[:1] in (b"{", b"[") else {}
        except HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def canary(self, flow: str) -> None:
        """One inference through every stage of `flow`. Raises ServerError unless every output comes back finite,
        CanaryLate when nothing comes back in time or the queue is full."""
        outputs = FLOWS[flow].outputs
        encoded = {"name": ENCODED.name, "shape": [1, len(CANARY)], "datatype": ENCODED.dtype, "data": list(CANARY)}
        body = {"inputs": [encoded], "outputs": [{"name": name} for name in outputs]}
        try:
            status, answer = self._request("POST", f"/v2/models/{flow}/infer", body, CANARY_TIMEOUT_S)
        except TimeoutError:
            raise CanaryLate(f"flow {flow} did not answer within {CANARY_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise ServerError(f"flow {flow} does not answer: {error}") from None
        if status != 200:
            kind = CanaryLate if status == UNAVAILABLE else ServerError
            told = str(answer.get("error") or f"HTTP status {status}").splitlines()[0]
            told = told.removeprefix(f"in ensemble '{flow}', ")
            raise kind(f"flow {flow} answers with an error (Triton: {told})")
        values = {output["name"]: output["data"] for output in answer["outputs"]}
        if bad := [name for name in outputs if not values.get(name) or not all(map(math.isfinite, values[name]))]:
            raise ServerError(f"flow {flow} answers without a finite {', '.join(bad)}")

    def watch(self, stop: threading.Event, interval_s: float) -> None:
        """Send canaries every `interval_s` seconds until `stop` is set, and recover from what they find. A process that
        it starts anew ends with the thread that runs this."""
        answered = Counter()  # successes of each flow up to its previous check
        while not stop.wait(interval_s):
            try:
                for flow in self.flows:
                    answered[flow] = self._check(flow, answered[flow])
            except ServerError as error:
                self.report(f"{error}; recovering")
                began = time.monotonic()
                answered.clear()
                try:
                    self._recover()
                    self.report(f"recovered in {time.monotonic() - began:.1f} s")
                except (ServerError, OSError) as failure:
                    self.report(f"not recovered, trying again in {interval_s:g} s: {failure}")

    def _check(self, flow: str, answered: int) -> int:
        """The flow's count of successes now. A late canary is no fault while others are `answered`: it waits behind
        them in the queue. Raises ServerError."""
        try:
            self.canary(flow)
        except CanaryLate:
            if (now := self._successes(flow)) <= answered:
                raise
            return now
        return self._successes(flow)

    def _successes(self, flow: str) -> int:
        """Requests that `flow` has answered since the process started; 0 when the server does not tell."""
        try:
            versions = self._request("GET", f"/v2/models/{flow}/stats")[1].get("model_stats", [])
        except OSError:
            return 0
        return sum(version["inference_stats"]["success"]["count"] for version in versions)

    def _recover(self) -> None:
        """Start the process anew. Unloading is no way out: it waits for ever for the model whose process died."""
        self._end_process(grace_s=0)
        self._launch()
        self._await_answers(time.monotonic() + START_TIMEOUT_S)

    def stop(self) -> None:
        """End the server and everything it started, and remove what it left behind. Safe to call twice."""
        self._end_process()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _end_process(self, grace_s: float = STOP_TIMEOUT_S) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if grace_s:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # itself if it hangs, and backend processes that outlived it
        process.wait()
        for left in SHARED_MEMORY.glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)


@contextmanager
def running_server(
    repository: Path,
    flows: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    ports: tuple[int, int, int] | None = None,
    watch_interval_s: float | None = None,
    report: Report = lambda line: print(line, file=sys.stderr),
) -> Iterator[Server]:
    """A server that has answered for every one of `flows` (default: all in the repository), stopped on leaving.

    `ports` are HTTP, gRPC, metrics (default: free ones). With `watch_interval_s` a thread sends canaries that often and
    recovers the server when they fail. Raises ManifestError for a damaged repository, ServerError when it does not
    start.
    """
    available = verify(repository)["flows"]
    flows = tuple(flows or available)
    if missing := [flow for flow in flows if flow not in available]:
        raise ManifestError(
            f"{repository} has no flow {missing[0]}: it has {', '.join(available)}; export its weights too"
        )
    server = Server(repository, flows, host, ports or free_ports(host), report)
    stop, watcher = threading.Event(), None
    try:
        server.start()
        if watch_interval_s is not None:
            watcher = threading.Thread(target=server.watch, args=(stop, watch_interval_s), daemon=True)
            watcher.start()
        yield server
    finally:
        stop.set()
        if watcher is not None:
            watcher.join()
        server.stop()


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def install_backends(folder: Path) -> Path:
    """Lay out a backend directory: Triton's Python backend (copied: it does not start through links) and the stand-ins.
    Returns the server's binary. Raises ServerError when the wheel lacks it."""
    root = _site_packages() / "pytriton" / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    binary, stub = root / "bin" / "tritonserver", root / "python_backend_stubs" / python / "triton_python_backend_stub"
    for path, what in ((binary, "tritonserver"), (stub, f"Triton's backend process for Python {python}")):
        if not path.is_file():
            raise ServerError(f"{what} is not installed ({path} is missing): pip install nvidia-pytriton==0.7.0")
    shutil.copytree(BACKENDS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "python").mkdir()
    for path in (*(root / "backends" / "python").glob("*"), stub):
        if path.is_file():
            shutil.copy(path, folder / "python")
    return binary


def remove_leftovers(folder: Path) -> None:
    """Remove what this user's supervisors that were killed left in `folder`: marked folders whose PID is gone."""
    for left in folder.glob(f"{FOLDER_PREFIX}*"):
        pid = left.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        with suppress(OSError):  # another supervisor removes it at this moment
            ours = left.lstat().st_uid == os.getuid() and (left / MARKER).is_file()
            if ours and pid.isdigit() and not Path("/proc", pid).exists():
                shutil.rmtree(left, ignore_errors=True)


def check_port(host: str, port: int) -> None:
    """Raises ServerError when `port` cannot be bound."""
    if not 0 < port < 65536:
        raise ServerError(f"port {port}: expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(f"port {port} on {host} cannot be used ({error.strerror}): choose another one") from None


def free_ports(host: str) -> tuple[int, int, int]:
    """Three ports that were free a moment ago."""
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for probe in (a, b, c):
            probe.bind((host, 0))
        return tuple(probe.getsockname()[1] for probe in (a, b, c))
