"""Tail latency of a served flow: one request at a time, and at a share of saturation against a queueing simulation.

The simulation knows nothing of the load: it is fed with the stages' times measured one request at a time, the flow's
wiring, the models' batch limits and the number of cores, and with the very arrival times of the measured run. All is
measured in rounds, each simulated with its own times: a machine that others share is faster in one minute than in the
next.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaphoid.bench.comparison import phantoms, tell
from scaphoid.bench.open_loop import OpenLoad, open_load
from scaphoid.bench.peaks import machine
from scaphoid.bench.queueing import Outcome, closed_loop, open_loop, poisson
from scaphoid.bench.report import Report, Table
from scaphoid.bench.server_load import Load, ensemble, server_load
from scaphoid.bench.service_times import CORES, ServiceTimes, service_times
from scaphoid.bench.timing import machine_core_s, session_cpu_s, unsteadiness_ms
from scaphoid.triton_repo.client import AsyncClient, wanted_outputs
from scaphoid.triton_repo.supervisor.server import Server, running_server

ALONE_BAR = 1.3  # p99 over p50, one request at a time
LOAD_BAR = 1.25  # measured p99 over the simulated, or under it
BATCHES = (1, 2, 4)
REPETITIONS = 8  # of the simulation, on the same arrivals
MANY = 10_000  # requests in flight: an open loop has no limit
SATURATION_JOBS = 1500
LATE_MS = 50.0  # p99 of a sender that offers the load it says

Latencies = NDArray[np.float64]
"""[requests], in ms."""


@dataclass(frozen=True)
class Tail:
    """Measure the tail of one flow on the real server, and hold it against a simulation of its queues."""

    repository: Path
    """Folder that scaphoid.triton_repo.assemble wrote."""
    flow: str = "msfm"
    """msfm, msfm_fma or kalm."""
    parts: bool = True
    """Classify MSFM's windows as well."""
    share: float = 0.7
    """Of the saturation rate, offered in the open loop."""
    rounds: int = 6
    """How often service times, saturation and open loop are measured, in turn; the numbers below are of one round."""
    requests: int = 40
    """One at a time; each larger batch gets a fifth of it."""
    saturation_s: float = 6.0
    """Length of the closed loop that measures saturation."""
    seconds: float = 30.0
    """Length of the open loop."""
    clients: int = 16
    """Of the closed loop."""
    seed: int = 7
    out: Path = Path("runs/bench")
    """Folder for images and the report."""

    @property
    def name(self) -> str:
        return f"tail_{self.flow}"


@dataclass(frozen=True)
class Round:
    times: ServiceTimes
    saturation: Load
    load: OpenLoad
    rate: float
    """Offered, requests/s."""
    others: float = 0.0
    """Cores that other programs, and other guests of the hypervisor, kept busy in the open loop."""


@dataclass(frozen=True)
class Measured:
    rounds: tuple[Round, ...]
    machine_ms: tuple[float, ...] = (1.0,)
    """The same computation on one core, over and over, before anything else ran."""

    @property
    def alone_ms(self) -> Latencies:
        return np.concatenate([each.times.alone_ms for each in self.rounds])

    @property
    def load_ms(self) -> Latencies:
        return 1e3 * np.concatenate([each.load.latencies_s for each in self.rounds])


@dataclass(frozen=True)
class Simulated:
    """One round, on paper."""

    saturation: Outcome
    loads: tuple[Outcome, ...]


def simulated_ms(rounds: Sequence[Simulated]) -> Latencies:
    """In the open loop, all rounds and repetitions together."""
    return 1e3 * np.concatenate([load.latencies_s for each in rounds for load in each.loads])


