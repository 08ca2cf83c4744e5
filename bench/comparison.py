"""One flow in one run: eager fp32, the exported engines in process, and the real Triton server, on the same PNG bytes.

The server is asked in three ways: the ensemble for a PNG file, the ensemble for the same pixels (PGM) in shared memory,
and the ensemble's models one after the other by the client, which is what an ensemble saves. In process and every way
are measured in turn, in rounds: what else the machine does then hits all.
"""

import asyncio
import io
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from scaphoid.bench.chained import ChainedClient
from scaphoid.bench.flow import eager_flow, engine_flow, gflop_an_image, sweep, untrained_weights
from scaphoid.bench.peaks import Machine, Peaks, machine, peaks
from scaphoid.bench.report import Report, Table
from scaphoid.bench.server_load import Connect, Load, StageTotals, ensemble, server_load
from scaphoid.bench.timing import Rate, measure, session_cpu_s, together
from scaphoid.export.export import export
from scaphoid.export.precision import Precision, effective_precision
from scaphoid.trainer.data.dicom import to_pgm
from scaphoid.trainer.data.index import read_index
from scaphoid.trainer.data.phantom.generate import generate
from scaphoid.triton_repo.assemble import assemble
from scaphoid.triton_repo.client import wanted_outputs
from scaphoid.triton_repo.supervisor.server import running_server

PHANTOMS = 16  # different images, sent over and over
PHANTOM_SEED = 448
GATE_IMAGES = 8  # of the gate of the export: a ResNet-50 flow takes seconds an image
EAGER_BATCHES = (1, 4)
REQUESTS_TIMES = 4  # the bound on requests: so many times what the flow does in process
FILES, PIXELS, CHAINED = "PNG files", "pixels in shared memory", "steps chained by the client"
WAYS = (FILES, PIXELS, CHAINED)  # to ask the server
BARS = {FILES: 0.9, PIXELS: 0.95}  # of in process, for a model of ResNet-50's size; and more than CHAINED
RATE_COLUMNS = ("rate (images/s)", "p50 (ms)", "p95 (ms)", "p99 (ms)")


@dataclass(frozen=True)
class Comparison:
    """Measure one flow: eager fp32, exported engines in process, the real Triton server, on the same encoded images."""

    flow: str = "msfm"
    """msfm, msfm_fma or kalm."""
    backbone: str = "resnet50"
    """timm backbone of an untrained model at the papers' sizes; nothing is downloaded."""
    weights: Path | None = None
    """A trained weights file to measure in place of an untrained model."""
    precision: Precision = "f32"
    """What the engines compute in, where the CPU can."""
    clients: int = 8
    """Connections to the server, each with one request in flight."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Images in a batch in process; the fastest is held against the server."""
    seconds: float = 20.0
    """Length of each of the rounds' spans; the sweep over batches takes half of it for each."""
    rounds: int = 3
    """How often in process and each way to ask the server are measured, in turn."""
    parts: bool = True
    """Classify MSFM's windows as well: about half of its arithmetic."""
    out: Path = Path("runs/bench")
    """Folder for artefacts, model repository, images and the report."""

    @property
    def name(self) -> str:
        """Of the report, and of what is left in `out`."""
        model = self.weights.stem if self.weights else f"untrained_{self.backbone}"
        return f"{self.flow}_{model}_{self.precision}" + ("" if self.parts else "_without_parts")


@dataclass(frozen=True)
class Measured:
    """All of one run of `compare`. `engine` has an entry a round, and so has every way in `loads` and `cpu_ms`."""

    gflop: float
    eager: dict[int, Rate]
    in_process: dict[int, Rate]
    batch: int
    engine: list[Rate]
    loads: dict[str, list[Load]]
    cpu_ms: dict[str, list[float]]
    """Client and server together, of one image."""
    start_s: float
    stage_ms: dict[str, float]
    """In process, ms an image."""

    def ratios(self, way: str) -> list[float]:
        """Server over in process, of every round."""
        pairs = zip(self.loads[way], self.engine, strict=True)
        return [load.rate.images_per_s / rate.images_per_s for load, rate in pairs]

    def served(self, way: str = FILES) -> Rate:
        """All rounds."""
        return together([load.rate for load in self.loads[way]])

    @property
    def eager_images_per_s(self) -> float:
        """At its best batch."""
        return max(rate.images_per_s for rate in self.eager.values())


