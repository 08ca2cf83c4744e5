"""The client library, TLS and the fuzzer against the real Triton server, on a tiny untrained KALM."""

import asyncio
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from scaphoid.bench.fuzz import Fuzz, fuzz, fuzz_server
from scaphoid.bench.mutations import encode, picture
from scaphoid.trainer.data.dicom import to_pgm
from scaphoid.triton_repo.assemble import assemble
from scaphoid.triton_repo.certificates import make_certificates
from scaphoid.triton_repo.client import AsyncClient, Client, ClientError, Result, ServerUnavailable, Tls
from scaphoid.triton_repo.keys import find_local_key
from scaphoid.triton_repo.supervisor.process import children
from scaphoid.triton_repo.supervisor.server import running_server

pytestmark = pytest.mark.slow
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def repository(tiny_kalm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("client") / "repository"
    assemble(tiny_kalm[0], folder)
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with running_server(repository) as server:
        yield server


def ours() -> list[Path]:
    return list(SHARED_MEMORY.glob(f"scaphoid-client-{os.getpid()}-*"))


def test_both_protocols_and_shared_memory_answer_alike(server):
    """PNG bytes, the same picture as pixels, and one that needs a larger region; nothing is left in /dev/shm."""
    images = [encode(picture(1), "PNG"), picture(1), picture(2, (1501, 1203))]
    answers = []
    for url in (server.grpc_url, f"http://{server.http_url}"):
        for shared_memory in (False, True):
            with Client(url, "kalm", shared_memory=shared_memory, in_flight=2) as client:
                answers.append(client.predict_all(images * 2))
                assert not ours()
    for results in answers:
        assert all(isinstance(result, Result) for result in results), results
        assert [(result.width, result.height) for result in results[:3]] == [(97, 83), (97, 83), (1501, 1203)]
        for result, reference in zip(results, answers[0], strict=True):
            assert result.probability == pytest.approx(reference.probability, abs=1e-4)
            np.testing.assert_allclose(result.box, reference.box, atol=1e-2)
        assert results[0].probability == pytest.approx(results[1].probability, abs=1e-4)
    server.api.key, admin = find_local_key(server.ports[0]), server.api.key
    assert server.api.request("GET", "/v2/systemsharedmemory/status") == (200, [])
    server.api.key = admin


def test_shared_memory_is_refused_without_the_key(server, monkeypatch):
    monkeypatch.setattr("scaphoid.triton_repo.requests.shared_regions.find_local_key", lambda port: "guessed")
    for url in (server.grpc_url, f"http://{server.http_url}"):
        with Client(url, "kalm", shared_memory=True, retry_s=0) as client, pytest.raises(ClientError):
            client.infer(to_pgm(picture(1)))
    assert not ours()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of libraries about damaged files
def test_a_few_hundred_damaged_images_and_malformed_requests(server):
    found = asyncio.run(fuzz_server(server, cases=300, seed=2))
    assert not found.problems
    assert found.good > 30
    assert found.answered.total() > 30
    assert found.refused.total() > 100
    assert len({what for what, _ in found.malformed}) > 8


@pytest.mark.thorough
def test_ten_thousand_damaged_images_and_malformed_requests(repository, tmp_path):
    assert not fuzz(Fuzz(repository, cases=10_000, out=tmp_path)).missed


@pytest.mark.parametrize("victim", ["server", "backend"])
def test_nothing_is_lost_and_nothing_hangs_when_a_process_is_killed_under_load(repository, victim):
    """kill -9, seen from the client: what was in flight ends, and the server that takes its place is found again."""
    encoded, timeout_s = to_pgm(picture(1)), 60.0
    taken, failures, reports = [], [], []
    with running_server(repository, watch_interval_s=1.0, report=lambda line, **_: reports.append(line)) as server:

        async def load() -> set[float]:
            async def worker(client: AsyncClient) -> None:
                while not ended.is_set():
                    began = time.monotonic()
                    try:
                        answers.add(round((await client.infer(encoded)).tensors["probability"].item(), 3))
                    except ClientError as error:
                        failures.append(error)
                    taken.append(time.monotonic() - began)

            answers: set[float] = set()
            async with AsyncClient(server.grpc_url, "kalm", timeout_s=timeout_s, in_flight=4) as client:
                await asyncio.gather(*(worker(client) for _ in range(4)))
            return answers

        ended = threading.Event()

        def kill() -> None:
            time.sleep(1.0)
            os.kill(server.pid if victim == "server" else children(server.pid)[-1], 9)
            deadline = time.monotonic() + 50
            while not any("recovered" in line for line in reports) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(0.5)
            ended.set()

        killer = threading.Thread(target=kill)
        killer.start()
        answers = asyncio.run(load())
        killer.join()
    assert any("recovered" in line for line in reports), reports
    assert len(answers) == 1
    assert max(taken) < timeout_s
    assert not failures  # the client waited for the new server within its time limit
    assert not ours()


def test_grpc_over_tls_lets_in_those_with_a_certificate_alone(repository, tmp_path):
    make_certificates(tmp_path / "tls", ["127.0.0.1"])
    make_certificates(tmp_path / "stranger", ["127.0.0.1"])

    def tls(authority: str, own: str | None) -> Tls:
        own_files = () if own is None else (tmp_path / own / "client.pem", tmp_path / own / "client.key")
        return Tls(tmp_path / authority / "ca.pem", *own_files)

    with running_server(repository, tls=tmp_path / "tls") as server:
        with Client(server.grpc_url, "kalm", tls=tls("tls", "tls")) as client:
            assert isinstance(client.predict(picture(1)), Result)
        strangers = (None, tls("stranger", "tls"), tls("tls", None), tls("tls", "stranger"))
        for each in strangers:
            with pytest.raises(ServerUnavailable), Client(server.grpc_url, "kalm", tls=each):
                pass
