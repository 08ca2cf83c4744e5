"""Every op beside its named baseline, in one run: `scaphoid-bench ops`.

An op, the forms of its baseline and the bound are measured in turn, in rounds, so that what else the machine does hits
all of them. Before that the op's results are held against every form's: a comparison of two different computations
would be worthless.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scaphoid.bench.comparison import tell
from scaphoid.bench.memory import NotGlibc, kept_memory
from scaphoid.bench.op_cases import CASES, Bar, Case, Contender, Op, Run, Unavailable
from scaphoid.bench.peaks import machine, peaks
from scaphoid.bench.report import Report, Table

SEED = 448
SPAN_MS = 4.0  # of one sample: as many runs as take about so long
ROUNDS = (10, 400)  # at least, at most


class Disagreement(Exception):
    """An op and its baseline do not compute the same."""


@dataclass(frozen=True)
class OpsBench:
    """Measure every op beside what a user has without it: torch, NumPy, scikit-image."""

    device: str = "cpu"
    """cpu or cuda. On cuda each op is measured inside a CUDA graph as well."""
    threads: tuple[int, ...] = (1, 2)
    """Torch's threads; every case is measured with each number of them. On cuda one is enough."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which cases."""
    seconds: float = 6.0
    """For the rounds of one case with one number of threads."""
    out: Path | None = None
    """Folder for the report: ops_cpu.md and ops_cpu.json."""
    json: bool = False
    """Print the report as JSON."""

    @property
    def name(self) -> str:
        return f"ops_{self.device}"


@dataclass(frozen=True)
class Measured:
    """One case with one number of threads: `times_ms[name]` has one call's time in every round."""

    case: Case
    threads: int
    times_ms: dict[str, np.ndarray]

    def best(self, contenders: Sequence[Contender]) -> Contender:
        return min(contenders, key=lambda contender: statistics.median(self.times_ms[contender.name]))


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of one time over another, with its 95 % interval."""

    times: float
    low: float
    high: float


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Ratio:
    """Of times taken in the same rounds. The interval is of order statistics, without assumptions on how times spread:
    a median's rank has mean n/2 and deviation sqrt(n)/2."""
    ratios = np.sort(numerator / denominator)
    reach = 0.98 * math.sqrt(len(ratios))
    low = max(0, math.floor(len(ratios) / 2 - reach))
    high = min(len(ratios) - 1, math.ceil(len(ratios) / 2 + reach) - 1)
    return Ratio(float(np.median(ratios)), float(ratios[low]), float(ratios[high]))


