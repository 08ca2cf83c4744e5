"""Cost against AUROC of a two-call triage, from served answers: the band fitted on one set, judged on another.

What the first call costs is measured on the same server: core-seconds of its processes for an image, which hardly
depend on what else the machine does, and images/s of both calls in turn.
"""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaphoid.bench.comparison import tell
from scaphoid.bench.peaks import machine
from scaphoid.bench.report import Report, Table
from scaphoid.bench.server_load import LoadError, ensemble, server_load
from scaphoid.bench.timing import session_cpu_s
from scaphoid.trainer.band import EVERYBODY, FIRST, NOBODY, Answerer, Fitted, write_band
from scaphoid.trainer.data.index import FILE_NAME, Index, read_index
from scaphoid.trainer.data.phantom.generate import TEST, generate, generate_frozen
from scaphoid.trainer.journal import weights_of
from scaphoid.trainer.metrics import Estimate, classification_metrics, paired_differences
from scaphoid.trainer.triage import Point, Scores, cascade, curve, draw, fit, point, validation_of
from scaphoid.triton_repo.client import AsyncClient, ClientError, Result, wanted_outputs
from scaphoid.triton_repo.supervisor.server import Server, running_server
from scaphoid.triton_repo.triage import TriageClient

VALIDATION_SEED = 550_071  # neither the training nor the held-out phantoms'
MANY = 1_000_000


@dataclass(frozen=True)
class Triage:
    """Draw cost against AUROC of asking the first stage first, from answers of the real server."""

    repository: Path
    """Folder that scaphoid.triton_repo.assemble wrote, of trained weights."""
    flow: str = "msfm"
    """msfm or msfm_fma: KALM's first stage cannot be asked alone."""
    validation: Path | None = None
    """Folder or index.csv that the band is fitted on; phantoms of a seed of their own when not given."""
    test: Path | None = None
    """Folder or index.csv that it is judged on; the frozen held-out phantoms when not given."""
    images: int = 1500
    """Validation phantoms to draw."""
    max_loss: float = 0.002
    """AUROC that the band may lose on the validation images."""
    boxes: bool = False
    """Everything above the band gets the whole answer too, for its box."""
    clients: int = 8
    seconds: float = 15.0
    """Length of each of the spans in which the first call and the whole answer are measured in turn."""
    rounds: int = 3
    out: Path = Path("runs/bench/triage")
    """Folder for phantoms, the report, its picture and the fitted band (for scaphoid-predict --triage)."""

    @property
    def name(self) -> str:
        return f"triage_{self.flow}"


@dataclass(frozen=True)
class Cost:
    """Of a first call and a whole answer: core-ms of the server's processes for an image, and images/s by round."""

    first_core_ms: float
    whole_core_ms: float
    first_rates: tuple[float, ...]
    whole_rates: tuple[float, ...]

    @property
    def relative(self) -> float:
        return self.first_core_ms / self.whole_core_ms

    @property
    def by_rate(self) -> float:
        pairs = zip(self.whole_rates, self.first_rates, strict=True)
        return statistics.median(whole / first for whole, first in pairs)


