"""What one GPU serves, and how many a hospital, an archive and the world need: a simulation on paper.

Decoding is measured here, per core. A GPU's times are the encoders' static roofline divided by the share of it that
engines are assumed to reach: on paper, not measured on hardware. The queueing simulation (queueing.py) puts both behind
the flow's wiring with Triton's batching; its saturation is what a GPU with its cores serves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaphoid.bench.decoding import PIXELS, Form, measured_forms
from scaphoid.bench.kernel_report.encoders import BACKBONE, PASSES, layers
from scaphoid.bench.kernel_report.gpus import GPUS, Gpu
from scaphoid.bench.peaks import machine
from scaphoid.bench.queueing import Station, closed_loop, linear, open_loop, poisson, route_of
from scaphoid.bench.report import Report, Table
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import wanted_outputs

CORES, GPU = "cores", "GPU"
DATA_CENTRE = (89, 90)  # architectures of the GPUs that stand in racks
MAX_BATCH = 8  # of every stage of the GPU repository
GLUE_S = 50e-6  # a glue stage's launches; its arithmetic is microseconds (bench/results/kernels_static.md)
SATURATED, SATURATION_JOBS, LOAD_JOBS = 64, 3000, 6000
LOAD = 0.7  # of saturation: what replicas are planned for
SPARE = 1  # replica that may be down or being replaced
YEAR_S, DAY_S = 365 * 86400, 86400


@dataclass(frozen=True)
class Scenario:
    """`rate` in the busiest hour, images/s, and where the number comes from. The limits of what stands around the
    GPUs: one gateway's network in Gbit/s and the archive's reading in GB/s."""

    name: str
    rate: float
    why: str
    gateway_gbit: float
    archive_gb_per_s: float


SCENARIOS = (
    Scenario(
        "a hospital",
        400 * 3 * 0.15 / 3600,
        "400 bone studies a day, 3 images each, 15 % of them in the busiest hour",
        1,
        0.2,
    ),
    Scenario("a national archive", 100e6 / (30 * DAY_S), "100 million radiographs read again within 30 days", 25, 2),
    Scenario(
        "the world, as it is taken",
        2 * 3.6e9 * 2 / YEAR_S,
        "3.6 billion X-ray examinations a year, 2 images each, twice the mean rate in the busiest hour",
        100,
        20,
    ),
    Scenario(
        "the world's archives of ten years",
        72e9 / (90 * DAY_S),
        "72 billion images read again within 90 days",
        400,
        200,
    ),
)


@dataclass(frozen=True)
class Capacity:
    """What one GPU with its cores serves on paper, replicas for loads far apart, and what gives way next."""

    flow: str = "msfm"
    """msfm, msfm_fma or kalm, with ResNet-50 at the papers' sizes."""
    parts: bool = True
    """Classify MSFM's windows as well."""
    cores: int = 16
    """CPU cores beside each GPU."""
    efficiency: float = 0.4
    """Share of its roofline that an engine is assumed to reach. Nothing here has measured it."""
    request_core_ms: float = 1.0
    """Core-time of a request besides decoding, assumed: protocol, scheduling, copies."""
    out: Path = Path("runs/bench")
    """Folder for the report."""

    @property
    def name(self) -> str:
        return f"capacity_{self.flow}"


@dataclass(frozen=True)
class Served:
    """By one GPU and its cores, for one form of the images: saturation, p99 at LOAD of it, and each resource's limit in
    images/s if it were alone."""

    gpu: Gpu
    form: Form
    saturation: float
    p99_ms: float
    busy: Mapping[str, float]
    limits: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        return min(self.limits, key=self.limits.__getitem__)


def capacity(arguments: Capacity) -> Report:
    """Measure decoding, simulate the rest. Raises ValueError for arguments that make no sense."""
    wanted = wanted_outputs(arguments.flow, arguments.parts)
    if arguments.cores < 1 or not 0 < arguments.efficiency <= 1:
        raise ValueError("capacity: expected one core or more and an --efficiency of more than 0 up to 1")
    here = machine()
    forms = measured_forms()
    served = [
        simulated(gpu, form, arguments, wanted) for gpu in GPUS if gpu.architecture in DATA_CENTRE for form in forms
    ]
    facts = (
        "ON PAPER, NOT MEASURED on a GPU: encoder times are the layers' static roofline (fp16, published peaks) over "
        f"the assumed efficiency of {arguments.efficiency:g}; halve it and the GPU's limit halves",
        "decoding is measured on this machine: core-time of one 5-megapixel radiograph through DALI on the CPU, the "
        "guard's reading included",
        f"assumed: {arguments.request_core_ms:g} core-ms a request besides decoding, {1e6 * GLUE_S:g} us a glue stage, "
        f"batches of up to {MAX_BATCH}, Poisson arrivals; replicas for {100 * LOAD:.0f} % of saturation, {SPARE} spare",
        *(f"{each.name}: {each.rate:.3g} images/s ({each.why})" for each in SCENARIOS),
    )
    subject = {
        "flow": arguments.flow + ("" if arguments.parts else ", without parts"),
        "network": f"{BACKBONE}, fp16",
        "cores beside each GPU (count)": arguments.cores,
    }
    tables = (
        forms_table(forms),
        served_table(served),
        *(replicas_table(each) for each in served if each.form.name == PIXELS),
    )
    return Report(f"Capacity on paper of {arguments.flow}", subject, facts, here, None, tables)


