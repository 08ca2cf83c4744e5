"""Images in a span of time: throughput and latency, one definition for every runtime. Imports nothing heavy."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

MIN_BATCHES = 2  # a rate of one batch has no spread


@dataclass(frozen=True)
class Rate:
    """`images` answered in `seconds`; `latencies_ms` has one entry for each call (in process) or request (server).
    `cpu_s` is the time that the cores spent on them: unlike the others it hardly depends on what else was running."""

    images: int
    seconds: float
    latencies_ms: tuple[float, ...]
    cpu_s: float = math.nan

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Of one image, summed over the cores."""
        return 1e3 * self.cpu_s / self.images

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the calls do not exceed, in ms; linear between two calls."""
        return float(np.percentile(self.latencies_ms, percent))


def together(rates: Sequence[Rate]) -> Rate:
    """Several spans of the same measurement as one."""
    return Rate(
        sum(rate.images for rate in rates),
        sum(rate.seconds for rate in rates),
        tuple(latency for rate in rates for latency in rate.latencies_ms),
        sum(rate.cpu_s for rate in rates),
    )


def batches(images: Sequence[bytes], size: int) -> Iterator[list[bytes]]:
    """Batches of `size`, the images over and over."""
    endless = cycle(images)
    while True:
        yield list(islice(endless, size))


def measure(run: Callable[[list[bytes]], object], images: Sequence[bytes], batch: int, seconds: float) -> Rate:
    """Call `run` on batches of encoded images, one after the other, for about `seconds`. The first call is a warm-up:
    engines compile for a new batch size in it."""
    source = batches(images, batch)
    run(next(source))
    latencies: list[float] = []
    began, cpu_began = time.perf_counter(), time.process_time()
    while len(latencies) < MIN_BATCHES or time.perf_counter() - began < seconds:
        sent = time.perf_counter()
        run(next(source))
        latencies.append(1e3 * (time.perf_counter() - sent))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return Rate(batch * len(latencies), seconds, tuple(latencies), cpu_s)


def session_cpu_s(leader: int) -> float:
    """Seconds of CPU that the living processes of the session led by `leader` have used: a server with its backends."""
    return sum(seconds for _, seconds in session_processes(leader))


def session_processes(leader: int) -> list[tuple[list[str], float]]:
    """Arguments and seconds of CPU of every living process of the session led by `leader`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()  # a name may hold spaces; what follows does not
            arguments = status.with_name("cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == leader:
            found.append((arguments, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")))
    return found


def machine_core_s() -> tuple[float, float]:
    """Seconds of all cores that this machine's programs have used since it started, and those that its hypervisor took
    for others."""
    user, nice, system, _, _, irq, softirq, stolen, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    hz = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / hz, stolen / hz


def unsteadiness_ms(repeats: int = 200) -> list[float]:
    """Milliseconds of the same computation on one core, over and over: what a latency here varies by of itself."""
    numbers = np.random.default_rng(0).random(300_000)
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        np.sort(numbers)
        found.append(1e3 * (time.perf_counter() - began))
    return found[1:]
