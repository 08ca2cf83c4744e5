"""The supervisor's own HTTP endpoint: health, metrics, and switching for the holder of the key."""

import json
import socket
import struct
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from scaphoid.export.artefacts import ManifestError
from scaphoid.triton_repo.keys import KEY_HEADER
from scaphoid.triton_repo.supervisor import endpoint, health
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.endpoint import Endpoint
from scaphoid.triton_repo.supervisor.health import Health


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


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_it_listens_on_ipv6_too():
    listening = Endpoint("::1", 0, Health(("kalm",)), lambda: b"", lambda version: {})
    try:
        assert listening.url.startswith("[::1]:")
        with urllib.request.urlopen(f"http://{listening.url}/live", timeout=10) as answer:
            assert answer.status == 200
    finally:
        listening.close()


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