def triage(arguments: Triage) -> Report:
    """Serve, predict both sets, measure the costs, fit, judge, and serve the fitted triage once. Raises ValueError,
    ManifestError, ServerError, LoadError and OSError."""
    if arguments.flow not in FIRST:
        raise ValueError(f"flow {arguments.flow!r} has no first stage to ask: expected one of {', '.join(FIRST)}")
    here = machine()
    tell("starting Triton")
    # First of all, for it refuses a repository that is missing or damaged: drawing phantoms takes minutes.
    with running_server(arguments.repository, [arguments.flow], report=tell) as server:
        validation_set, test_set = sets(arguments)
        validation = asyncio.run(whole_answers(server, arguments, validation_set))
        test = asyncio.run(whole_answers(server, arguments, test_set))
        cost = measure_cost(server, arguments, files_of(test_set)[:64])
        fitted = fit(validation, cost.relative, arguments.max_loss, boxes=arguments.boxes)
        tell(f"serving the triage with {fitted.band.low:.3f} to {fitted.band.high:.3f}")
        served, served_core_ms, version = asyncio.run(serve(server, arguments, test_set, fitted))
    points = curve(validation, cost.relative, arguments.boxes)
    both = {"validation, fitted on": validation, "test": test}
    draw(both, points, fitted.band, cost.relative, arguments.out / f"{arguments.name}.png")
    if fitted.band != EVERYBODY:  # who used that one would ask twice about every image
        answerer = Answerer(arguments.flow, weights_of(version), parts=True)
        band = Fitted(fitted.band, answerer, validation_of(validation, fitted, cost.relative))
        write_band(arguments.out / f"{arguments.name}_band.json", band)
    expected = cascade(test, fitted.band)
    off = float(np.abs(served - expected).max())
    on_test = point(test, fitted.band, cost.relative)
    facts = [
        f"the band is fitted on the validation images for an AUROC loss of at most {arguments.max_loss}, among nested "
        "bands around the first stage's best threshold; every band is judged on the test images",
        "cost: core-time of the server for an image, relative to a whole answer for every image; an image within the "
        "band pays for the first call and for the whole answer",
        f"a first call costs {100 * cost.relative:.0f} % of a whole answer's core-time; by images/s at "
        f"{arguments.clients} clients, in turn, {100 * cost.by_rate:.0f} % (median of {arguments.rounds} rounds)",
        f"served with the fitted band: {100 * on_test.share:.0f} % of the test images asked twice, "
        f"{100 * served_core_ms / cost.whole_core_ms:.0f} % of the core-time (predicted: {100 * on_test.cost:.0f} %), "
        f"scores within {off:.1e} of the cascade computed from whole answers",
    ]
    if here.busy:
        facts.append(f"not an idle machine ({here.load_1min:.1f} tasks on {here.cores} cores): images/s say little")
    subject = {
        "flow": arguments.flow,
        "repository": arguments.repository.name,
        "validation (images)": len(validation.labels),
        "test (images)": len(test.labels),
        "band from (probability)": fitted.band.low,
        "band to (probability)": fitted.band.high,
    }
    tables = (curve_table(points, validation, test, fitted, cost), cost_table(cost, served_core_ms))
    return Report(f"Triage of {arguments.flow}", subject, tuple(facts), here, None, tables)


def sets(arguments: Triage) -> tuple[Index, Index]:
    """Validation and test images; the phantoms are drawn once."""
    found = []
    for given, name in ((arguments.validation, "validation"), (arguments.test, "test")):
        folder = arguments.out / name
        if given is None and not (folder / FILE_NAME).is_file():
            tell(f"drawing {TEST.images if name == 'test' else arguments.images} {name} phantoms")
            if name == "test":
                generate_frozen(folder, TEST, workers=2)
            else:
                generate(folder, arguments.images, VALIDATION_SEED, "valid", workers=2)
        found.append(read_index(given or folder))
    return found[0], found[1]


def files_of(index: Index) -> list[bytes]:
    return [index.path(radiograph).read_bytes() for radiograph in index.radiographs]


async def whole_answers(server: Server, arguments: Triage, index: Index) -> Scores:
    tell(f"{len(index)} whole answers")
    async with AsyncClient(server.grpc_url, arguments.flow, in_flight=arguments.clients) as client:
        answers = _all(await client.predict_all(index.path(radiograph) for radiograph in index.radiographs))
    stage = FIRST[arguments.flow].removesuffix("_probability")
    return Scores(
        np.array([radiograph.label for radiograph in index.radiographs]),
        np.array([answer.stages[stage] for answer in answers]),
        np.array([answer.score for answer in answers]),
        np.array([radiograph.patient for radiograph in index.radiographs]),
    )


def _all(answers: Sequence[Result | ClientError]) -> list[Result]:
    if failed := [answer for answer in answers if isinstance(answer, ClientError)]:
        raise LoadError(f"{len(failed)} of {len(answers)} images were not answered, the first: {failed[0]}")
    return list(answers)


