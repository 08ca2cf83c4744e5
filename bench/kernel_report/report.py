"""The static report of the CUDA kernels: `scaphoid-bench kernels`. Nothing here was timed, and no GPU is needed."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaphoid.bench.kernel_report.encoders import BACKBONE, PASSES, encoders_us
from scaphoid.bench.kernel_report.gpus import GPUS, Gpu, occupancy
from scaphoid.bench.kernel_report.sass import KINDS, Kernel, kernels_of
from scaphoid.bench.kernel_report.trace import ROOT, Launch, TraceUnavailable, build_tracer
from scaphoid.bench.kernel_report.workloads import Workload, workloads
from scaphoid.bench.report import Report, Table
from scaphoid.kernels.build_ops import find_toolkit

NOT_RUN = "executed under the SIMT executor, not run on hardware"


@dataclass(frozen=True)
class KernelsBench:
    """Report what the compiler made of the CUDA kernels and what they move: registers, occupancy, instructions, bytes
    and roofline time; no GPU is needed."""

    library: Path = ROOT / "kernels" / "libscaphoid_ops.so"
    """The op library, built where nvcc is."""
    out: Path | None = None
    """Folder for the report: kernels_static.md and kernels_static.json."""
    json: bool = False
    """Print the report as JSON."""

    name = "kernels_static"


@dataclass(frozen=True)
class Traced:
    """A workload and what its launches touched; without launches `reason` says why not."""

    workload: Workload
    launches: tuple[Launch, ...]
    reason: str = ""

    @property
    def moved_bytes(self) -> int:
        """Between caches and memory at least: as traced, or the minimum."""
        return sum(launch.distinct_bytes for launch in self.launches) or self.workload.minimum_bytes


def bench_kernels(arguments: KernelsBench) -> Report:
    """Raises ToolMissing and ValueError, for a library without GPU code."""
    kernels = kernels_of(arguments.library)
    traced = trace_all()
    architectures = sorted({kernel.architecture for kernel in kernels})
    toolkit = find_toolkit()
    subject = {
        "library": f"{len({kernel.name for kernel in kernels})} kernels for "
        + ", ".join(f"sm_{architecture}" for architecture in architectures),
        "compiler": f"nvcc {toolkit.version}" if toolkit else "not here any more",
        "status": f"compiled for sm_{architectures[0]} ... sm_{architectures[-1]}, {NOT_RUN}",
    }
    tables = (
        resources_table(kernels, traced),
        instructions_table(kernels),
        traffic_table(traced),
        roofline_table(traced),
        glue_table(traced),
        gpus_table(),
    )
    labelled = tuple(Table(f"{table.title} ({subject['status']})", table.columns, table.rows) for table in tables)
    return Report("CUDA kernels, static report", subject, (*warnings(kernels, traced), *MEANINGS), None, None, labelled)


MEANINGS = (
    "occupancy: theoretical, of the block size that the workload's launch uses (a kernel that no workload launches: of "
    "the same kernel's for another type); static and dynamic shared memory both count",
    "instructions: in the code, not executed; called code counts with its kernel; moves and the like are `other`",
    "coalesced: seen, not assumed. Every global access of every thread was recorded under the SIMT executor; a warp's "
    "threads that make the same access are one request, which moves the 32-byte sectors that it touches: 4 for 32 "
    "neighbouring floats, 32 where every thread goes its own way. `packed` is the share of the sectors that the "
    "requests' bytes would fill side by side; it is low where a thread's next accesses use the rest of the same "
    "sectors, which the cache then has (crops: neighbouring columns a thread, a byte each). Atomics count as stores; "
    "cudaMemsetAsync is not seen",
    "requested: sectors of all requests, between SMs and caches; moved: each sector once a launch, what memory must "
    "deliver and take at least; minimum: inputs and outputs once, by their shapes",
    "roofline: moved bytes and the definition's arithmetic at published peaks (multiply-adds are not fused, which "
    "halves the arithmetic peaks), for one image; launches and latency come on top",
)


def trace_all() -> list[Traced]:
    """Every workload, traced where that is possible."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tracer = build_tracer(Path(folder))
        except TraceUnavailable as reason:
            return [Traced(workload, (), str(reason)) for workload in workloads()]
        traced = []
        for workload in workloads():
            try:
                traced.append(Traced(workload, tuple(workload.trace(tracer))))
            except TraceUnavailable as reason:
                traced.append(Traced(workload, (), str(reason)))
        return traced


def warnings(kernels: Sequence[Kernel], traced: Sequence[Traced]) -> list[str]:
    """What should not be, a line each; or that nothing is."""
    found = []
    local = {
        f"{kernel.name} (sm_{kernel.architecture})"
        for kernel in kernels
        if kernel.stack or kernel.instructions["local"]
    }
    divisions = {kernel.name for kernel in kernels if kernel.divisions64}
    calls = Counter(name for name, _ in {(name, kernel.name) for kernel in kernels for name in kernel.calls})
    if local:
        found.append("LOCAL MEMORY (spills or stack): " + ", ".join(sorted(local)))
    if divisions:
        found.append("64-BIT DIVISION: " + ", ".join(sorted(divisions)))
    if calls:
        found.append("CALLS: " + ", ".join(f"{name} in {count} kernels" for name, count in sorted(calls.items())))
    found += [f"not traced: {each.workload.name}: {each.reason}" for each in traced if each.reason]
    return found or ["no kernel spills, uses local memory, divides 64-bit integers or calls a slow path"]


