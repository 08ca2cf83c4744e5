"""The client library against servers in this process. Over HTTP and against Triton itself: test_client_on_triton.py."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest

from scaphoid.bench.mutations import dicom, picture
from scaphoid.trainer.data.dicom import to_pgm
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo import client as client_module
from scaphoid.triton_repo.client import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineExceeded,
    Quarantine,
    Quarantined,
    RequestFailed,
    RequestRejected,
    Result,
    ServerUnavailable,
    wanted_outputs,
)
from scaphoid.triton_repo.requests.protocols import ADDRESS, is_loopback, wire
from scaphoid.triton_repo.requests.quarantine import STRIKES
from scaphoid.triton_repo.requests.retry import Servers
from scaphoid.triton_repo.requests.servers import LONGEST_REST_S, Server
from scaphoid.triton_repo.requests.shared_regions import SharedRegions

IMAGE = b"bytes of an image"
STATUS = grpc.StatusCode


def ask(server, encoded=IMAGE, flow="msfm", **settings):
    with Client(server.url, flow, **settings) as client:
        return client.infer(encoded)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (47, 61), dtype=np.uint8)


@pytest.fixture
def second_server(fake_server):
    server = type(fake_server)()
    server.start()
    yield server
    server.stop()


def test_without_parts_their_outputs_are_not_asked_for(fake_server):
    outputs = ask(fake_server, parts=False)
    asked = set(fake_server.asked[0])
    assert asked == set(FLOWS["msfm"].outputs) - {"parts_probability", "probability_with_parts"}
    assert "parts" not in [step.name for step in FLOWS["msfm"].steps_for(asked)]
    assert set(outputs.tensors) == asked


def test_outputs_come_without_the_batch_dimension(fake_server):
    tensors = ask(fake_server).tensors
    assert tensors["window_boxes"].shape == (7, 4)
    np.testing.assert_array_equal(tensors["box"], np.array([4.5, 6.25, 40.0, 30.75], np.float32))


def test_a_result_is_typed_and_in_pixels_of_the_radiograph(fake_server, radiographs):
    path = next(radiographs.rglob("*.png"))
    with Client(fake_server.url) as client:
        result = client.predict(path)
    assert isinstance(result, Result)
    assert (result.width, result.height) == (53, 61)
    assert result.box == [4.5, 6.25, 40.0, 30.75]
    assert len(result.windows) == 7
    assert result.score == result.probability_with_parts
    assert result.model_version == "1@3f2a9c1b"
    assert fake_server.ids == [result.request_id]
    assert len(bytes.fromhex(result.request_id)) == 16


def test_pixels_and_bytes_are_images_too_and_pixels_travel_as_pgm(fake_server, radiographs):
    encoded = next(radiographs.rglob("*.png")).read_bytes()
    with Client(fake_server.url) as client:
        results = client.predict_all([encoded, pixels(1), str(next(radiographs.rglob("*.png")))])
    assert [(result.width, result.height) for result in results] == [(53, 61), (61, 47), (53, 61)]
    assert to_pgm(pixels(1)) in fake_server.sent


def test_an_answer_or_an_error_for_each_image_in_order(fake_server, refusal):
    bad = to_pgm(pixels(2))
    fake_server.behave = refusal(STATUS.INVALID_ARGUMENT, "in ensemble 'msfm', why\nand a stack trace", of=bad)
    images = [pixels(1), b"not an image", bad, pixels(3).astype(float), None, "nowhere.png", pixels(4)]
    with Client(fake_server.url) as client:
        results = client.predict_all(images)
    assert [type(result) for result in results] == [Result, *[RequestRejected] * 5, Result]
    words = ["not an image", "refused by the server: why", "expected uint8", "got NoneType", "does not exist"]
    for result, word in zip(results[1:6], words, strict=True):
        assert word in str(result)
        assert "\n" not in str(result)
    assert results[2].request_id in fake_server.ids
    for result, seed in ((results[0], 1), (results[-1], 4)):
        with Client(fake_server.url) as client:
            assert client.predict(pixels(seed)).probability == result.probability


def test_requests_in_flight_are_bounded(fake_server, slow):
    fake_server.behave = slow(0.02)
    with Client(fake_server.url, in_flight=3) as client:
        client.predict_all(map(pixels, range(20)))
    assert fake_server.most_in_flight == 3


def test_newest_version_is_numeric_and_names_its_weights(fake_server):
    fake_server.versions = ("9", "10", "2")
    with Client(fake_server.url, "kalm") as client:
        assert client.version == "10@3f2a9c1b"
        assert client.infer(IMAGE).version == "10@3f2a9c1b"
        fake_server.versions = ("11",)  # switched while the client is connected
        fake_server.weights = ""  # a repository that assemble did not write
        assert client.infer(IMAGE).version == "11"
    assert fake_server.asked_version == ["", ""]
    assert ask(fake_server, version="11").version == "11"
    assert fake_server.asked_version[-1] == "11"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:8001", True),
        ("localhost:8001", True),
        ("http://[::1]:8000", True),
        ("grpcs://127.8.9.1:8001/", True),
        ("192.168.0.7:8001", False),
        ("localhost.example:8001", False),
        ("https://triton.example:443", False),
    ],
)
def test_addresses_of_this_machine_are_told_apart(address, loopback):
    assert ADDRESS.fullmatch(address)
    assert is_loopback(address) == loopback


@pytest.mark.parametrize("address", ["8001", "host", "host:", "host:99999", "ftp://host:1", "host:1/path", "a b:1", ""])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match=r"a Triton server is HOST:PORT"):
        wire(address, None, 1)


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match=r"'mfsm'.*msfm, msfm_fma, kalm"):
        wanted_outputs("mfsm", True)
    with pytest.raises(ValueError, match=r"HOST:PORT.*got 'localhost'"), Client("localhost"):
        pass
    with pytest.raises(ValueError, match="in_flight >= 1"):
        AsyncClient(in_flight=0)
    for wrong in ({"in_flight": 2.0}, {"priority": -1}, {"retry_s": -0.1}, {"timeout_s": float("nan")}):
        with pytest.raises(ValueError, match=f"expected .*{next(iter(wrong))}"):
            AsyncClient(**wrong)
    with pytest.raises(ServerUnavailable, match=r"this machine.*loopback"):
        AsyncClient("scanner.example:8001", shared_memory=True)


def test_no_server_says_what_to_do(fake_server):
    fake_server.stop()
    with pytest.raises(ServerUnavailable, match=f"{fake_server.url}.*scaphoid-serve.*HOST:PORT"):
        ask(fake_server)
    with pytest.raises(ServerUnavailable, match=r"http://.*scaphoid-serve"), Client(f"http://{fake_server.url}"):
        pass


def test_server_not_ready(fake_server):
    fake_server.ready = False
    with pytest.raises(ServerUnavailable, match="not ready"):
        ask(fake_server)


def test_flow_or_output_not_served(fake_server):
    del fake_server.flows["kalm"]
    with pytest.raises(ServerUnavailable, match="does not serve flow kalm"):
        ask(fake_server, flow="kalm")
    fake_server.flows["msfm"] = ("probability",)
    with pytest.raises(ServerUnavailable, match="has no output box"):
        ask(fake_server)


def test_a_full_queue_is_asked_again_after_a_pause(fake_server, refusal):
    fake_server.behave = refusal(STATUS.UNAVAILABLE, "Exceeds maximum queue size", attempts=3)
    began = time.monotonic()
    ask(fake_server)
    assert len(fake_server.sent) == 4
    assert len(set(fake_server.ids)) == 1
    assert time.monotonic() - began > 0.5 * (0.05 + 0.1 + 0.2)


def test_a_server_that_goes_on_refusing_is_an_error_within_the_time_limit(fake_server, refusal):
    fake_server.behave = refusal(STATUS.UNAVAILABLE, "Exceeds maximum queue size")
    with pytest.raises(RequestFailed, match="server error UNAVAILABLE: Exceeds") as error:
        ask(fake_server, timeout_s=0.4)
    assert error.value.request_id == fake_server.ids[0]
    assert 2 < len(fake_server.sent) < 9
    fake_server.sent.clear()
    with pytest.raises(RequestFailed):
        ask(fake_server, retry_s=0)
    assert len(fake_server.sent) == 1


def test_what_began_and_failed_is_sent_once_more_alone(fake_server, refusal):
    victim = to_pgm(pixels(5))
    fail = refusal(STATUS.INTERNAL, "the batch failed", of=victim, attempts=1)
    fake_server.behave = lambda encoded, attempt: (time.sleep(0.01), fail(encoded, attempt))
    with Client(fake_server.url, in_flight=4) as client:
        results = client.predict_all(map(pixels, range(12)))
    assert all(isinstance(result, Result) for result in results)
    first, again = (place for place, sent in enumerate(fake_server.sent) if sent == victim)
    assert fake_server.alone[again]
    assert fake_server.ids[first] == fake_server.ids[again]
    assert len(fake_server.sent) == 13


def test_an_image_that_fails_every_time_is_quarantined_by_its_content(fake_server, refusal, tmp_path):
    bad = pixels(2)
    fake_server.behave = refusal(STATUS.INTERNAL, "engine lost", of=to_pgm(bad))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    with Client(fake_server.url, quarantine=quarantine) as client:
        for strikes in range(STRIKES):
            assert len(quarantine) == 0
            assert len(fake_server.sent) == 2 * strikes
            with pytest.raises(RequestFailed, match=r"engine lost \(tried twice, the second time alone\)"):
                client.predict(bad)
        with pytest.raises(Quarantined, match=r"not sent.*engine lost"):
            client.predict(bad)
        client.predict(pixels(1))
    assert len(fake_server.sent) == 2 * STRIKES + 1
    again = Quarantine(tmp_path / "quarantine.jsonl")
    assert again.reason(to_pgm(bad)) == quarantine.reason(to_pgm(bad))
    assert len(again) == 1
    (tmp_path / "quarantine.jsonl").write_text("a list of names\n")
    with pytest.raises(ValueError, match="line 1 is not a quarantined image"):
        Quarantine(tmp_path / "quarantine.jsonl")


def test_a_server_that_answers_nobody_blames_no_image(fake_server, refusal):
    fake_server.behave, fake_server.canary_fails = refusal(STATUS.INTERNAL, "engine lost"), True
    with Client(fake_server.url, timeout_s=1.0) as client:
        for _ in range(STRIKES):
            with pytest.raises(RequestFailed, match=r"INTERNAL: engine lost; then .*answers nobody"):
                client.predict(pixels(2))
        assert client.quarantine.reason(to_pgm(pixels(2))) is None
    assert len(fake_server.sent) == STRIKES


def test_a_server_that_answers_again_is_waited_for(fake_server, refusal):
    """As when its backend's process died and it is being restarted: nothing is lost, nobody is blamed."""
    fake_server.behave, fake_server.canary_fails = refusal(STATUS.INTERNAL, "process died", attempts=1), True
    threading.Timer(0.5, lambda: setattr(fake_server, "canary_fails", False)).start()
    with Client(fake_server.url) as client:
        results = client.predict_all(map(pixels, range(6)))
        assert not client.quarantine._strikes
    assert all(isinstance(result, Result) for result in results), results


