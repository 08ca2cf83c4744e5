"""What this machine is and what it can do at best: every benchmark is read against it.

A rate means little without the machine's limit beside it. The arithmetic limit is a square matrix product, by torch and
by the engine itself in each precision that the CPU has instructions for; the memory limit a copy, and a search that
only reads, far larger than the caches.
"""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 2048  # of the matrices: 17 GFLOP a product, 16 MiB an operand
COPY_MIB = 256
REPEATS = 5
VECTOR_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
)


@dataclass(frozen=True)
class Machine:
    """`instructions` are those that matter to a CNN; `engine_precisions` what OpenVINO computes in natively here."""

    cpu: str
    cores: int
    memory_gib: float
    instructions: tuple[str, ...]
    engine_precisions: tuple[str, ...]
    load_1min: float
    """Average number of runnable tasks in the minute before: what else was running."""

    @property
    def busy(self) -> bool:
        """Whether so much else was running that timings say more about it than about what is measured."""
        return self.load_1min > self.cores / 2

    @property
    def precision_note(self) -> str:
        """What an engine exported for bf16 would run in, in words."""
        if "BF16" in self.engine_precisions:
            return "bf16 is native on this CPU"
        return (
            "bf16 is not native on this CPU (no AVX-512 BF16, no AMX): an engine exported for bf16 runs in f32 here, "
            "so f32 is what counts"
        )


@dataclass(frozen=True)
class Bandwidth:
    """Of memory, for a number of threads: a copy counts bytes read and written."""

    threads: int
    read_gb_per_s: float
    copy_gb_per_s: float


@dataclass(frozen=True)
class Peaks:
    """`gflops` by runtime and precision, 2 operations a multiply-add; `copy_gb_per_s` counts bytes read and written, by
    as many threads as torch uses; `bandwidths` for a benchmark that looks at memory."""

    gflops: dict[str, float]
    copy_gb_per_s: float
    bandwidths: tuple[Bandwidth, ...] = ()

    @property
    def f32_gflops(self) -> float:
        """The best fp32 matrix product, whichever runtime reached it."""
        return max(value for name, value in self.gflops.items() if name.endswith(" f32"))


def machine() -> Machine:
    from scaphoid.export.edge.openvino_engine import core

    description = _cpuinfo()
    flags = (description.get("flags") or description.get("Features") or "").split()
    name = description.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in description:
        name += f" (family {description['cpu family']}, model {description['model']})"
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return Machine(
        name,
        len(os.sched_getaffinity(0)),
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        tuple(flag for flag in VECTOR_FLAGS if flag in flags),
        tuple(name for name in capabilities if name in ("FP32", "BF16", "FP16", "INT8")),
        os.getloadavg()[0],
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry."""
    try:
        entry = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in entry.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def peaks(side: int = SIDE, copy_mib: int = COPY_MIB, threads: Sequence[int] = ()) -> Peaks:
    """Measure for a few seconds: products of `side` x `side` matrices, a copy of `copy_mib` MiB, and the bandwidth of
    memory with each of `threads`."""
    import torch

    from scaphoid.export.precision import HINTS, effective_precision

    work = 2e-9 * side**3
    a, b = torch.rand(side, side), torch.rand(side, side)
    gflops = {"torch f32": work / _best_s(lambda: a @ b)}
    for precision in dict.fromkeys(HINTS.values()):
        if effective_precision(precision) == precision:
            gflops[f"OpenVINO {precision}"] = work / _best_s(_openvino_product(a.numpy(), b.numpy(), precision))
    source = torch.ones(copy_mib * 2**18)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best_s(lambda: target.copy_(source))
    return Peaks(gflops, copied / 1e9, tuple(bandwidth(count, copy_mib) for count in threads))


def bandwidth(threads: int, mib: int = COPY_MIB) -> Bandwidth:
    """Of memory, through a buffer of `mib` MiB."""
    import torch

    source = torch.ones(mib * 2**18)
    target = torch.empty_like(source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with ThreadPoolExecutor(threads) as pool:
        read_s = min(_best_s(lambda: read_memory(source, pool, threads)), _best_s(source.amax))
    copy_s = _best_s(lambda: target.copy_(source))
    torch.set_num_threads(before)
    return Bandwidth(threads, source.nbytes / read_s / 1e9, 2 * source.nbytes / copy_s / 1e9)


def read_memory(tensor: "Tensor", pool: ThreadPoolExecutor, threads: int) -> None:
    """Read a dense tensor once and write nothing: the C library's vectorised search for a byte, by `threads` of `pool`,
    each from its place to the first such byte. All of it is read where no byte is 1."""
    search = ctypes.CDLL(None).memchr
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    share = -(-tensor.nbytes // threads)
    starts = range(0, tensor.nbytes, share)
    begin = tensor.data_ptr()
    list(pool.map(lambda start: search(begin + start, 1, min(share, tensor.nbytes - start)), starts))


def last_level_cache_mib(default: float = 32.0) -> float:
    """Of the first processor; `default` where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) / 1024 for size in sizes if size.endswith("K")), default=default)


def _openvino_product(a: np.ndarray, b: np.ndarray, precision: str) -> Callable[[], object]:
    import openvino as ov
    from openvino import opset13

    from scaphoid.export.edge.openvino_engine import core

    left = opset13.parameter(a.shape, np.float32)
    model = ov.Model([opset13.matmul(left, opset13.constant(b), False, False)], [left])
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core().compile_model(model, "CPU", options).create_infer_request()
    return lambda: request.infer([a], share_inputs=True, share_outputs=True)


def _best_s(run: Callable[[], object]) -> float:
    """The fastest of a few calls after a warm-up, in seconds: a limit is what the machine reaches undisturbed."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