def tail(arguments: Tail) -> Report:
    """Serve, measure, simulate, judge. Raises ValueError, ManifestError, ServerError, LoadError and OSError."""
    if not 0 < arguments.share < 1:
        raise ValueError(f"--share: expected a part of the saturation between 0 and 1, got {arguments.share}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more, got {arguments.rounds}")
    wanted = wanted_outputs(arguments.flow, arguments.parts)
    here = machine()
    tell("how steady this machine is by itself")
    unsteady = tuple(unsteadiness_ms())
    tell("starting Triton")
    with running_server(arguments.repository, [arguments.flow], report=tell) as server:
        images = phantoms(arguments.out / "phantoms")
        rounds = []
        for number in range(arguments.rounds):
            tell(f"round {number + 1} of {arguments.rounds}")
            rounds.append(asyncio.run(measure(server, arguments, wanted, images, number)))
    measured = Measured(tuple(rounds), unsteady)
    simulated = [simulate(each, wanted, here.cores, arguments) for each in rounds]
    missed, facts = judge(measured, simulated, arguments.share)
    if here.busy:
        facts.append(
            f"NOT AN IDLE MACHINE: {here.load_1min:.1f} tasks on {here.cores} cores in the minute before: these "
            "figures say little"
        )
    subject = {
        "flow": arguments.flow + ("" if arguments.parts else ", without parts"),
        "repository": arguments.repository.name,
        "input": f"{len(images)} PNG phantoms, one image a request",
        "offered (requests/s)": ", ".join(f"{each.rate:.1f}" for each in rounds),
        "length of the open loops (s)": arguments.rounds * arguments.seconds,
    }
    tables = (
        latency_table(measured, simulated),
        rounds_table(measured, simulated),
        times_table([each.times for each in rounds]),
    )
    return Report(f"Tail latency of {arguments.flow}", subject, tuple(facts), here, None, tables, tuple(missed))


async def measure(
    server: Server, arguments: Tail, wanted: Sequence[str], images: Sequence[bytes], number: int
) -> Round:
    url = server.grpc_url
    tell(f"{arguments.requests} requests one at a time, and batches of {', '.join(map(str, BATCHES[1:]))}")
    times = service_times(url, server.pid, arguments.flow, wanted, images, BATCHES, arguments.requests)
    tell(f"{arguments.clients} clients in a closed loop: saturation")
    bounds = (arguments.clients, MANY, arguments.saturation_s)
    saturation = await server_load(url, ensemble(url, arguments.flow, wanted), images, *bounds)
    rate = arguments.share * saturation.rate.images_per_s
    count = max(20, round(rate * arguments.seconds))
    tell(f"open loop at {rate:.2f} requests/s for about {count / rate:.0f} s")
    arrivals = poisson(rate, count, np.random.default_rng((arguments.seed, number)))
    async with AsyncClient(url, arguments.flow, outputs=wanted, in_flight=MANY, timeout_s=120.0) as client:
        began, all_before, own_before = time.perf_counter(), sum(machine_core_s()), own_core_s(server)
        load = await open_load(client.infer, images, arrivals.tolist())
        others_s = sum(machine_core_s()) - all_before - (own_core_s(server) - own_before)
    return Round(times, saturation, load, rate, max(0.0, others_s / (time.perf_counter() - began)))


def own_core_s(server: Server) -> float:
    return session_cpu_s(server.pid) + time.process_time()


def simulate(measured: Round, wanted: Sequence[str], cores: int, arguments: Tail) -> Simulated:
    stations, route, resources = measured.times.network(wanted, cores)
    loads = [
        open_loop(stations, route, resources, measured.load.arrivals_s, seed=number) for number in range(REPETITIONS)
    ]
    return Simulated(closed_loop(stations, route, resources, arguments.clients, SATURATION_JOBS), tuple(loads))