def measure_cost(server: Server, arguments: Triage, images: Sequence[bytes]) -> Cost:
    """Both calls in turn, in rounds: what else the machine does then hits both."""
    calls = {"first": (FIRST[arguments.flow],), "whole": wanted_outputs(arguments.flow, True)}
    core_s, done, rates = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0), {name: [] for name in calls}
    for number in range(1, arguments.rounds + 1):
        tell(f"cost, round {number} of {arguments.rounds}")
        for name, wanted in calls.items():
            before = session_cpu_s(server.pid)
            bounds = (arguments.clients, MANY, arguments.seconds)
            load = asyncio.run(
                server_load(server.grpc_url, ensemble(server.grpc_url, arguments.flow, wanted), images, *bounds)
            )
            core_s[name] += session_cpu_s(server.pid) - before
            done[name] += load.stages["preprocess"].images
            rates[name].append(load.rate.images_per_s)
            if load.failures:
                raise LoadError(f"{len(load.failures)} requests failed, the first: {load.failures[0]}")
    core_ms = {name: 1e3 * core_s[name] / done[name] for name in calls}
    return Cost(core_ms["first"], core_ms["whole"], tuple(rates["first"]), tuple(rates["whole"]))


async def serve(server: Server, arguments: Triage, index: Index, fitted: Point) -> tuple[np.ndarray, float, str]:
    """The scores of the served triage, the server's core-ms for an image, and the model version that answered."""
    before = session_cpu_s(server.pid)
    async with TriageClient(server.grpc_url, fitted.band, arguments.flow, in_flight=arguments.clients) as client:
        paths = [index.path(radiograph) for radiograph in index.radiographs]
        answers = _all(await client.predict_all(paths, arguments.clients))
    scores = np.array([answer.probability for answer in answers])
    return scores, 1e3 * (session_cpu_s(server.pid) - before) / len(index), client.full.version


def curve_table(points: Sequence[Point], validation: Scores, test: Scores, fitted: Point, cost: Cost) -> Table:
    """Every other band, nobody and everybody among them, and the fitted one."""
    rows = []
    for each in [each for place, each in enumerate(points) if place % 2 == 0 or each.band in (fitted.band, EVERYBODY)]:
        found, on_test, difference = judged(test, each, cost)
        what = {NOBODY: "first stage alone", EVERYBODY: "whole answer"}.get(each.band, "band")
        what = "fitted band" if each.band == fitted.band else what
        edges = (None, None) if each.band == NOBODY else each.band
        rows.append((what, *edges, 100 * found.share, found.cost, each.auroc, *shown(on_test), *shown(difference)))
    interval = ("from", "to")
    columns = (
        *("what", "band from (probability)", "band to (probability)", "within, test (%)", "cost, test (times)"),
        *("AUROC, validation (area)", "AUROC, test (area)", *(f"{end} (area)" for end in interval)),
        *("less than whole, test (area)", *(f"difference {end} (area)" for end in interval)),
    )
    return Table("Cost against AUROC", columns, tuple(rows))


def judged(test: Scores, each: Point, cost: Cost) -> tuple[Point, Estimate, Estimate]:
    """A validation band on the test images: what it costs, its AUROC, and the paired difference to whole answers."""
    scores = cascade(test, each.band)
    auroc = classification_metrics(test.labels, scores, test.patients)["auroc"]
    difference = paired_differences(test.labels, test.full, scores, test.patients)["auroc"]
    return point(test, each.band, cost.relative), auroc, difference


def shown(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def cost_table(cost: Cost, served_core_ms: float) -> Table:
    rows = (
        ("first call", cost.first_core_ms, cost.relative, statistics.median(cost.first_rates)),
        ("whole answer", cost.whole_core_ms, 1.0, statistics.median(cost.whole_rates)),
        ("triage as served", served_core_ms, served_core_ms / cost.whole_core_ms, None),
    )
    columns = ("call", "core-time (ms an image)", "of a whole answer (times)", "rate (images/s)")
    return Table("What a call costs", columns, rows)