def test_time_limit(fake_server, slow):
    fake_server.behave = slow(1.0)
    began = time.monotonic()
    with Client(fake_server.url, timeout_s=0.2) as client:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s"):
            client.infer(IMAGE)
        assert time.monotonic() - began < 0.9
        fake_server.behave = slow(0)
        client.infer(IMAGE)
    assert len(fake_server.sent) == 2


def test_a_request_that_nobody_waits_for_keeps_its_place(fake_server, slow):
    fake_server.behave = slow(1.0)
    with Client(fake_server.url, timeout_s=0.2, in_flight=2) as client:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                client.infer(IMAGE)
    assert len(fake_server.sent) == 2


def test_server_gone_in_the_middle(fake_server, slow):
    fake_server.behave = lambda encoded, attempt: (fake_server.stop(), slow(0.2)(encoded, attempt))
    with pytest.raises(ServerUnavailable, match="no server is left: no Triton server answers"):
        ask(fake_server, timeout_s=1.0)


def test_what_is_left_of_many_images_is_not_waited_for_once_the_server_is_gone(fake_server, slow):
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


def test_another_server_takes_over(fake_server, second_server, slow):
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


def test_a_server_that_fails_every_request_is_avoided(fake_server, second_server, refusal):
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


def test_a_client_is_for_several_threads_and_for_asyncio(fake_server):
    async def many():
        async with AsyncClient(fake_server.url) as client:
            return await asyncio.gather(*(client.infer(b"%d" % number) for number in range(30)))

    expected = {outputs.tensors["probability"].item() for outputs in asyncio.run(many())}
    found = set()
    with Client(fake_server.url) as client:
        threads = [
            threading.Thread(target=lambda n=n: found.add(client.infer(b"%d" % n).tensors["probability"].item()))
            for n in range(30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected
    assert len(found) == 30


def test_an_answer_that_is_not_finite_is_an_error(fake_server, monkeypatch):
    import scaphoid.triton_repo.requests.async_client as module

    monkeypatch.setattr(module, "answered", lambda tensors: (_ for _ in ()).throw(ValueError("answered box with inf")))
    with Client(fake_server.url) as client:
        (result,) = client.predict_all([pixels(1)])
    assert isinstance(result, ClientError)
    assert "answered box with inf" in str(result)


def test_no_log_and_no_error_names_the_patient_or_the_file(fake_server, refusal, tmp_path, caplog):
    path = tmp_path / "Doe_Jane.dcm"
    path.write_bytes(dicom(picture(3)))
    fake_server.behave = refusal(STATUS.INTERNAL, "engine lost", attempts=1)
    with caplog.at_level(logging.DEBUG), Client(fake_server.url) as client:
        client.predict(path)
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(RequestRejected) as rejected:
            client.predict(path)
    assert "tried once more alone" in caplog.text
    assert "Doe" not in caplog.text + str(rejected.value)


def test_client_imports_no_torch():
    code = (
        "import sys; import scaphoid.triton_repo.predict; "
        "heavy = {'torch', 'timm', 'openvino', 'nvidia.dali'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr


@pytest.fixture
def black_hole():
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_never_answers_takes_no_request_along(fake_server, slow, black_hole, monkeypatch):
    """It has the fewest requests in flight."""
    monkeypatch.setattr("scaphoid.triton_repo.requests.protocols.PROBE_TIMEOUT_S", 2.0)
    fake_server.behave = slow(0.01)
    with Client([black_hole, fake_server.url], timeout_s=1.5, in_flight=4) as client:
        results = client.predict_all(map(pixels, range(20)))
    assert all(isinstance(result, Result) for result in results)


async def never(*_):
    await asyncio.Event().wait()


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


def test_full_shared_memory_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scaphoid.triton_repo.requests.shared_regions.FOLDER", tmp_path)
    regions = SharedRegions("127.0.0.1:8001")
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(ServerUnavailable, match=r"2 MB.*No space.*leave out shared"):
            asyncio.run(regions._create(None, 2**20 + 1))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("scaphoid.triton_repo.requests.shared_regions.FOLDER", tmp_path / "missing")
    with pytest.raises(ServerUnavailable, match="No such file"):
        asyncio.run(regions._create(None, 1))


def test_all_threads_share_one_loop():
    async def running():
        time.sleep(0.01)
        return asyncio.get_running_loop()

    client_module._loop.cache_clear()
    barrier = threading.Barrier(16)
    with ThreadPoolExecutor(16) as threads:
        loops = threads.map(lambda _: (barrier.wait(), client_module._wait(running()))[1], range(16))
        assert len(set(loops)) == 1


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


def test_one_image_is_not_taken_for_many(fake_server):
    with Client(fake_server.url) as client:
        for image in ("hand.png", b"bytes", pixels(1)):
            with pytest.raises(TypeError, match="pass a list"):
                client.predict_all(image)
        with pytest.raises(RequestRejected, match="no file can have this path"):
            client.predict("a\0b")


def test_a_client_that_is_not_connected_says_so(fake_server):
    client = Client(fake_server.url)
    for _ in range(2):
        for use in (lambda: client.infer(IMAGE), lambda: client.predict(IMAGE), lambda: client.predict_all([IMAGE])):
            with pytest.raises(RuntimeError, match="not connected: use it inside"):
                use()
        with client:  # and closed
            client.infer(IMAGE)


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


def test_a_quarantine_outlives_a_cut_line_and_a_full_disk(fake_server, refusal, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "scaphoid.client")
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    for _ in range(STRIKES):
        quarantine.strike(IMAGE, "engine lost")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    again = Quarantine(path)
    assert "line 3 was cut" in caplog.text
    assert again.reason(IMAGE) == "engine lost"
    for _ in range(STRIKES):
        again.strike(b"another", "why")
    assert Quarantine(path).reason(b"another") == "why"
    fake_server.behave = refusal(STATUS.INTERNAL, "engine lost")
    unwritable = Quarantine(tmp_path / "missing" / "file")
    with Client(fake_server.url, quarantine=unwritable) as client, pytest.raises(RequestFailed, match="engine lost"):
        client.infer(IMAGE)
    assert "the strike is not kept" in caplog.text
