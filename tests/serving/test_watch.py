"""When the supervisor finds a fault of its server, and how it recovers, without Triton."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scaphoid.export.artefacts import write_manifest
from scaphoid.export.lock import InUse, locked
from scaphoid.triton_repo.supervisor import canary, watch
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.canary import CanaryLate
from scaphoid.triton_repo.supervisor.process import TritonProcess
from scaphoid.triton_repo.supervisor.server import Server
from scaphoid.triton_repo.supervisor.watch import LONGEST_WAIT_S, Backoff, Fault, Watcher


def quiet(line: str, **fields: object) -> None:
    pass


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
    write_manifest(tmp_path, {"flows": ["kalm"]})
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


def test_it_starts_again_only_from_a_whole_repository_that_nobody_changes(tmp_path, monkeypatch):
    repository, told, launched, waits = tmp_path / "repository", [], [], []
    repository.mkdir()
    write_manifest(repository, {"flows": ["kalm"]})
    server = Server(repository, ["kalm"], "127.0.0.1", (1, 2, 3), quiet)
    server.process = types.SimpleNamespace(end=lambda grace_s: None)
    watcher, changed = Watcher(server), contextlib.ExitStack()
    changed.enter_context(locked(repository, alone=True, wait_s=0))
    (repository / "half").touch()

    def launch(stop):
        with pytest.raises(InUse), locked(repository, alone=True, wait_s=0):
            pass
        launched.append(True)

    def wait(seconds, stop):
        waits.append(seconds)
        (repository / "half").unlink()

    def report(line, event, **fields):
        told.append(line)
        if event == "in_use" and len(told) == 4:
            changed.close()

    server.report = report
    monkeypatch.setattr(watch, "LOCK_WAIT_S", 0)
    monkeypatch.setattr(server, "launch", launch)
    monkeypatch.setattr(watcher, "_wait", wait)
    watcher.recover(Fault("server_died", "gone"), threading.Event())
    *in_use, damaged = (line for line in told if line.startswith("not recovered"))
    assert len(in_use) == 3
    assert all(f"repository is in use by process {os.getpid()}" in line for line in in_use)
    assert "half is not in the manifest" in damaged
    assert (server.health.faults["start_failed"], waits, launched) == (1, [1], [True])  # waiting is no failure


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
