"""The open loop: latencies count from when a request was due, and the simulation is fed with what was measured."""

import asyncio

import numpy as np
import pytest

from scaphoid.bench import tail
from scaphoid.bench.open_loop import OpenLoad, open_load
from scaphoid.bench.queueing import open_loop, poisson
from scaphoid.bench.server_load import Load, LoadError
from scaphoid.bench.service_times import Execution, ServiceTimes, StageTime, _idle_s, _line, model_core_s
from scaphoid.bench.tail import Measured, Round, Simulated, Tail
from scaphoid.bench.timing import Rate


def test_a_request_is_sent_when_it_is_due_whatever_the_others_do():
    """Ten requests within 0.1 s to a server that takes 0.3 s for each, any number at once."""
    sent = []

    async def predict(image: bytes) -> None:
        sent.append(image)
        await asyncio.sleep(0.3)

    load = asyncio.run(open_load(predict, [b"a", b"b"], [0.01 * number for number in range(10)]))
    assert sent == [b"a", b"b"] * 5
    assert load.latencies_s == pytest.approx(np.full(10, 0.3), abs=0.2)  # one after the other it would be 3 s
    assert load.failures == ()


def test_waiting_counts_as_latency():
    """A server that takes one at a time: the last of five that are due at once has waited for the others."""
    lock = asyncio.Lock()

    async def predict(image: bytes) -> None:
        async with lock:
            await asyncio.sleep(0.1)

    load = asyncio.run(open_load(predict, [b"a"], [0.0] * 5))
    assert load.latencies_s.max() >= 0.5


def test_failures_are_told_apart_from_answers():
    async def predict(image: bytes) -> None:
        if image == b"bad":
            raise ValueError("refused")

    load = asyncio.run(open_load(predict, [b"good", b"bad"], [0.0, 0.0, 0.01, 0.01]))
    assert len(load.latencies_s) == len(load.arrivals_s) == 2
    assert load.failures == ("ValueError: refused",) * 2
    with pytest.raises(LoadError, match="ValueError: refused"):
        asyncio.run(open_load(predict, [b"bad"], [0.0]))


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        ({1: 3.0, 2: 5.0, 4: 9.0}, (1.0, 2.0)),
        ({1: 2.0, 2: 4.0, 4: 9.0}, (0.0, 2.0833)),  # no fixed part: the mean of what an image took
        ({1: 2.0, 2: 2.0, 4: 2.0}, (2.0, 0.0)),
        ({1: 2.0}, (0.0, 2.0)),
    ],
)
def test_service_times_are_a_line_through_the_batches(measured, line):
    found = _line(measured)
    assert (found.fixed, found.image) == pytest.approx(line, abs=1e-3)
    assert found.of(3) == found.fixed + 3 * found.image


def test_a_models_process_is_known_by_its_instance():
    processes = [
        (["tritonserver", "--model-repository=/encoder/r"], 5.0),
        (["stub", "/b/model.py", "parts_encoder_0_0", "/b"], 2.0),
        (["stub", "/b/model.py", "encoder_0_0", "/b"], 1.0),
        (["stub", "/b/model.py", "encoder_0_1", "/b"], 0.5),
    ]
    found = model_core_s(processes, ["encoder", "parts_encoder", "result"])
    assert found == {"encoder": 1.5, "parts_encoder": 2.0, "": 5.0}


def test_threads_are_those_of_the_batch():
    """2 + 8 x images ms, in which an image costs 13 core-ms."""
    stage = StageTime({batch: Execution(2.0 + 8.0 * batch, 13.0 * batch) for batch in (1, 2, 4)}, 4, 1)
    assert stage.threads(1) == pytest.approx(1.3)
    assert stage.threads(4) == pytest.approx(52 / 34)


@pytest.fixture
def times() -> ServiceTimes:
    """KALM's stages: 10 ms to decode, 40 + 20 ms in the encoders, 1 ms of glue each, 5 ms of wire."""
    seconds = {"preprocess": 0.01, "global_encoder": 0.04, "key_area_crop": 0.001, "local_encoder": 0.02}
    seconds["key_area_result"] = 0.001
    cores = {name: 2 if name.endswith("encoder") else 1 for name in seconds}
    stages = {name: StageTime({1: Execution(each, cores[name] * each)}, 4, 1) for name, each in seconds.items()}
    return ServiceTimes("kalm", stages, (77.0, 77.0), beside_s=0.008, wire_s=0.005)


def test_one_request_takes_its_stages_and_the_wire(times):
    assert _idle_s(times, ["probability"]) == pytest.approx(0.077)
    assert _idle_s(times, ["global_probability"]) == pytest.approx(0.077)  # of key_area_result, so of all steps


def test_the_network_saturates_where_its_work_does(times):
    """60 ms of an image keep both cores busy, 12 ms of glue and 8 ms of server and client one of them."""
    network, route, resources = times.network(["probability"], 2)
    arrivals = poisson(40.0, 400, np.random.default_rng(0))
    outcome = open_loop(network, route, resources, arrivals)
    assert outcome.jobs_per_s == pytest.approx(2 / (0.06 * 2 + 0.012 + 0.008), rel=0.1)


def test_bars_are_judged(times):
    arrivals = poisson(4.0, 300, np.random.default_rng(2))
    network, route, resources = times.network(["probability"], 2)
    outcome = open_loop(network, route, resources, arrivals)
    saturation = Load(Rate(100, 10.0, (1.0,)), ())

    def judged(factor: float, alone_ms: tuple[float, ...], failures: tuple[str, ...] = (), late_s=0.0) -> list[str]:
        load = OpenLoad(arrivals, factor * outcome.latencies_s, late_s, failures)
        measured = Measured((Round(ServiceTimes("kalm", times.stages, alone_ms), saturation, load, 4.0),))
        return tail.judge(measured, [Simulated(outcome, (outcome,))], 0.7)[0]

    steady = tuple(np.linspace(70, 80, 50))
    assert judged(1.2, steady) == []
    assert "not within 1.25" in judged(1.3, steady)[0]
    assert "not within 1.25" in judged(0.75, steady)[0]  # a simulation that fears too much predicts nothing either
    assert "one at a time" in judged(1.0, (*steady, 150.0, 151.0))[0]
    assert "200 ms late" in judged(1.0, steady, late_s=0.2)[0]
    assert "no answer" in judged(1.0, steady, ("no answer",))[0]


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="--share"):
        tail.tail(Tail(repository=None, share=1.5))
