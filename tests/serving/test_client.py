"""The client library's answers, arguments and threads, against a server in this process. Beside it:
test_client_retries.py, test_client_servers.py, and against Triton itself test_client_on_triton.py."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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
    RequestRejected,
    Result,
    ServerUnavailable,
    wanted_outputs,
)
from scaphoid.triton_repo.requests.protocols import ADDRESS, is_loopback, wire
from scaphoid.triton_repo.requests.shared_regions import SharedRegions

IMAGE = b"bytes of an image"
STATUS = grpc.StatusCode


def test_without_parts_their_outputs_are_not_asked_for(fake_server, ask):
    outputs = ask(fake_server, parts=False)
    asked = set(fake_server.asked[0])
    assert asked == set(FLOWS["msfm"].outputs) - {"parts_probability", "probability_with_parts"}
    assert "parts" not in [step.name for step in FLOWS["msfm"].steps_for(asked)]
    assert set(outputs.tensors) == asked


def test_outputs_come_without_the_batch_dimension(fake_server, ask):
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


def test_pixels_and_bytes_are_images_too_and_pixels_travel_as_pgm(fake_server, radiographs, pixels):
    encoded = next(radiographs.rglob("*.png")).read_bytes()
    with Client(fake_server.url) as client:
        results = client.predict_all([encoded, pixels(1), str(next(radiographs.rglob("*.png")))])
    assert [(result.width, result.height) for result in results] == [(53, 61), (61, 47), (53, 61)]
    assert to_pgm(pixels(1)) in fake_server.sent


def test_an_answer_or_an_error_for_each_image_in_order(fake_server, refusal, pixels):
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


def test_requests_in_flight_are_bounded(fake_server, slow, pixels):
    fake_server.behave = slow(0.02)
    with Client(fake_server.url, in_flight=3) as client:
        client.predict_all(map(pixels, range(20)))
    assert fake_server.most_in_flight == 3


def test_newest_version_is_numeric_and_names_its_weights(fake_server, ask):
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


def test_an_answer_that_is_not_finite_is_an_error(fake_server, monkeypatch, pixels):
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


def test_one_image_is_not_taken_for_many(fake_server, pixels):
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