def judge(measured: Measured, simulated: Sequence[Simulated], share: float) -> tuple[list[str], list[str]]:
    """Bars missed, and facts."""
    p50, p99 = np.percentile(measured.alone_ms, (50, 99))
    alone, ratio = p99 / p50, np.percentile(measured.load_ms, 99) / np.percentile(simulated_ms(simulated), 99)
    late_ms = 1e3 * max(each.load.sent_late_s for each in measured.rounds)
    others = max(each.others for each in measured.rounds)
    p50_machine, p99_machine = np.percentile(measured.machine_ms, (50, 99))
    machine = p99_machine / p50_machine
    middle = np.median(measured.load_ms) / np.median(simulated_ms(simulated))
    rounds = [
        real.load.percentile_ms(99) / np.percentile(simulated_ms([paper]), 99)
        for real, paper in zip(measured.rounds, simulated, strict=True)
    ]
    facts = [
        f"one request at a time: p99 is {alone:.2f} x p50 (bar {ALONE_BAR})",
        f"at {100 * share:.0f} % of saturation: p99 is {ratio:.2f} x the simulated one, all rounds together (bar: "
        f"within {LOAD_BAR}), {min(rounds):.2f} to {max(rounds):.2f} x in single ones; p50 {middle:.2f} x",
        f"requests were sent {late_ms:.1f} ms late (p99); a latency counts from when its request was due",
        f"the machine by itself: p99 is {machine:.2f} x p50 of the same {p50_machine:.0f} ms of sorting on one core, "
        "nothing served; in the open loop other programs and other guests of the hypervisor kept "
        f"{others:.2f} cores busy at most",
    ]
    failures = [line for each in measured.rounds for line in (*each.saturation.failures, *each.load.failures)]
    bars = {
        f"p99 {alone:.2f} x p50 one at a time, more than {ALONE_BAR}": alone > ALONE_BAR,
        f"p99 {ratio:.2f} x the simulated, not within {LOAD_BAR}": not 1 / LOAD_BAR <= ratio <= LOAD_BAR,
        f"requests were sent {late_ms:.0f} ms late: another load than the one simulated": late_ms > LATE_MS,
        f"{len(failures)} requests failed, the first with: {failures[0] if failures else ''}": bool(failures),
    }
    return [line for line, missed in bars.items() if missed], facts


def latency_table(measured: Measured, simulated: Sequence[Simulated]) -> Table:
    percents = (50, 90, 95, 99)
    rows = [
        (name, len(found), *np.percentile(found, percents).tolist())
        for name, found in (
            ("one at a time, measured", measured.alone_ms),
            ("open loop, measured", measured.load_ms),
            ("open loop, simulated", simulated_ms(simulated)),
        )
    ]
    return Table("Latency", ("load", "counted (requests)", *(f"p{each} (ms)" for each in percents)), tuple(rows))


def rounds_table(measured: Measured, simulated: Sequence[Simulated]) -> Table:
    rows = []
    for number, (real, paper) in enumerate(zip(measured.rounds, simulated, strict=True), 1):
        found, on_paper = real.saturation.rate.images_per_s, paper.saturation.jobs_per_s
        p99, paper_p99 = real.load.percentile_ms(99), float(np.percentile(simulated_ms([paper]), 99))
        busy = 100 * float(np.mean([each.busy[CORES] for each in paper.loads]))
        alone = float(np.percentile(real.times.alone_ms, 50))
        rows.append((number, alone, found, on_paper, 100 * on_paper / found, p99, paper_p99, busy))
    columns = (
        *("round (number)", "one at a time, p50 (ms)"),
        *("saturation, measured (images/s)", "saturation, simulated (images/s)", "simulated of measured (%)"),
        *("open loop, p99 measured (ms)", "open loop, p99 simulated (ms)"),
        "cores busy in the open loop, simulated (%)",
    )
    return Table("Rounds", columns, tuple(rows))


def times_table(rounds: Sequence[ServiceTimes]) -> Table:
    """Means of all rounds."""
    batches = sorted(next(iter(rounds[0].stages.values())).measured)
    rows = []
    for name in rounds[0].stages:
        cells: list[float] = []
        for batch in batches:
            found = [each.stages[name].measured[batch] for each in rounds]
            cells += (mean_ms([each.seconds for each in found]), mean_ms([each.core_s for each in found]))
        rows.append((name, *cells))
    nothing = [None] * 2 * (len(batches) - 1)
    rows.append(("latency in no stage: gRPC, hops", mean_ms([each.wire_s for each in rounds]), None, *nothing))
    rows.append(("server and client, beside the stages", None, mean_ms([each.beside_s for each in rounds]), *nothing))
    columns = (f"batch {batch}, {what}" for batch in batches for what in ("elapsed (ms)", "cores (core-ms)"))
    return Table("Service times, nothing else running", ("stage", *columns), tuple(rows))


def mean_ms(seconds: Sequence[float]) -> float:
    return 1e3 * float(np.mean(seconds))