def bench_ops(arguments: OpsBench) -> Report:
    """Raises ValueError for a device or case that does not exist here and Disagreement."""
    device = the_device(arguments.device)
    if unknown := set(arguments.cases) - set(CASES):
        raise ValueError(f"unknown cases {', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    here = machine()  # before this run adds to the load average
    limits = peaks(threads=arguments.threads)
    measured: list[Measured] = []
    agreements: list[tuple] = []
    skipped: list[str] = []
    before = torch.get_num_threads()
    try:
        for name in arguments.cases:
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                tell(f"{name}, {threads} thread" + "s" * (threads > 1))
                try:
                    case = CASES[name](device, torch.Generator().manual_seed(SEED))
                    agreements += agreement(case)
                    measured.append(measure_case(case, threads, device, arguments.seconds))
                except (Unavailable, NotGlibc) as reason:
                    skipped.append(f"{name} was skipped: {reason}")
    finally:
        torch.set_num_threads(before)
    facts = [
        "one sample is the mean of the calls in about 4 ms; a round takes a sample of everything that a case compares; "
        "a ratio is the median of the rounds' ratios, with its 95 % interval; a bar is met when the whole interval is",
        *dict.fromkeys(skipped),
    ]
    if here.busy:
        facts.insert(0, f"NOT AN IDLE MACHINE: {here.load_1min:.1f} tasks on {here.cores} cores in the minute before")
    subject = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
    tables = (bars_table(measured), times_table(measured), agreement_table(agreements))
    return Report(f"Ops beside their baselines, {arguments.device}", subject, tuple(facts), here, limits, tables)


def the_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can use; here is none, so use --device cpu")
    return torch.device(name)


def agreement(case: Case) -> Iterator[tuple[str, str, str, float, float]]:
    """Rows of the agreement table. Raises Disagreement."""
    for op in case.ops:
        result = op.op.run()
        for form in case.baselines:
            difference = op.difference(result, form.run())
            if not difference <= op.tolerance:
                raise Disagreement(
                    f"{op.op.name} and {form.name!r} differ by {difference:g} in {op.measure}, allowed are "
                    f"{op.tolerance:g}: they do not compute the same, so comparing their times means nothing"
                )
            yield op.op.name, form.name, op.measure, difference, op.tolerance


def measure_case(case: Case, threads: int, device: torch.device, seconds: float) -> Measured:
    clock = cuda_ms if device.type == "cuda" else wall_ms
    contenders = [*(op.op for op in case.ops), *case.baselines, *(bound for op in case.ops for bound in op.bounds)]
    if device.type == "cuda":
        contenders += [in_graph(op.op) for op in case.ops if "backward" not in op.op.name]
    with torch.no_grad(), kept_memory() if case.kept and device.type == "cpu" else nullcontext():
        return Measured(case, threads, in_turn(contenders, clock, seconds))


def wall_ms(run: Run, times: int) -> float:
    """`times` runs, in ms."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return 1e3 * (time.perf_counter() - began)


def cuda_ms(run: Run, times: int) -> float:
    """The same on the current CUDA stream, between two events: waiting for the host counts where a run needs it."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(times):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def in_graph(contender: Contender) -> Contender:
    """The same work captured in a CUDA graph, which is then replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contender.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.run()
    return Contender(f"{contender.name}, CUDA graph", graph.replay, contender.calls)


def in_turn(
    contenders: Sequence[Contender], clock: Callable[[Run, int], float], seconds: float
) -> dict[str, np.ndarray]:
    """One call's time in ms of every contender in every round, by name. Every round begins with another one."""
    times = [sample_size(contender.run, clock) for contender in contenders]
    samples: list[list[float]] = [[] for _ in contenders]
    began = time.perf_counter()
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() - began > seconds:
            break
        for place in range(len(contenders)):
            k = (number + place) % len(contenders)
            samples[k].append(clock(contenders[k].run, times[k]) / times[k] / contenders[k].calls)
    return {contender.name: np.array(each) for contender, each in zip(contenders, samples, strict=True)}


def sample_size(run: Run, clock: Callable[[Run, int], float]) -> int:
    """Runs in one sample. Warms up."""
    clock(run, 1)
    fastest = min(clock(run, 1) for _ in range(3))
    return max(1, round(SPAN_MS / max(fastest, 1e-3)))


def bars_table(measured: Sequence[Measured]) -> Table:
    """Each op against the best form of its baseline, and against the bound."""
    columns = (
        "op",
        "threads (count)",
        "best baseline",
        "op p50 (ms)",
        "baseline p50 (ms)",
        "baseline over op (times)",
        "from (times)",
        "to (times)",
        "bar",
        "verdict",
        "bound",
        "bound p50 (ms)",
        "op over bound (times)",
        "at most possible (times)",
    )
    return Table("Bars", columns, tuple(bar_row(each, op) for each in measured for op in each.case.ops))


def bar_row(measured: Measured, op: Op) -> tuple:
    """`at most possible`: what a baseline over op could be if the op were as fast as its bound."""
    baseline = measured.best(measured.case.baselines)
    op_ms, baseline_ms = measured.times_ms[op.op.name], measured.times_ms[baseline.name]
    gain = ratio(baseline_ms, op_ms)
    p50 = (float(np.median(op_ms)), float(np.median(baseline_ms)))
    row = (op.op.name, measured.threads, baseline.name, *p50, gain.times, gain.low, gain.high)
    if not op.bounds:
        return (*row, str(op.bar or "-"), verdict(op.bar, gain, None), "-", None, None, None)
    bound = measured.best(op.bounds)
    bound_ms = measured.times_ms[bound.name]
    cost = ratio(op_ms, bound_ms)
    possible = ratio(baseline_ms, bound_ms).times
    bound_cells = (bound.name, float(np.median(bound_ms)), cost.times, possible)
    return (*row, str(op.bar or "-"), verdict(op.bar, gain, cost), *bound_cells)


def verdict(bar: Bar | None, gain: Ratio, cost: Ratio | None) -> str:
    """Met when the whole interval is on the right side."""
    if bar is None:
        return "-"
    met = cost is not None and cost.high <= bar.times if bar.of_bound else gain.low >= bar.times
    return "met" if met else "MISSED"


def times_table(measured: Sequence[Measured]) -> Table:
    rows = []
    for each in measured:
        for name, times in each.times_ms.items():
            percentiles = (float(value) for value in np.percentile(times, (50, 5, 95)))
            rows.append((each.case.name, each.case.input, name, each.threads, *percentiles, len(times)))
    columns = ("case", "input", "what", "threads (count)", "p50 (ms)", "p5 (ms)", "p95 (ms)", "rounds (count)")
    return Table("Times of one call", columns, tuple(rows))


def agreement_table(rows: Sequence[tuple]) -> Table:
    """Worst difference over the numbers of threads."""
    worst: dict[tuple, tuple] = {}
    for op, form, measure, difference, tolerance in rows:
        seen = worst.get((op, form))
        worst[op, form] = (op, form, measure, max(difference, seen[3] if seen else 0.0), tolerance)
    columns = ("op", "baseline", "compared", "difference (its unit)", "allowed (its unit)")
    return Table("Agreement before timing", columns, tuple(worst.values()))
