"""What a soak found: the account of what came back, the bars it is held against, and the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaphoid.bench.peaks import Machine
from scaphoid.bench.processes import Held
from scaphoid.bench.report import Cell, Report, Table
from scaphoid.bench.server_load import LoadError
from scaphoid.bench.soak_images import RTOL
from scaphoid.trainer.flows import FLOWS

WARM_UP_SHARE, WARM_UP_S = 0.2, 300.0  # memory pools fill in it; the shorter of the two
RSS_GROWTH = 0.02  # bar
SLACK = 2  # descriptors, files: a connection may be opened anew at the moment of a sample
RIGHT, WRONG, LOST, REFUSED, ACCEPTED = "right", "wrong", "lost", "refused", "accepted"


@dataclass
class Account:
    """What came back, and when: requests by (flow, outcome) of good and of bad files, the first of each fault, and how
    often the client had to try a request again: that must not hide a fault of the server."""

    good: Counter = field(default_factory=Counter)
    bad: Counter = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    tried_again: int = 0

    def total(self, *outcomes: str) -> int:
        return sum(count for (_, outcome), count in (self.good + self.bad).items() if outcome in outcomes)


@dataclass(frozen=True)
class Verdict:
    """`growth` is of the median over the last fifth of the samples against that over the first fifth after warm-up."""

    growth: float
    more_descriptors: float
    more_shared_files: float
    more_shared_mib: float
    left_behind: int
    missed: tuple[str, ...]


def judge(account: Account, samples: Sequence[Held], left: int, events: Sequence[str]) -> Verdict:
    """Hold what came back and what the server held against the bars. `left`: files of shared memory after the stop;
    `events`: what the supervisor told after the start. Raises LoadError when there is too little to judge."""
    counted = after_warm_up(samples)
    if len(counted) < 5 or not account.total(RIGHT):
        raise LoadError(f"too short a soak: {account.total(RIGHT)} right answers, {len(counted)} samples after warm-up")
    fifth = max(1, len(counted) // 5)

    def grown(name: str) -> tuple[float, float]:
        values = [getattr(each, name) for each in counted]
        return float(np.median(values[:fifth])), float(np.median(values[-fifth:]))

    first, last = grown("rss_mib")
    growth = last / first - 1
    descriptors, files, shared = (
        (lambda pair: pair[1] - pair[0])(grown(name)) for name in ("descriptors", "shared_files", "shared_mib")
    )
    bars = {
        f"{account.total(WRONG)} good images answered wrong": account.total(WRONG),
        f"{account.total(LOST)} requests lost": account.total(LOST),
        f"{account.total(ACCEPTED)} bad files answered": account.total(ACCEPTED),
        f"{account.tried_again} requests failed at first and were tried again": account.tried_again,
        f"resident memory grew by {100 * growth:.1f} %, more than {100 * RSS_GROWTH:g} %": growth > RSS_GROWTH,
        f"{descriptors:g} more descriptors": descriptors > SLACK,
        f"{files:g} more files of shared memory": files > SLACK,
        f"shared memory grew by {shared:.1f} MiB": shared > 1 and shared > RSS_GROWTH * grown("shared_mib")[0],
        f"{left} files of shared memory left behind": left,
        f"the supervisor had to step in: {events[0] if events else ''}": len(events),
    }
    return Verdict(growth, descriptors, files, shared, left, tuple(line for line, missed in bars.items() if missed))


def after_warm_up(samples: Sequence[Held]) -> list[Held]:
    end = samples[-1].at_s if samples else 0.0
    return [each for each in samples if each.at_s >= min(WARM_UP_S, WARM_UP_SHARE * end)]


def report_of(
    subject: dict[str, Cell],
    seconds: float,
    here: Machine,
    account: Account,
    samples: Sequence[Held],
    names: Mapping[str, float],
    verdict: Verdict,
) -> Report:
    """`subject` is what was soaked, `seconds` how long; `names` the memory of the processes by name at the end."""
    facts = [
        f"{account.total(RIGHT)} good answers, each equal to that of the engines in process within {RTOL:g} "
        "(relative and absolute)",
        "descriptors and memory: all processes of the server's session; a page counts for each process that maps it",
        *(f"{what}: {why}" for what, why in account.faults.items()),
    ]
    if here.busy:
        facts.append(
            f"NOT AN IDLE MACHINE: {here.load_1min:.1f} tasks on {here.cores} cores in the minute before: the "
            "latencies say little; answers, memory and leaks are what this report is for"
        )
    outcomes = []
    for flow in FLOWS:
        good = [account.good[flow, each] for each in (RIGHT, WRONG, LOST)]
        bad = [account.bad[flow, each] for each in (REFUSED, ACCEPTED, LOST)]
        outcomes.append((flow, sum(good), *good, *bad))
    columns = (
        *("flow", "good (requests)", "right (requests)", "wrong (requests)", "lost (requests)"),
        *("bad refused (requests)", "bad answered (requests)", "bad lost (requests)"),
    )
    percentiles = np.percentile(account.latencies_ms, (50, 99)).tolist()
    rate = (len(account.latencies_ms), len(account.latencies_ms) / seconds, *percentiles, max(account.latencies_ms))
    counted = after_warm_up(samples)
    shown = [counted[place] for place in np.linspace(0, len(counted) - 1, min(12, len(counted))).round().astype(int)]
    rows = [
        (each.at_s, each.processes, each.rss_mib, each.descriptors, each.shared_files, each.shared_mib)
        for each in shown
    ]
    grown = (100 * verdict.growth, verdict.more_descriptors, verdict.more_shared_files, verdict.more_shared_mib)
    tables = (
        Table("Answers", columns, tuple(outcomes)),
        Table("Rate", ("requests (count)", "rate (requests/s)", "p50 (ms)", "p99 (ms)", "slowest (ms)"), (rate,)),
        Table(
            "Growth after warm-up",
            ("memory (%)", "descriptors (count)", "shared files (count)", "shared memory (MiB)", "left behind (files)"),
            ((*grown, verdict.left_behind),),
        ),
        Table(
            "What the server held",
            (
                *("after (s)", "processes (count)", "resident memory (MiB)", "descriptors (count)"),
                *("shared files (count)", "shared memory (MiB)"),
            ),
            tuple(rows),
        ),
        Table("Resident memory at the end", ("process", "together (MiB)"), tuple(sorted(names.items()))),
    )
    return Report("Soak of the server", subject, tuple(facts), here, None, tables, verdict.missed)
