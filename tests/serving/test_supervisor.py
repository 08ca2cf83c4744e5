"""The supervisor of the Triton server, without one: what it refuses to start, what it removes, when it restarts."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scaphoid.export.artefacts import ManifestError, verify
from scaphoid.triton_repo import server as server_module
from scaphoid.triton_repo.serve import main
from scaphoid.triton_repo.server import FOLDER_PREFIX, MARKER, CanaryLate, Server, ServerError, running_server


def test_a_repository_without_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.json"), running_server(tmp_path):
        pass


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A repository whose manifest is in order; no server is started on it."""
    monkeypatch.setattr(server_module, "verify", lambda folder: {"flows": ["msfm"]})
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


@pytest.mark.parametrize("missing", ["tritonserver", "backend process for Python"])
def test_a_missing_binary_is_named(bare, tmp_path, monkeypatch, missing):
    if missing != "tritonserver":
        (tmp_path / "pytriton/tritonserver/bin").mkdir(parents=True)
        (tmp_path / "pytriton/tritonserver/bin/tritonserver").touch()
    monkeypatch.setattr(server_module, "_site_packages", lambda: tmp_path)
    with pytest.raises(ServerError, match=missing), running_server(bare):
        pass


def test_folders_of_killed_supervisors_are_removed(tmp_path):
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    dead, alive = f"{FOLDER_PREFIX}{child.pid}-x", f"{FOLDER_PREFIX}{os.getpid()}-x"
    unmarked = {f"{FOLDER_PREFIX}{child.pid}-results", f"scaphoid-{child.pid}-results"}
    for name in {dead, alive} | unmarked:
        (tmp_path / name / "backends").mkdir(parents=True)
    for name in (dead, alive):
        (tmp_path / name / MARKER).touch()
    server_module.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive} | unmarked


@pytest.mark.parametrize(
    ("status", "growth", "restarted"),
    [
        (None, 1, False),  # no answer to the canary, but others are answered: busy
        (503, 1, False),  # the queue is full
        (None, 0, True),  # it hangs
        (500, 1, True),  # a backend's process is dead
    ],
)
def test_a_late_canary_restarts_only_a_server_that_answers_nobody(tmp_path, monkeypatch, status, growth, restarted):
    stop, recovered, checks = threading.Event(), [], itertools.count(1)

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

    monkeypatch.setattr(server_module, "CANARY_TIMEOUT_S", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Triton) as stand_in:
        threading.Thread(target=stand_in.serve_forever, daemon=True).start()
        server = Server(tmp_path, ["kalm"], "127.0.0.1", (stand_in.server_port, 1, 2), lambda line: None)
        monkeypatch.setattr(server, "_recover", lambda: (recovered.append(True), stop.set()))
        server.watch(stop, interval_s=0.01)
        stand_in.shutdown()
    assert bool(recovered) == restarted


def test_a_late_canary_while_starting_is_waited_for(tmp_path, monkeypatch):
    server, canaries = Server(tmp_path, ["kalm"], "127.0.0.1", (1, 2, 3), print), []

    def canary(flow):
        canaries.append(flow)
        if len(canaries) == 1:
            raise CanaryLate("late")

    monkeypatch.setattr(server, "_process", types.SimpleNamespace(poll=lambda: None))
    monkeypatch.setattr(server, "_request", lambda *_, **__: (200, {}))
    monkeypatch.setattr(server, "canary", canary)
    server._await_answers(time.monotonic() + 30)
    assert canaries == ["kalm", "kalm"]


def test_verify_is_what_guards_the_start():
    assert server_module.verify is verify


def test_only_what_triton_calls_an_error_is_told_and_only_of_this_process(tmp_path):
    """A library may print what it worked on, and nothing of a radiograph may come into a log."""
    server = Server(tmp_path, ["kalm"], "127.0.0.1", (1, 2, 3), print)
    server._folder = tmp_path
    before = "E1122 01:02:03.4 7 model.cc:1] of the process before\n"
    (tmp_path / "server.log").write_text(before + "decoder: cannot read patient Doe^Jane\nI1122 01:02:03.5 7 started\n")
    server._log_start = len(before)
    assert server._log_errors() == "its log names no error"
    with (tmp_path / "server.log").open("a") as log:
        log.write("E1122 01:02:04.5 7 model.cc:9] failed to load 'kalm'\nEmbedded: Doe^Jane\n")
    assert server._log_errors() == "E1122 01:02:04.5 7 model.cc:9] failed to load 'kalm'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flows", "kalm,mfsm"], "unknown flow mfsm: expected one of msfm, msfm_fma, kalm"),
        (["--canary-interval-s", "0"], "--canary-interval-s: expected more than 0 s, got 0"),
        ([], r"has no manifest\.json"),
    ],
)
def test_scaphoid_serve_names_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["scaphoid-serve", str(tmp_path), *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit, match=f"^scaphoid-serve: .*{message}"):
        main()