def compare(arguments: Comparison) -> Report:
    """Export, measure, serve, measure. Raises ValueError, ManifestError, ServerError, LoadError and OSError."""
    wanted = wanted_outputs(arguments.flow, arguments.parts)
    here = machine()  # before this run adds to the load average
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = prepare(arguments)
    images = phantoms(arguments.out / "phantoms")
    limits = peaks()
    measured = measure_flow(arguments, weights, images, wanted)
    real = effective_precision(arguments.precision)
    subject = {
        "flow": arguments.flow + ("" if arguments.parts else ", without parts"),
        "model": arguments.weights.name if arguments.weights else f"untrained {arguments.backbone}",
        "engines": f"OpenVINO {real}" + ("" if real == arguments.precision else f" (asked for {arguments.precision})"),
        "input": f"{len(images)} PNG phantoms of {sum(map(len, images)) / len(images) / 1e3:.0f} kB, decoding included",
        "arithmetic (GFLOP an image)": measured.gflop,
        "server ready after (s)": measured.start_s,
    }
    tables = (throughput_table(measured, arguments.clients, limits), rounds_table(measured), stages_table(measured))
    title = f"Throughput of {arguments.flow}"
    return Report(title, subject, conclusions(measured, arguments.clients, here), here, limits, tables)


def prepare(arguments: Comparison) -> Path:
    """Artefacts and model repository below `out`; returns the weights file they come from."""
    weights = arguments.weights
    if weights is None:
        weights = arguments.out / f"untrained_{arguments.backbone}_{arguments.flow}.safetensors"
        untrained_weights(weights, arguments.flow, arguments.backbone)
    tell(f"exporting {weights.name}")
    accept = "" if arguments.weights else "untrained weights: speed alone is measured"
    export([weights], arguments.out / "artefacts", arguments.precision, images=GATE_IMAGES, accept=accept)
    assemble(arguments.out / "artefacts", arguments.out / "repository")
    return weights


def phantoms(folder: Path) -> list[bytes]:
    """The PNG bytes of a few phantoms, drawn once."""
    complete = (folder / "index.csv").is_file()
    index = read_index(folder) if complete else generate(folder, PHANTOMS, PHANTOM_SEED)
    return [index.path(radiograph).read_bytes() for radiograph in index.radiographs]


def measure_flow(arguments: Comparison, weights: Path, images: Sequence[bytes], wanted: Sequence[str]) -> Measured:
    span = arguments.seconds / 2
    tell("eager fp32")
    eager = eager_flow(weights, arguments.flow, wanted)
    gflop = gflop_an_image(eager, images[0])
    eager_rates = sweep(eager, images, EAGER_BATCHES, span)
    tell("engines in process, batches of " + ", ".join(map(str, arguments.batches)))
    engine, times = engine_flow(arguments.out / "artefacts", arguments.flow, wanted)
    rates = sweep(engine, images, arguments.batches, span)
    batch = max(rates, key=lambda size: rates[size].images_per_s)
    for account in times.values():
        account.reset()
    in_process: list[Rate] = []
    loads: dict[str, list[Load]] = {way: [] for way in WAYS}
    spent_ms: dict[str, list[float]] = {way: [] for way in WAYS}
    sent = {FILES: images, PIXELS: [pixels(image) for image in images], CHAINED: images}
    tell("starting Triton")
    with running_server(arguments.out / "repository", [arguments.flow], report=tell) as server:
        connections = connect(server.grpc_url, arguments.flow, wanted)
        for number in range(1, arguments.rounds + 1):
            tell(f"round {number} of {arguments.rounds}: in process, then {arguments.clients} clients of Triton")
            in_process.append(measure(engine, images, batch, arguments.seconds))
            requests = round(REQUESTS_TIMES * in_process[-1].images_per_s * arguments.seconds) + arguments.clients
            bounds = (arguments.clients, requests, arguments.seconds)
            for way in WAYS if number % 2 else WAYS[::-1]:  # what one leaves behind is another's next time
                cpu_s = time.process_time() + session_cpu_s(server.pid)
                load = asyncio.run(server_load(server.grpc_url, connections[way], sent[way], *bounds))
                cpu_s = time.process_time() + session_cpu_s(server.pid) - cpu_s
                loads[way].append(load)
                spent_ms[way].append(1e3 * cpu_s / load.stages["preprocess"].images)
        start_s = server.start_s
    done = times["preprocess"].images
    stage_ms = {name: 1e3 * account.seconds / done for name, account in times.items() if account.images}
    return Measured(gflop, eager_rates, rates, batch, in_process, loads, spent_ms, start_s, stage_ms)


def connect(url: str, flow: str, wanted: Sequence[str]) -> dict[str, Connect]:
    """By way of asking: how a client connects."""
    chained = partial(ChainedClient, url, flow, wanted)
    return {FILES: ensemble(url, flow, wanted), PIXELS: ensemble(url, flow, wanted, True), CHAINED: chained}


def pixels(png: bytes) -> bytes:
    return to_pgm(np.asarray(Image.open(io.BytesIO(png)).convert("L")))