def resources_table(kernels: Sequence[Kernel], traced: Sequence[Traced]) -> Table:
    launches = {launch.kernel: launch for each in traced for launch in each.launches}
    rows = []
    for kernel in kernels:
        row = (kernel.name, f"sm_{kernel.architecture}", kernel.registers, kernel.shared)
        local = (kernel.stack, kernel.instructions["local"])
        if launch := launches.get(kernel.base):
            held = occupancy(kernel.architecture, launch.threads, kernel.registers, kernel.shared + launch.shared)
            rows.append((*row, launch.shared, *local, launch.threads, 100 * held.share, held.limit))
        else:
            rows.append((*row, None, *local, None, None, "-"))
    columns = (
        *("kernel", "architecture", "registers (count)", "static shared (bytes)", "dynamic shared (bytes)"),
        *("stack (bytes)", "local accesses (instructions)", "block (threads)", "occupancy (%)", "limited by"),
    )
    return Table("Resources", columns, tuple(rows))


def instructions_table(kernels: Sequence[Kernel]) -> Table:
    kinds = [kind for kind, _ in KINDS if kind not in ("global load", "global store", "local", "call")]
    rows = []
    for kernel in kernels:
        widths = (widths_of(kernel.loads), widths_of(kernel.stores))
        counts = (kernel.instructions[kind] for kind in (*kinds, "other"))
        calls = ", ".join(sorted(kernel.calls)) or "-"
        rows.append((kernel.name, f"sm_{kernel.architecture}", *widths, *counts, kernel.divisions64, calls))
    columns = ("kernel", "architecture", "global loads x bits", "global stores x bits")
    counted = (f"{kind} (instructions)" for kind in (*kinds, "other"))
    return Table("Instructions", (*columns, *counted, "64-bit divisions (calls)", "calls"), tuple(rows))


def widths_of(counter: Counter) -> str:
    return ", ".join(f"{count} x {width}" for width, count in sorted(counter.items())) or "-"


def traffic_table(traced: Sequence[Traced]) -> Table:
    """A row a launch; the minimum and the ratio stand with the workload's first."""
    rows = []
    for each in traced:
        for number, launch in enumerate(each.launches):
            sides = (launch.loads, launch.stores)
            most = tuple(side.most_sectors for side in sides)
            packed = tuple(100 * side.packed for side in sides)
            widths = tuple(
                ", ".join(f"{count:,} x {int(size) * 8}" for size, count in side.by_width.items()) or "-"
                for side in sides
            )
            moved = (launch.requested_bytes / 1e3, launch.distinct_bytes / 1e3)
            whole = (each.workload.minimum_bytes / 1e3, each.moved_bytes / each.workload.minimum_bytes)
            name, size = each.workload.name, (launch.blocks, launch.threads)
            rows.append(
                (name, launch.kernel, *size, *widths, *most, *packed, *moved, *(whole if number == 0 else (None, None)))
            )
    columns = (
        *("workload", "kernel", "blocks (count)", "block (threads)", "loads x bits", "stores x bits"),
        *(
            "most in a load (sectors)",
            "most in a store (sectors)",
            "loads packed (%)",
            "stores packed (%)",
            "requested (kB)",
            "moved (kB)",
            "minimum (kB)",
        ),
        "all moved over minimum (times)",
    )
    return Table("Global memory, one image", columns, tuple(rows))


def glue_us(gpu: Gpu, each: Traced) -> float:
    """Roofline time of a workload; what is not fused reaches half of the published arithmetic."""
    return gpu.roofline_us(each.moved_bytes, 2 * each.workload.fp32, 2 * each.workload.fp64)


def roofline_table(traced: Sequence[Traced]) -> Table:
    rows = []
    for each in traced:
        work = (each.moved_bytes / 1e3, each.workload.fp32 / 1e6, each.workload.fp64 / 1e6)
        rows.append((each.workload.name, len(each.launches) or None, *work, *(glue_us(gpu, each) for gpu in GPUS)))
    columns = ("workload", "launches (count)", "moved (kB)", "fp32 (MFLOP)", "fp64 (MFLOP)")
    return Table("Roofline, one image", (*columns, *(f"{gpu.name} (us)" for gpu in GPUS)), tuple(rows))


def glue_table(traced: Sequence[Traced]) -> Table:
    """All ops of a flow beside its encoders in fp16, both at the roofline."""
    rows = []
    for flow in PASSES:
        used = [(each, each.workload.flows[flow]) for each in traced if flow in each.workload.flows]
        launches = sum(times * len(each.launches) for each, times in used)
        for gpu in GPUS:
            glue = sum(times * glue_us(gpu, each) for each, times in used)
            encoders = encoders_us(gpu, flow)
            rows.append((flow, gpu.name, launches or None, glue, encoders, 100 * glue / encoders))
    columns = ("flow", "GPU", "launches (count)", "ops (us)", f"encoders {BACKBONE} fp16 (us)", "ops of encoders (%)")
    return Table("Ops and encoders, one image at the roofline", columns, tuple(rows))


def gpus_table() -> Table:
    rows = [(gpu.name, gpu.memory_gb_per_s, gpu.fp32, gpu.fp64, gpu.fp16, gpu.source) for gpu in GPUS]
    columns = ("GPU", "memory (GB/s)", "fp32 (TFLOPS)", "fp64 (TFLOPS)", "fp16, dense (TFLOPS)", "source")
    return Table("Published peaks", columns, tuple(rows))
