"""A discrete-event simulation of a queueing network: stations that batch what waits for them, on shared resources.

A *station* is a model: `instances` of it each take up to `max_batch` waiting tasks the moment they are free (Triton's
dynamic batching without a delay). An execution occupies `threads` of its *resource*, a machine's cores or a GPU; when
more threads run than the resource has, all of them slow down alike (processor sharing). A *job* is a request: steps at
stations, each begun when those that it needs have ended, the flow's wiring. Seconds throughout. Imports no torch.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf

import numpy as np
from numpy.typing import NDArray

from scaphoid.trainer.flows import Flow

Work = Callable[[int, np.random.Generator], float]
"""Seconds that an execution of so many tasks takes at full speed."""
Threads = Callable[[int], float]
"""How many threads such an execution keeps busy meanwhile."""

UNLIMITED = 1 << 30  # instances of a station where nobody queues: a wire, a client


def one_thread(batch: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Station:
    name: str
    work: Work
    resource: str
    threads: Threads = one_thread
    instances: int = 1
    max_batch: int = 1


@dataclass(frozen=True)
class Step:
    """A use of a station; `needs` are places in the route, all before its own."""

    station: str
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """`latencies_s` [jobs] in order of arrival; `busy` the share of each resource's capacity that was used between the
    first arrival and the last answer; `batches` the mean batch of each station."""

    latencies_s: NDArray[np.float64]
    seconds: float
    busy: Mapping[str, float]
    batches: Mapping[str, float]

    @property
    def jobs_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.latencies_s, percent))


def exponential(mean_s: float) -> Work:
    return lambda batch, generator: float(generator.exponential(mean_s))


def linear(fixed_s: float, image_s: float, spread: Sequence[float] = (1.0,)) -> Work:
    """`fixed_s` + `image_s` for each image, times a factor drawn from `spread`."""
    factors = np.asarray(spread, np.float64)

    def work(batch: int, generator: np.random.Generator) -> float:
        factor = factors[generator.integers(len(factors))] if len(factors) > 1 else factors[0]
        return float((fixed_s + image_s * batch) * factor)

    return work


def route_of(flow: Flow, wanted: Sequence[str], first: Sequence[str] = ()) -> tuple[Step, ...]:
    """The steps that `wanted` needs, as the ensemble runs them, after the stations `first`, one after the other."""
    route = [Step(station, (place - 1,) if place else ()) for place, station in enumerate(first)]
    ends = len(route) - 1
    makers: dict[str, int] = {}
    for step in flow.steps_for(wanted):
        needs = {makers[name] for name in step.inputs.values() if name in makers}
        needs = needs or ({ends} if ends >= 0 else set())
        makers |= {name: len(route) for name in step.outputs.values()}
        route.append(Step(step.stage.name, tuple(sorted(needs))))
    return tuple(route)


def poisson(rate: float, jobs: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Times of arrival [jobs] of a Poisson process."""
    return np.cumsum(generator.exponential(1 / rate, jobs))


def open_loop(
    stations: Sequence[Station],
    route: Sequence[Step],
    resources: Mapping[str, float],
    arrivals: Sequence[float] | NDArray[np.float64],
    seed: int = 0,
) -> Outcome:
    """Jobs that arrive at given times, whatever the state of the system. Raises ValueError on a route or a resource
    that does not exist."""
    return _Simulation(stations, route, resources, seed).run(list(map(float, arrivals)), 0)


def closed_loop(
    stations: Sequence[Station],
    route: Sequence[Step],
    resources: Mapping[str, float],
    clients: int,
    jobs: int,
    seed: int = 0,
) -> Outcome:
    """`clients` that each send the next job when the last one is answered, until `jobs` were sent: at many clients,
    the saturation."""
    return _Simulation(stations, route, resources, seed).run([0.0] * min(clients, jobs), jobs - min(clients, jobs))


@dataclass
class _Resource:
    """`clock_s` is how much work each running execution has received: they all run at one speed, so the next to end is
    the one whose clock time is next."""

    capacity: float
    clock_s: float = 0.0
    threads: float = 0.0
    used_s: float = 0.0
    running: list[tuple[float, int, "_Execution"]] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return min(1.0, self.capacity / self.threads) if self.threads > 0 else 1.0

    def advance(self, seconds: float) -> None:
        self.clock_s += seconds * self.speed
        self.used_s += seconds * min(self.threads, self.capacity)

    def next_end_s(self) -> float:
        return max(0.0, self.running[0][0] - self.clock_s) / self.speed if self.running else inf


