"""The open loop: latencies count from when a request was due, and the simulation is fed with what was measured."""

import asyncio

import numpy as np
import pytest

from scaphoid.bench import tail
from scaphoid.bench.open_loop import OpenLoad, open_load
from scaphoid.bench.queueing import open_loop, poisson
from scaphoid.bench.server_load import Load, LoadError
from scaphoid.bench.service_times import ServiceTimes, StageTime, _idle_s, _line
from scaphoid.bench.tail import Measured, Simulated, Tail
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
    assert _line(measured) == pytest.approx(line, abs=1e-3)


@pytest.fixture
def times() -> ServiceTimes:
    """KALM's stages: 10 ms to decode, 40 + 20 ms in the encoders, 1 ms of glue each, 5 ms of wire."""
    seconds = {"preprocess": 0.01, "global_encoder": 0.04, "key_area_crop": 0.001, "local_encoder": 0.02}
    seconds["key_area_result"] = 0.001
    stages = {name: StageTime(0.0, each, {1: each}, 4, 1) for name, each in seconds.items()}
    return ServiceTimes("kalm", stages, (77.0, 77.0), encoder_cores=2.0, wire_s=0.005)


def test_one_request_takes_its_stages_and_the_wire(times):
    assert _idle_s(times, ["probability"]) == pytest.approx(0.077)
    assert _idle_s(times, ["global_probability"]) == pytest.approx(0.077)  # of key_area_result, so of all steps


def test_the_network_saturates_where_its_work_does(times):
    """60 ms of an image keep both cores busy, 17 ms one of them."""
    network, route, resources = times.network(["probability"], 2)
    arrivals = poisson(40.0, 400, np.random.default_rng(0))
    outcome = open_loop(network, route, resources, arrivals)
    assert outcome.jobs_per_s == pytest.approx(2 / (0.06 * 2 + 0.017), rel=0.1)


def test_bars_are_judged(times):
    arrivals = poisson(4.0, 300, np.random.default_rng(2))
    network, route, resources = times.network(["probability"], 2)
    outcome = open_loop(network, route, resources, arrivals)
    saturation = Load(Rate(100, 10.0, (1.0,)), ())

    def judged(factor: float, alone_ms: tuple[float, ...], failures: tuple[str, ...] = (), late_s=0.0) -> list[str]:
        load = OpenLoad(arrivals, factor * outcome.latencies_s, late_s, failures)
        measured = Measured(ServiceTimes("kalm", times.stages, alone_ms, 2.0), saturation, load, 4.0)
        return tail.judge(measured, Simulated(outcome, (outcome,)), 0.7)[0]

    steady = tuple(np.linspace(70, 80, 50))
    assert judged(1.2, steady) == []
    assert "more than 1.25" in judged(1.3, steady)[0]
    assert "one at a time" in judged(1.0, (*steady, 150.0, 151.0))[0]
    assert "200 ms late" in judged(1.0, steady, late_s=0.2)[0]
    assert "no answer" in judged(1.0, steady, ("no answer",))[0]


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="--share"):
        tail.tail(Tail(repository=None, share=1.5))
