"""The queueing simulation against closed forms."""

import math

import numpy as np
import pytest

from scaphoid.bench.queueing import (
    UNLIMITED,
    Station,
    Step,
    closed_loop,
    exponential,
    linear,
    open_loop,
    poisson,
    route_of,
)
from scaphoid.trainer.flows import FLOWS

JOBS = 5_000
SERVICE_S = 1.0
CPU = "cpu"
ONE_STEP = (Step("s"),)


def sojourn(rate: float, station: Station, cores: float = 1.0, route=ONE_STEP, others=(), repeats: int = 4):
    """Mean time in the system over independent runs, and four standard errors of it."""
    means = []
    for seed in range(repeats):
        arrivals = poisson(rate, JOBS, np.random.default_rng(100 + seed))
        outcome = open_loop([station, *others], route, {CPU: cores}, arrivals, seed)
        means.append(outcome.latencies_s[JOBS // 10 :].mean())
    return np.mean(means), 4 * max(np.std(means, ddof=1) / math.sqrt(repeats), 0.005)


def erlang_c(offered: float, servers: int) -> float:
    """Chance that a job of M/M/c has to wait."""
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_mm1(rate):
    found, error = sojourn(rate, Station("s", exponential(SERVICE_S), CPU))
    assert found == pytest.approx(1 / (1 / SERVICE_S - rate), abs=error)


def test_mm1_p99():
    """The time in an M/M/1 system is exponential, so its percentiles are known too."""
    found = [
        open_loop([Station("s", exponential(1.0), CPU)], ONE_STEP, {CPU: 1}, poisson(0.5, JOBS, generator), seed)
        for seed, generator in enumerate(map(np.random.default_rng, range(8)))
    ]
    p99 = np.mean([outcome.percentile_ms(99) for outcome in found])
    assert p99 == pytest.approx(1e3 * math.log(100) / (1 - 0.5), rel=0.1)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_md1(rate):
    """Pollaczek-Khinchine: half of the waiting of M/M/1."""
    found, error = sojourn(rate, Station("s", linear(0, SERVICE_S), CPU))
    assert found == pytest.approx(SERVICE_S + rate * SERVICE_S**2 / (2 * (1 - rate)), abs=error)


@pytest.mark.parametrize(("servers", "rate"), [(2, 1.4), (5, 4.1)])
def test_mmc(servers, rate):
    station = Station("s", exponential(SERVICE_S), CPU, instances=servers)
    found, error = sojourn(rate, station, cores=servers)
    assert found == pytest.approx(SERVICE_S + erlang_c(rate, servers) / (servers - rate), abs=error)


@pytest.mark.parametrize("work", [exponential(SERVICE_S), linear(0, SERVICE_S)])
def test_processor_sharing_does_not_know_the_distribution(work):
    """M/G/1-PS: everybody at once on one core; the mean is M/M/1's whatever the distribution."""
    found, error = sojourn(0.6, Station("s", work, CPU, instances=UNLIMITED))
    assert found == pytest.approx(1 / (1 - 0.6), abs=error)


def test_tandem():
    """Two stations of a Jackson network with a core each: the times add up."""
    other = Station("t", exponential(0.5), CPU)
    route = (Step("s"), Step("t", (0,)))
    found, error = sojourn(0.6, Station("s", exponential(SERVICE_S), CPU), 2, route, (other,))
    assert found == pytest.approx(1 / (1 - 0.6) + 1 / (2 - 0.6), abs=error)


def test_a_step_waits_for_all_that_it_needs():
    stations = [Station("a", linear(0, 1.0), CPU), Station("b", linear(0, 3.0), CPU), Station("c", linear(0, 1.0), CPU)]
    route = (Step("a"), Step("b"), Step("c", (0, 1)))
    assert open_loop(stations, route, {CPU: 8}, [5.0]).latencies_s.tolist() == [4.0]


def test_threads_share_the_cores():
    """Two executions of 2 threads on 2 cores: each at half speed."""
    stations = [Station("s", linear(0, 1.0), CPU, threads=lambda batch: 2, instances=2)]
    outcome = open_loop(stations, ONE_STEP, {CPU: 2}, [0.0, 0.0])
    assert outcome.latencies_s.tolist() == [2.0, 2.0]
    assert outcome.busy[CPU] == pytest.approx(1)


def test_saturation_is_that_of_full_batches():
    """A batch of 4 takes 0.1 + 4 x 0.05 s."""
    outcome = closed_loop([Station("s", linear(0.1, 0.05), CPU, max_batch=4)], ONE_STEP, {CPU: 1}, 12, 2000)
    assert outcome.jobs_per_s == pytest.approx(4 / 0.3, rel=0.01)
    assert outcome.batches["s"] == pytest.approx(4, rel=0.01)
    assert outcome.latencies_s[100:-100].mean() == pytest.approx(12 / outcome.jobs_per_s, rel=0.02)


def test_littles_law():
    """Jobs inside, counted from the times in the system, are the rate times the mean time."""
    arrivals = poisson(1.5, JOBS, np.random.default_rng(3))
    station = Station("s", linear(0.2, 0.3, (0.5, 1.5)), CPU, max_batch=3)
    outcome = open_loop([station], ONE_STEP, {CPU: 1}, arrivals)
    ends = arrivals + outcome.latencies_s
    moments = np.linspace(arrivals[500], arrivals[-1], 3000)
    inside = np.searchsorted(arrivals, moments, "right") - np.searchsorted(np.sort(ends), moments, "right")
    assert inside.mean() == pytest.approx(1.5 * outcome.latencies_s[500:].mean(), rel=0.05)


def test_the_route_is_the_flows():
    flow = FLOWS["msfm"]
    route = route_of(flow, flow.outputs, ("wire",))
    names = [step.station for step in route]
    assert names[0] == "wire"
    assert names.count("encoder") == 2
    crop = names.index("object_crop")
    assert {names[need] for need in route[crop].needs} == {"preprocess", "encoder"}
    assert [step.station for step in route_of(flow, ["main_probability"])] == ["preprocess", "encoder", "main_result"]


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="step 0 of the route"):
        open_loop([Station("s", linear(0, 1), CPU)], [Step("t")], {CPU: 1}, [0.0])
    with pytest.raises(ValueError, match="runs on 'gpu'"):
        open_loop([Station("s", linear(0, 1), "gpu")], ONE_STEP, {CPU: 1}, [0.0])