@dataclass(frozen=True)
class _Execution:
    station: Station
    threads: float
    tasks: list[tuple[int, int]]  # job, step


class _Simulation:
    def __init__(
        self, stations: Sequence[Station], route: Sequence[Step], resources: Mapping[str, float], seed: int
    ) -> None:
        self.stations = {station.name: station for station in stations}
        self.route = tuple(route)
        for place, step in enumerate(self.route):
            if step.station not in self.stations or any(not 0 <= need < place for need in step.needs):
                raise ValueError(f"step {place} of the route: unknown station or later step in {step}")
        for station in stations:
            if resources.get(station.resource, 0) <= 0:
                raise ValueError(f"station {station.name} runs on {station.resource!r}: no such resource")
        self.resources = {name: _Resource(capacity) for name, capacity in resources.items()}
        self.followers = [
            [i for i, step in enumerate(self.route) if place in step.needs] for place in range(len(route))
        ]
        self.generator = np.random.default_rng((seed, len(route)))  # not that of arrivals drawn with the same seed
        self.waiting: dict[str, deque[tuple[int, int]]] = {name: deque() for name in self.stations}
        self.free = {station.name: station.instances for station in stations}
        self.executions, self.tasks = dict.fromkeys(self.stations, 0), dict.fromkeys(self.stations, 0)
        self.order = count()

    def run(self, arrivals: list[float], more: int) -> Outcome:
        """`more`: jobs that follow at the moment an earlier one ends."""
        arrivals.sort()
        open_needs: dict[int, list[int]] = {}  # of the jobs inside: how many steps each step still waits for
        left: dict[int, int] = {}
        ended: list[float] = [0.0] * len(arrivals)
        now, arrived, inside = 0.0, 0, 0
        while arrived < len(arrivals) or inside:
            name, wait_s = self._next_end()
            until = min(now + wait_s, arrivals[arrived] if arrived < len(arrivals) else inf)
            for resource in self.resources.values():
                resource.advance(until - now)
            comes = arrived < len(arrivals) and arrivals[arrived] <= now + wait_s
            now = until
            if comes:
                open_needs[arrived] = [len(step.needs) for step in self.route]
                left[arrived] = len(self.route)
                inside += 1
                self._enqueue((arrived, place) for place, step in enumerate(self.route) if not step.needs)
                arrived += 1
                continue
            for job, place in self._end(name).tasks:
                ready = []
                for follower in self.followers[place]:
                    open_needs[job][follower] -= 1
                    if not open_needs[job][follower]:
                        ready.append((job, follower))
                self._enqueue(ready)
                left[job] -= 1
                if not left[job]:
                    ended[job] = now
                    inside -= 1
                    del open_needs[job], left[job]
                    if more:
                        more -= 1
                        arrivals.append(now)
                        ended.append(0.0)
        seconds = now - arrivals[0]
        return Outcome(
            np.array(ended) - np.array(arrivals),
            seconds,
            {name: each.used_s / (each.capacity * seconds) for name, each in self.resources.items()},
            {name: self.tasks[name] / done for name, done in self.executions.items() if done},
        )

    def _next_end(self) -> tuple[str, float]:
        return min(((name, each.next_end_s()) for name, each in self.resources.items()), key=lambda pair: pair[1])

    def _enqueue(self, tasks) -> None:
        touched = []
        for job, place in tasks:
            name = self.route[place].station
            self.waiting[name].append((job, place))
            touched.append(name)
        for name in touched:
            self._start(name)

    def _start(self, name: str) -> None:
        station, waiting = self.stations[name], self.waiting[name]
        while waiting and self.free[name]:
            batch = [waiting.popleft() for _ in range(min(station.max_batch, len(waiting)))]
            self.free[name] -= 1
            self.executions[name] += 1
            self.tasks[name] += len(batch)
            resource = self.resources[station.resource]
            end_s = resource.clock_s + station.work(len(batch), self.generator)
            execution = _Execution(station, station.threads(len(batch)), batch)
            heappush(resource.running, (end_s, next(self.order), execution))
            resource.threads += execution.threads

    def _end(self, name: str) -> _Execution:
        """Take the next execution to end off its resource, and let the station begin another."""
        resource = self.resources[name]
        execution = heappop(resource.running)[2]
        resource.threads = max(0.0, resource.threads - execution.threads) if resource.running else 0.0
        self.free[execution.station.name] += 1
        self._start(execution.station.name)
        return execution
