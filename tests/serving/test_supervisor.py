"""The supervisor of the Triton server, without one: what it refuses to start, what it removes, when it restarts."""

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scaphoid.export.artefacts import ManifestError, write_manifest
from scaphoid.triton_repo.keys import KEY_HEADER
from scaphoid.triton_repo.serve import main, tell_json
from scaphoid.triton_repo.supervisor import canary, endpoint, health, installation, leftovers, watch
from scaphoid.triton_repo.supervisor import server as server_module
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.canary import CanaryLate
from scaphoid.triton_repo.supervisor.endpoint import Endpoint
from scaphoid.triton_repo.supervisor.health import Health
from scaphoid.triton_repo.supervisor.leftovers import FOLDER_PREFIX, MARKER
from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY_PREFIX, TritonProcess
from scaphoid.triton_repo.supervisor.request_log import parse, refused
from scaphoid.triton_repo.supervisor.server import Server, running_server
from scaphoid.triton_repo.supervisor.watch import LONGEST_WAIT_S, Backoff, Fault, Watcher
from scaphoid.triton_repo.versioning import switch, versions


def quiet(line: str, **fields: object) -> None:
    pass


def test_a_repository_without_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.json"), running_server(tmp_path):
        pass


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A repository whose manifest is in order; no server is started on it."""
    monkeypatch.setattr(server_module, "verified", lambda folder: {"flows": ["msfm"], "target": "cpu"})
    return tmp_path


def test_a_flow_that_the_repository_lacks_is_named(bare):
    with pytest.raises(ManifestError, match="no flow kalm"), running_server(bare, ["kalm"]):
        pass


def test_a_port_in_use_is_named(bare):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port}"), running_server(bare, ports=(port, port + 1, port + 2)):
            pass


def test_the_wheels_old_server_is_not_put_on_a_network(bare):
    with pytest.raises(ServerError, match=r"host 0\.0\.0\.0: .*container"), running_server(bare, host="0.0.0.0"):
        pass


def test_a_host_that_is_not_this_machines_is_refused_for_what_it_is(bare):
    with pytest.raises(ServerError, match=r"host 8\.8\.8\.8: .*container"):
        running_server(bare, host="8.8.8.8", health_port=8003).__enter__()


def test_artefacts_are_to_be_assembled_first(tmp_path):
    write_manifest(tmp_path, {"flows": ["msfm"]})
    with pytest.raises(ManifestError, match=r"assemble it first, with python -m"), running_server(tmp_path):
        pass


@pytest.mark.parametrize("missing", ["tritonserver", "backend process for Python"])
def test_a_missing_binary_is_named(bare, tmp_path, monkeypatch, missing):
    if missing != "tritonserver":
        (tmp_path / "pytriton/tritonserver/bin").mkdir(parents=True)
        (tmp_path / "pytriton/tritonserver/bin/tritonserver").touch()
    monkeypatch.setattr(installation, "_site_packages", lambda: tmp_path)
    with pytest.raises(ServerError, match=missing), running_server(bare):
        pass


def test_in_the_vendors_container_its_own_triton_runs_with_the_repositorys_flags(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    (tmp_path / "server.flags").write_text("--model-config-name=bounded\n--cuda-memory-pool-byte-size=0:1048576\n")
    monkeypatch.setattr(installation, "CONTAINER", tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib/vendor")
    monkeypatch.delenv(installation.OPS, raising=False)
    found = installation.installation(tmp_path, tmp_path / "unused")
    assert (found.binary, found.loopback_only) == (tmp_path / "bin" / "tritonserver", False)
    assert found.options == ("--model-config-name=bounded", "--cuda-memory-pool-byte-size=0:1048576")
    assert found.environment["LD_PRELOAD"] == str(tmp_path / "libscaphoid_ops.so")
    assert found.environment["LD_LIBRARY_PATH"] == f"{tmp_path}/backends/pytorch:/usr/lib/vendor"
    monkeypatch.setenv(installation.OPS, "/opt/ops.so")
    assert installation.installation(tmp_path, tmp_path).environment["LD_PRELOAD"] == "/opt/ops.so"


def test_what_killed_supervisors_left_is_removed(tmp_path):
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    dead, alive = f"{FOLDER_PREFIX}{child.pid}-x", f"{FOLDER_PREFIX}{os.getpid()}-x"
    unmarked = {f"{FOLDER_PREFIX}{child.pid}-results", f"scaphoid-{child.pid}-results"}
    for name in {dead, alive} | unmarked:
        (tmp_path / name / "backends").mkdir(parents=True)
    for name in (dead, alive):
        (tmp_path / name / MARKER).touch()
    memory = tmp_path / "shm"
    memory.mkdir()
    kept = {f"{SHARED_MEMORY_PREFIX}{os.getpid()}-1-a", "another-1-a"}
    for name in {f"{SHARED_MEMORY_PREFIX}{child.pid}-1-a"} | kept:
        (memory / name).touch()
    leftovers.remove(tmp_path, memory)
    assert {path.name for path in tmp_path.iterdir()} == {alive, "shm"} | unmarked
    assert {path.name for path in memory.iterdir()} == kept


def test_a_pid_that_was_given_to_another_process_is_another_supervisor(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(tmp_path))
    folder = leftovers.make_folder()
    assert list(leftovers.folders(tmp_path)) == [(folder, True)]
    (folder / MARKER).write_text("1")  # what had this PID before began just after the machine
    assert list(leftovers.folders(tmp_path)) == [(folder, False)]
    memory = tmp_path / f"{SHARED_MEMORY_PREFIX}{os.getpid()}-8000-a"
    memory.touch()
    other = leftovers.make_folder()  # of this process: whose the memory is cannot be told
    leftovers.remove(tmp_path, tmp_path)
    assert (folder.exists(), other.exists(), memory.exists()) == (False, True, True)
    (other / MARKER).write_text("1")
    leftovers.remove(tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "growth", "kind"),
    [
        (None, 1, None),  # no answer to the canary, but others are answered: busy
        (503, 1, None),  # the queue is full
        (None, 0, "canary_late"),  # it hangs
        (500, 1, "canary_failed"),  # a backend's process is dead
    ],
)
def test_a_late_canary_is_a_fault_only_of_a_server_that_answers_nobody(tmp_path, monkeypatch, status, growth, kind):
    stop, checks = threading.Event(), itertools.count(1)

    class Triton(BaseHTTPRequestHandler):
        def do_GET(self):
            check = next(checks)
            self.answer(200, {"model_stats": [{"inference_stats": {"success": {"count": 7 + growth * check}}}]})
            if check == 4:
                stop.set()

        def do_POST(self):
            if status is None:
                stop.wait(10)
            self.answer(status or 200, {"error": "no"})

        def answer(self, status, content):
            body = json.dumps(content).encode()
            with contextlib.suppress(OSError):  # the canary is gone
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(canary, "TIMEOUT_S", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Triton) as stand_in:
        threading.Thread(target=stand_in.serve_forever, daemon=True).start()
        server = Server(tmp_path, ["kalm"], "127.0.0.1", (stand_in.server_port, 1, 2), quiet)
        server.process = types.SimpleNamespace(exit_code=None, dead_backend=lambda: None)
        server.serving.set()
        server.health.serving()
        server.health.answered("kalm", 0.1)
        watcher = Watcher(server)
        threading.Timer(3, stop.set).start()  # a faulty server is asked once for its counts, or not at all
        monkeypatch.setattr(watcher, "recover", lambda fault, stop: (found.append(fault), stop.set()))
        monkeypatch.setattr(watch, "TICK_S", 0.01)
        found: list[Fault] = []
        watcher.watch(stop, interval_s=0.01)
        stand_in.shutdown()
    assert [fault.kind for fault in found] == ([kind] if kind else [])
    assert bool(server.health.why_not()) == bool(kind)


def test_a_late_canary_while_starting_is_waited_for(tmp_path, monkeypatch):
    server, canaries = Server(tmp_path, ["kalm"], "127.0.0.1", (1, 2, 3), quiet), []

    def late_once(flow):
        canaries.append(flow)
        if len(canaries) == 1:
            raise CanaryLate("late")

    server.process = types.SimpleNamespace(launch=lambda: None, exit_code=None, note_backends=lambda: None)
    monkeypatch.setattr(server.api, "is_ready", lambda flow: True)
    monkeypatch.setattr(server, "canary", late_once)
    server.launch(threading.Event())
    assert canaries == ["kalm", "kalm"]


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """A server whose process starts at the third attempt, its watcher, and the waits between the attempts."""
    server, starts, waits = Server(tmp_path, ["kalm"], "127.0.0.1", (1, 2, 3), quiet), itertools.count(1), []
    server.process = types.SimpleNamespace(end=lambda grace_s: None)

    def launch(stop):
        if next(starts) % 3:
            raise ServerError("exit code 1")

    monkeypatch.setattr(server, "launch", launch)
    watcher = Watcher(server)
    monkeypatch.setattr(watcher, "_wait", lambda seconds, stop: waits.append(seconds))
    return server, watcher, waits


def test_recovery_waits_longer_each_time_that_it_fails(failing):
    server, watcher, waits = failing
    watcher.recover(Fault("server_died", "gone"), threading.Event())
    assert waits == [1, 2]
    assert (server.health.faults, server.health.restarts) == ({"server_died": 1, "start_failed": 2}, 1)
    watcher.recover(Fault("backend_died", "gone again at once"), threading.Event())
    assert waits == [1, 2, 4, 8, 16]


def test_waiting_is_bounded_and_forgotten_after_steady_service():
    backoff = Backoff(ready_since=0)
    backoff.fault(now=10)
    delays = [backoff.delay() for _ in range(20)]
    assert delays[:4] == [0, 1, 2, 4]
    assert max(delays) == LONGEST_WAIT_S
    backoff.fault(now=1e6)
    assert backoff.delay() == 0


def zombie() -> subprocess.Popen:
    """A process with two children; it waits for neither."""
    code = (
        "import subprocess, sys, time; children = [subprocess.Popen(['sleep', '60']) for _ in range(2)];"
        "print(*(child.pid for child in children), flush=True); time.sleep(60)"
    )
    return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_dead_backend_is_seen_by_its_process():
    process = TritonProcess(["true"], {}, "unused-")
    with zombie() as process._running:
        children = [int(pid) for pid in process._running.stdout.readline().split()]
        try:
            assert [process.dead_backend(), process.dead_backend()] == [None, None]
            os.kill(children[0], signal.SIGKILL)
            deadline = time.monotonic() + 10
            while not (dead := process.dead_backend()) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert dead
        finally:
            os.kill(children[1], signal.SIGKILL)
            process._running.kill()


def test_only_what_triton_calls_an_error_is_kept_and_only_of_requests_is_passed_on():
    """A library may print what it worked on, and nothing of a radiograph may come into a log."""
    told = []
    process = TritonProcess(["true"], {}, "unused-", told.append)
    lines = [
        "decoder: cannot read patient Doe^Jane",
        "I1122 01:02:03.5 7 started",
        'W1122 01:02:03.5 7 model.py:4] "' + refused("3f2a", "preprocess", "INVALID").replace('"', '\\"') + '"',
        'E1122 01:02:03.6 7 server.cc:2] "CudaDriverHelper has not been initialized."',
    ]
    process.listen(io.BytesIO("\n".join(lines).encode()))
    assert process.errors == "its log names no error"
    assert told == [{"request_id": "3f2a", "model": "preprocess", "status": "INVALID"}]
    process.listen(io.BytesIO(b"E1122 01:02:04.5 7 model.cc:9] failed to load 'kalm'\nEmbedded: Doe^Jane\n"))
    assert process.errors == "E1122 01:02:04.5 7 model.cc:9] failed to load 'kalm'"


@pytest.mark.parametrize("request_id", ["a\nb", '"}', "x" * 65, "Doe^Jane"])
def test_a_client_cannot_write_lines_of_the_log(request_id):
    line = refused(request_id, "preprocess", "INVALID_ARGUMENT")
    assert "\n" not in line
    assert parse('W1122 x 7 model.py:4] "' + line.replace('"', '\\"') + '"')["request_id"] == ""


@pytest.fixture
def status():
    """A server's health behind an endpoint, and GET of it: status and body."""
    found, switched = Health(("msfm", "kalm")), []

    def switch(version):
        switched.append(version)
        if version == 7:
            raise ServerError("there is no version 7")
        if version == 8:
            raise RuntimeError("a fault")
        return {"version": version}

    listening = Endpoint("127.0.0.1", 0, found, lambda: b"scaphoid_ready 1\n", switch)

    def get(path, body=None, **headers):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{listening.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    yield types.SimpleNamespace(health=found, get=get, endpoint=listening, switched=switched)
    listening.close()


def test_ready_is_the_last_canary_of_every_flow(status, monkeypatch):
    def ready():
        code, body = status.get("/ready")
        return code, json.loads(body).get("reason", "")

    assert ready() == (503, "starting")
    status.health.serving()
    status.health.answered("msfm", 0.1)
    assert ready() == (503, "flow kalm has not answered its canary yet")
    status.health.answered("kalm", 0.1)
    assert ready() == (200, "")
    status.health.failed("kalm", "flow kalm answers with an error")
    assert ready() == (503, "flow kalm answers with an error")
    status.health.answered("kalm", 0.1)
    status.health.not_serving("the backend process of encoder died", "backend_died")
    assert ready() == (503, "the backend process of encoder died")
    status.health.recovered(9.5)
    assert ready() == (200, "")
    status.health.expect_canaries(1e-9, 0)
    assert ready()[0] == 503
    assert status.get("/live")[0] == 200
    monkeypatch.setattr(health, "BEAT_TIMEOUT_S", 0)
    assert status.get("/live")[0] == 503
    assert status.get("/metrics") == (200, b"scaphoid_ready 1\n")
    assert status.get("/etc/passwd")[0] == 404


def test_versions_are_switched_for_the_holder_of_the_key_alone(status, tmp_path):
    status.endpoint.write_control(tmp_path, tmp_path)
    assert (tmp_path / endpoint.CONTROL).stat().st_mode & 0o777 == 0o600
    key = json.loads((tmp_path / endpoint.CONTROL).read_text())["key"]
    assert status.get(endpoint.SWITCH, {"version": 2})[0] == 403
    assert status.get(endpoint.SWITCH, {"version": 2}, **{KEY_HEADER: "x"})[0] == 403
    assert not status.switched
    assert status.get(endpoint.SWITCH, {"version": 2}, **{KEY_HEADER: key}) == (200, b'{"version": 2}\n')
    code, body = status.get(endpoint.SWITCH, {"version": 7}, **{KEY_HEADER: key})
    assert (code, json.loads(body)) == (409, {"error": "there is no version 7"})
    for body in ({}, {"version": "2"}, {"version": True}, [2], {"version": 2, "x": "y" * 5000}):
        assert status.get(endpoint.SWITCH, body, **{KEY_HEADER: key})[0] == 400
    assert status.switched == [2, 7]


def test_a_fault_of_the_endpoint_is_answered_in_one_line_and_printed_nowhere(status, monkeypatch, capfd):
    key = status.endpoint.key
    code, body = status.get(endpoint.SWITCH, {"version": 8}, **{KEY_HEADER: key})
    assert (code, json.loads(body)) == (500, {"error": "RuntimeError: a fault"})
    address = status.endpoint.url.split(":")
    with socket.create_connection(address, 5) as client:  # latin-1, which hmac takes no text of
        client.sendall(f"POST {endpoint.SWITCH} HTTP/1.0\r\n{KEY_HEADER}: \xe9\r\n\r\n".encode("latin-1"))
        assert b" 403 " in client.makefile("rb").readline()
    with socket.create_connection(address, 5) as client:  # leaves with a reset, before its answer
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert status.get("/metrics")[0] == 200

    def broken():
        raise ManifestError("no manifest\nhere")

    other = Endpoint("127.0.0.1", 0, status.health, broken, lambda version: {})
    try:
        with pytest.raises(urllib.error.HTTPError, match="500") as caught:
            urllib.request.urlopen(f"http://{other.url}/metrics", timeout=10)
        assert caught.value.read() == b'{"error": "ManifestError: no manifest\\nhere"}\n'
    finally:
        other.close()
    assert capfd.readouterr() == ("", "")


def test_requests_beyond_the_most_are_told_at_once(monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_REQUESTS", 1)
    listening = Endpoint("127.0.0.1", 0, Health(("kalm",)), lambda: b"", lambda version: {})
    try:
        with socket.create_connection(listening.url.split(":"), 5) as first:
            with socket.create_connection(listening.url.split(":"), 5) as second:
                assert b" 503 " in second.makefile("rb").readline()
            first.sendall(b"GET /live HTTP/1.0\r\n\r\n")
            assert first.makefile("rb").readline().startswith(b"HTTP/1.0 200")
    finally:
        listening.close()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(("fault", "raised"), [(Interrupted("x"), Interrupted), (ServerError("x"), ServerError)])
def test_a_switch_that_fails_in_any_way_loads_again_what_was_served(tmp_path, monkeypatch, fault, raised):
    versions.begin(tmp_path, {"flows": ["kalm"], "weights": [{"sha256": "a"}]})
    versions.number(tmp_path, 2, {"flows": ["kalm"], "weights": [{"sha256": "b"}]})
    versions.finish(tmp_path, 1, [1, 2])
    loaded, told = [], []

    def fail(*_):
        raise fault

    monkeypatch.setattr(switch, "_switch", fail)
    api = types.SimpleNamespace(load=loaded.append)
    with pytest.raises(raised, match="x"):
        switch.switch(api, tmp_path, ["kalm"], 2, lambda line, **fields: told.append(line))
    assert loaded[0] == "kalm"
    assert "local_encoder" in loaded
    assert told == ["version 2 is not served: x; version 1 is, further"]
    assert versions.verified(tmp_path)["version"] == 1


def test_json_logs_name_their_parts(capsys):
    tell_json("recovered in 9.5 s", event="recovered", seconds=9.5)
    record = json.loads(capsys.readouterr().err)
    assert record.pop("time").endswith("+00:00")
    assert record == {"level": "info", "event": "recovered", "seconds": 9.5, "message": "recovered in 9.5 s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flows", "kalm,mfsm"], "unknown flow mfsm: expected one of msfm, msfm_fma, kalm"),
        (["--canary-interval-s", "0"], "--canary-interval-s: expected more than 0 s, got 0"),
        ([], r"has no manifest\.json"),
        (["--tls", "nowhere"], r"nowhere/server\.pem is missing"),
    ],
)
def test_scaphoid_serve_names_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["scaphoid-serve", str(tmp_path), *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    if "--tls" in arguments:
        write_manifest(tmp_path, {"flows": ["msfm"], "target": "cpu"})
    with pytest.raises(SystemExit, match=f"^scaphoid-serve: .*{message}"):
        main()
