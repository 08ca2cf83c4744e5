"""The client library and servers that are gone, fail, come back, or are none."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import (
    Client,
    DeadlineExceeded,
    Result,
    ServerUnavailable,
)
from scaphoid.triton_repo.requests.retry import Servers
from scaphoid.triton_repo.requests.servers import LONGEST_REST_S, Server

IMAGE = b"bytes of an image"
STATUS = grpc.StatusCode


@pytest.fixture
def second_server(fake_server):
    server = type(fake_server)()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def black_hole():
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


async def never(*_):
    await asyncio.Event().wait()


TRITON = {
    "/v2/health/ready": (200, b""),
    "/v2/health/live": (200, b""),
    "/v2/models/msfm": (200, json.dumps({"versions": ["1"], "outputs": [{"name": n} for n in FLOWS["msfm"].outputs]})),
    "/v2/models/msfm/versions/1": (200, json.dumps({"versions": ["1"], "outputs": []})),
    "/v2/models/msfm/config": (200, "{}"),
    "/v2/models/msfm/versions/1/config": (200, json.dumps({"parameters": {"weights": {"string_value": "77"}}})),
}


@pytest.fixture
def http_server():
    """http_server(answers): the URL of a server that gives these, status and body by path, and else 404."""
    servers = []

    def start(answers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = answers.get(self.path, (404, b""))
                body = body.encode() if isinstance(body, str) else body
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_no_server_says_what_to_do(fake_server, ask):
    fake_server.stop()
    with pytest.raises(ServerUnavailable, match=f"{fake_server.url}.*scaphoid-serve.*HOST:PORT"):
        ask(fake_server)
    with pytest.raises(ServerUnavailable, match=r"http://.*scaphoid-serve"), Client(f"http://{fake_server.url}"):
        pass


def test_server_not_ready(fake_server, ask):
    fake_server.ready = False
    with pytest.raises(ServerUnavailable, match="not ready"):
        ask(fake_server)


def test_flow_or_output_not_served(fake_server, ask):
    del fake_server.flows["kalm"]
    with pytest.raises(ServerUnavailable, match="does not serve flow kalm"):
        ask(fake_server, flow="kalm")
    fake_server.flows["msfm"] = ("probability",)
    with pytest.raises(ServerUnavailable, match="has no output box"):
        ask(fake_server)


def test_server_gone_in_the_middle(fake_server, slow, ask):
    fake_server.behave = lambda encoded, attempt: (fake_server.stop(), slow(0.2)(encoded, attempt))
    with pytest.raises(ServerUnavailable, match="no server is left: no Triton server answers"):
        ask(fake_server, timeout_s=1.0)


def test_what_is_left_of_many_images_is_not_waited_for_once_the_server_is_gone(fake_server, slow, pixels):
    def stop_after_three(encoded, attempt):
        if len(fake_server.sent) > 3:
            fake_server.stop()
            slow(0.2)(encoded, attempt)

    fake_server.behave = stop_after_three
    began = time.monotonic()
    with Client(fake_server.url, timeout_s=1.0, in_flight=1) as client:
        results = client.predict_all(map(pixels, range(30)))
    assert [isinstance(result, Result) for result in results] == [True] * 3 + [False] * 27
    assert all(isinstance(result, ServerUnavailable) for result in results[3:])
    assert time.monotonic() - began < 10


def test_a_restarted_server_is_met_again(fake_server, slow):
    port = int(fake_server.url.rpartition(":")[2])
    with Client(fake_server.url, timeout_s=20.0) as client:
        assert client.infer(IMAGE).version == "1@3f2a9c1b"
        fake_server.grpc.stop(grace=0).wait()
        fake_server.weights = "77aa00ff"
        threading.Timer(0.5, fake_server.start, (port,)).start()
        assert client.infer(IMAGE).version == "1@77aa00ff"


def test_another_server_takes_over(fake_server, second_server, slow, pixels):
    with Client([fake_server.url, second_server.url]) as client:
        fake_server.behave = lambda encoded, attempt: (fake_server.stop(), slow(0.1)(encoded, attempt))
        results = client.predict_all(map(pixels, range(20)))
    assert all(isinstance(result, Result) for result in results)
    assert len(fake_server.sent) <= 8
    assert len(second_server.sent) >= 20 - 8


def test_one_server_of_several_is_enough_to_begin_with(fake_server, second_server):
    fake_server.stop()
    with Client([fake_server.url, second_server.url]) as client:
        assert client.infer(IMAGE).server == second_server.url


def test_a_server_that_fails_every_request_is_avoided(fake_server, second_server, refusal, pixels):
    """It answers faster than a healthy one, and would draw all requests to itself."""
    fake_server.behave = refusal(STATUS.INTERNAL, "a backend's process is dead")
    second_server.behave = lambda encoded, attempt: time.sleep(0.005)
    with Client([fake_server.url, second_server.url], in_flight=4) as client:
        results = client.predict_all(map(pixels, range(60)))
    assert all(isinstance(result, Result) for result in results)
    assert len(fake_server.sent) < 20


def test_rests_grow_and_refusals_of_one_moment_count_once():
    server = Server("a:1", None)
    rests = []
    for _ in range(12):
        sent = time.monotonic()
        server.rests_until = 0.0
        server.refused(sent)
        rests.append(server.rests_until - sent)
        until = server.rests_until
        server.refused(sent)  # sent before the rest began
        assert server.rests_until == until
    assert rests[5] > 4 * rests[0]
    assert max(rests) <= LONGEST_REST_S + 0.1
    server.answered()
    assert server.rests_until == 0


def test_the_least_busy_healthy_server_is_chosen():
    a, b, c = (Server(f"{name}:1", None) for name in "abc")
    a.in_flight, b.in_flight, c.rests_until = 2, 1, time.monotonic() + 60

    def chosen(**named):
        return asyncio.run(Servers([a, b, c]).next(time.monotonic() + 0.1, **named))

    assert chosen() is b
    assert chosen(avoid=b) is a
    a.rests_until = b.rests_until = c.rests_until
    assert chosen() in (a, b, c)
    assert chosen(tried=True) is None


def test_a_server_that_never_answers_takes_no_request_along(fake_server, slow, black_hole, monkeypatch, pixels):
    """It has the fewest requests in flight."""
    monkeypatch.setattr("scaphoid.triton_repo.requests.protocols.PROBE_TIMEOUT_S", 2.0)
    fake_server.behave = slow(0.01)
    with Client([black_hole, fake_server.url], timeout_s=1.5, in_flight=4) as client:
        results = client.predict_all(map(pixels, range(20)))
    assert all(isinstance(result, Result) for result in results)


def test_meeting_a_server_again_keeps_the_time_limit(fake_server):
    with Client(fake_server.url, timeout_s=0.3) as client:
        (server,) = client._client._servers.all
        server.lost()
        server._wire.ready = never
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.3 s"):
            client.infer(IMAGE)
        assert time.monotonic() - began < 3


def test_a_label_that_comes_too_late_is_left_out(fake_server):
    with Client(fake_server.url) as client:
        (server,) = client._client._servers.all
        fake_server.versions = ("2",)
        server._wire.served = never
        client._client.timeout_s = 0.5
        assert client.infer(IMAGE).version == "2"


def test_a_lost_server_comes_back_beside_one_that_answers(fake_server, second_server):
    with Client([fake_server.url, second_server.url]) as client:
        lost = client._client._servers.all[0]
        lost.lost()
        for _ in range(50):
            client.infer(IMAGE)
        assert lost.served is not None
        assert fake_server.sent


@pytest.mark.parametrize(
    "answers",
    [
        {},
        TRITON | {"/v2/models/msfm": (200, "<html>")},
        TRITON | {"/v2/models/msfm": (200, "[]")},
        TRITON | {"/v2/models/msfm/infer": (200, "<html>")},
        TRITON | {"/v2/models/msfm/infer": (200, "{}")},
    ],
)
def test_what_is_no_triton_server_is_named(http_server, answers):
    with (
        pytest.raises(ServerUnavailable, match="is no Triton server"),
        Client(http_server(answers), retry_s=0) as client,
    ):
        client.infer(IMAGE)


def test_a_missing_key_is_not_the_images_fault_and_not_waited_for(http_server):
    restricted = json.dumps({"error": "This API is restricted, expecting header 'scaphoid-key'"})
    began = time.monotonic()
    url, told = (
        http_server(TRITON | {"/v2/models/msfm/infer": (403, restricted)}),
        "key for HTTP is missing.*as that user",
    )
    with Client(url) as client, pytest.raises(ServerUnavailable, match=told):
        client.infer(IMAGE)
    assert time.monotonic() - began < 30


def test_a_forked_child_opens_clients_of_its_own(http_server):
    """In a process of its own: a fork keeps what other tests have opened."""
    url = http_server(TRITON)
    code = f"""
import os, signal
from scaphoid.triton_repo.client import Client
with Client({url!r}) as client:
    if os.fork() == 0:
        signal.alarm(20)
        try:
            client.infer(b"x")
        except RuntimeError:
            with Client({url!r}) as own:
                os._exit(0 if own.version == "1@77" else 2)
        os._exit(3)
    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stderr
