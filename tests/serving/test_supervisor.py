"""The supervisor of the Triton server, without one: what it refuses to start, what it removes, what it logs. Beside it:
test_watch.py, test_endpoint.py."""

import io
import json
import os
import socket
import subprocess
import sys
import types

import pytest

from scaphoid.export.artefacts import ManifestError, write_manifest
from scaphoid.triton_repo.serve import main, tell_json
from scaphoid.triton_repo.supervisor import installation, leftovers
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.leftovers import FOLDER_PREFIX, MARKER
from scaphoid.triton_repo.supervisor.ports import free_ports
from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY_PREFIX, TritonProcess
from scaphoid.triton_repo.supervisor.request_log import parse, refused
from scaphoid.triton_repo.supervisor.server import running_server
from scaphoid.triton_repo.versioning import switch, versions


def test_a_repository_without_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.json"), running_server(tmp_path):
        pass


@pytest.fixture
def bare(tmp_path):
    """A repository whose manifest is in order; no server is started on it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    write_manifest(folder, {"flows": ["msfm"], "target": "cpu"})
    return folder


def test_a_flow_that_the_repository_lacks_is_named(bare):
    with pytest.raises(ManifestError, match="no flow kalm"), running_server(bare, ["kalm"]):
        pass


@pytest.mark.parametrize("name", ["http", "grpc", "metrics", "health"])
def test_a_port_in_use_is_named(bare, name):
    ports = dict(zip(("http", "grpc", "metrics"), free_ports("127.0.0.1"), strict=True))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports[name] = port = taken.getsockname()[1]
        health = ports.pop("health", None)
        told = rf"{name} port {port} on 127\.0\.0\.1 cannot be used \(Address already in use\): .* with --{name}-port"
        with pytest.raises(ServerError, match=told):
            running_server(bare, ports=tuple(ports.values()), health_port=health).__enter__()


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


def test_only_what_triton_calls_an_error_is_kept_and_only_of_requests_is_passed_on():
    """A library may print what it worked on, and nothing of a radiograph may come into a log."""
    told = []
    process = TritonProcess(["true"], {}, "unused-", told.append)
    lines = [
        "decoder: cannot read patient Doe^Jane",
        "I1122 01:02:03.5 7 started",
        'W1122 01:02:03.5 7 model.py:4] "' + refused("3f2a", "preprocess", "INVALID").replace('"', '\\"') + '"',
        'E1122 01:02:03.6 7 server.cc:2] "CudaDriverHelper has not been initialized."',
        'E1122 01:02:03.7 7 m.cc:4] "Failed to set config modification time: model_config_content_name_ is empty"',
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
    with versions.starting(tmp_path) as manifest:
        assert manifest["version"] == 1


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
        (["--grpc-port", "8000"], "grpc port 8000 is the http port, too: choose another one with --grpc-port"),
        (["--health-port", "8002"], "health port 8002 is the metrics port, too: .* --health-port"),
        (["--metrics-port", "70000"], "metrics port 70000: expected 1 to 65535"),
        (["--host", "no such host"], r"host 'no such host' \(.*\): expected an address of this machine"),
        (["--host", "2001:db8::1"], "host 2001:db8::1: .*container"),
    ],
)
def test_scaphoid_serve_names_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["scaphoid-serve", str(tmp_path), *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    if arguments:
        write_manifest(tmp_path, {"flows": ["msfm"], "target": "cpu"})
    with pytest.raises(SystemExit, match=f"^scaphoid-serve: .*{message}"):
        main()