def rate_cells(rate: Rate) -> tuple[float, ...]:
    """Under RATE_COLUMNS."""
    return (rate.images_per_s, *(rate.percentile_ms(percent) for percent in (50, 95, 99)))


def throughput_table(measured: Measured, clients: int, limits: Peaks) -> Table:
    """Every runtime, beside eager fp32 and the machine's peak."""

    def row(name: str, batch: int | None, users: int | None, rate: Rate) -> tuple:
        gflops = rate.images_per_s * measured.gflop
        beside = (rate.images_per_s / measured.eager_images_per_s, gflops, 100 * gflops / limits.f32_gflops)
        return (name, batch, users, rate.images, *rate_cells(rate), *beside)

    rows = [
        *(row("eager fp32", batch, None, rate) for batch, rate in measured.eager.items()),
        *(row("engines, in process", batch, None, rate) for batch, rate in measured.in_process.items()),
        row("engines, in process, all rounds", measured.batch, None, together(measured.engine)),
        *(row(f"engines, Triton, {way}, all rounds", None, clients, measured.served(way)) for way in WAYS),
    ]
    columns = ("runtime", "batch (images)", "clients (count)", "counted (images)", *RATE_COLUMNS)
    beside = ("of eager fp32 (times)", "arithmetic (GFLOPS)", "of fp32 peak (%)")
    return Table("Throughput and latency", (*columns, *beside), tuple(rows))


def rounds_table(measured: Measured) -> Table:
    rows = []
    for number, rate in enumerate(measured.engine):
        rows.append((number + 1, "in process", rate.images_per_s, 100.0, rate.cpu_ms, 0))
        for way in WAYS:
            load, ratio = measured.loads[way][number], measured.ratios(way)[number]
            cells = (load.rate.images_per_s, 100 * ratio, measured.cpu_ms[way][number], len(load.failures))
            rows.append((number + 1, f"Triton, {way}", *cells))
    columns = (
        "round (number)",
        "runtime",
        "rate (images/s)",
        "of in process (%)",
        "an image (core-ms)",
        "failed (requests)",
    )
    return Table("In process and Triton, in turn", columns, tuple(rows))


def stages_table(measured: Measured) -> Table:
    """Milliseconds an image of the flow: a stage used twice counts twice. In process stages follow each other
    and add up to the whole; behind Triton they share the cores, so each takes longer."""
    totals: dict[str, StageTotals] = {}
    for name, stage in (item for load in measured.loads[FILES] for item in load.stages.items()):
        totals[name] = totals.get(name, StageTotals()) + stage
    served = totals["preprocess"].images
    rows = []
    for name, stage_ms in measured.stage_ms.items():
        stage = totals[name]
        queue_ms = 1e3 * stage.queue_s / stage.requests
        there = (1e3 * stage.compute_s / served, stage.images / stage.executions, queue_ms)
        rows.append((name, stage_ms, *there))
    there = ("Triton (ms an image)", "Triton batch (images)", "Triton queue (ms a request)")
    return Table("Where the time goes", ("stage", "in process (ms an image)", *there), tuple(rows))


def conclusions(measured: Measured, clients: int, here: Machine) -> tuple[str, ...]:
    """The run in sentences."""
    facts = []
    for way in WAYS:
        ratios = sorted(100 * ratio for ratio in measured.ratios(way))
        rounds = f"median of {len(ratios)} rounds, {ratios[0]:.1f} to {ratios[-1]:.1f} %"
        rounds += f"; bar for ResNet-50: {100 * BARS[way]:g} %" if way in BARS else ""
        facts.append(
            f"Triton with {clients} clients, {way}: {statistics.median(ratios):.1f} % of what the in-process flow does "
            f"with PNG files at its best batch, {measured.batch} ({rounds})"
        )
    facts += [
        f"the ensemble answers {measured.served().images_per_s / measured.served(CHAINED).images_per_s:.2f} times as "
        "many PNG files/s as a client that chains its steps (bar: more than 1)",
        f"Triton is {measured.served().images_per_s / measured.eager_images_per_s:.2f} times as fast as eager fp32 at "
        "its best batch, in the same run",
    ]
    if failures := [failure for loads in measured.loads.values() for load in loads for failure in load.failures]:
        facts.append(f"{len(failures)} requests failed, the first with: {failures[0]}")
    if here.busy:
        facts.append(
            f"NOT AN IDLE MACHINE: {here.load_1min:.1f} tasks on {here.cores} cores in the minute before: the rates "
            "say little, and the ratio flatters the server, whose many processes get more of a busy machine than one "
            "does; core-ms an image still compare"
        )
    return tuple(facts)


def tell(line: str, **_: object) -> None:
    """Also a server's `report`, whose parts by name are left out."""
    print(f"scaphoid-bench: {line}", file=sys.stderr, flush=True)