def encoder_work(gpu: Gpu, passes: Sequence[tuple[int, int]], efficiency: float) -> Callable:
    """Seconds of an encoder's execution by batch, `passes` (images, side) for one image of the flow."""

    def seconds(batch: int, _: np.random.Generator) -> float:
        found = (layers(batch * images, side) for images, side in passes)
        return (
            1e-6
            * sum(gpu.roofline_us(each.moved_bytes, fp16_flop=each.flop) for one in found for each in one)
            / efficiency
        )

    return seconds


def stations(gpu: Gpu, form: Form, arguments: Capacity) -> list[Station]:
    """Of the GPU repository. MSFM's main and object steps are one station, and so batch together."""
    found = []
    main, window = PASSES[arguments.flow][0], PASSES[arguments.flow][-1]
    for name in FLOWS[arguments.flow].stages:
        kind = STAGES[name].kind
        if kind == "preprocess":
            work = linear(0, form.core_s + 1e-3 * arguments.request_core_ms)
            found.append(Station(name, work, CORES, instances=arguments.cores))
        elif kind == "encoder":
            work = encoder_work(gpu, [window if name == "parts_encoder" else main], arguments.efficiency)
            found.append(Station(name, work, GPU, max_batch=MAX_BATCH))
        else:
            found.append(Station(name, linear(GLUE_S, 0), GPU, max_batch=MAX_BATCH))
    return found


def simulated(gpu: Gpu, form: Form, arguments: Capacity, wanted: Sequence[str]) -> Served:
    network, route = stations(gpu, form, arguments), route_of(FLOWS[arguments.flow], wanted)
    resources = {CORES: float(arguments.cores), GPU: 1.0}
    full = closed_loop(network, route, resources, SATURATED, SATURATION_JOBS)
    arrivals = poisson(LOAD * full.jobs_per_s, LOAD_JOBS, np.random.default_rng(1))
    load = open_loop(network, route, resources, arrivals)
    limits = {name: full.jobs_per_s / full.busy[name] for name in resources}
    return Served(gpu, form, full.jobs_per_s, load.percentile_ms(99), full.busy, limits)


def forms_table(forms: Sequence[Form]) -> Table:
    rows = [(each.name, each.bytes / 1e6, 1e3 * each.core_s, 1 / each.core_s) for each in forms]
    columns = ("form", "size (MB)", "decoding, measured (core-ms)", "a core decodes (images/s)")
    return Table("Decoding a 5-megapixel radiograph", columns, tuple(rows))


def served_table(served: Sequence[Served]) -> Table:
    rows = [
        (
            *(each.gpu.name, each.form.name, each.saturation, each.p99_ms),
            *(100 * each.busy[name] for name in (GPU, CORES)),
            *(each.limits[name] for name in (GPU, CORES)),
            each.bottleneck,
        )
        for each in served
    ]
    columns = (
        *("GPU", "images as", "serves, on paper (images/s)", f"p99 at {100 * LOAD:.0f} % of that, on paper (ms)"),
        *("GPU busy (%)", "cores busy (%)", "GPU alone, on paper (images/s)", "cores alone (images/s)", "bottleneck"),
    )
    return Table("One GPU with its cores", columns, tuple(rows))


def replicas(rate: float, served: Served) -> int:
    return max(1, math.ceil(rate / (LOAD * served.saturation))) + SPARE


def strained(scenario: Scenario, served: Served) -> list[tuple[str, float]]:
    """What the scenario's rate uses of every limit, the most strained first: the replicas' own, one gateway's network,
    the archive's reading."""
    count, size = replicas(scenario.rate, served), served.form.bytes
    limits = {
        **{f"{name} of the replicas": count * limit for name, limit in served.limits.items()},
        "network of one gateway": scenario.gateway_gbit * 1e9 / 8 / size,
        "reading from the archive": scenario.archive_gb_per_s * 1e9 / size,
    }
    return sorted(((name, scenario.rate / limit) for name, limit in limits.items()), key=lambda pair: -pair[1])


def replicas_table(served: Served) -> Table:
    rows = []
    for scenario in SCENARIOS:
        first, then, *_ = strained(scenario, served)
        gb_per_s = scenario.rate * served.form.bytes / 1e9
        around = (scenario.gateway_gbit, scenario.archive_gb_per_s, gb_per_s)
        gives = (f"{name} ({100 * share:.3g} %)" for name, share in (first, then))
        rows.append((scenario.name, scenario.rate, replicas(scenario.rate, served), *around, *gives))
    columns = (
        *("load", "busiest hour (images/s)", "replicas, on paper (GPUs)", "gateway, assumed (Gbit/s)"),
        *("archive, assumed (GB/s)", "moved (GB/s)", "gives way first (used)", "and then (used)"),
    )
    return Table(f"Replicas of {served.gpu.name}, images as {served.form.name}", columns, tuple(rows))
