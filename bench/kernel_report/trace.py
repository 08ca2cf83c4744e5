"""Which global memory a kernel touches: counted by running it under the SIMT executor, every access seen.

The kernels are compiled for the CPU with the compiler's instrumentation of loads and stores, which ends in trace.cpp.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCES, EXECUTOR, HERE = ROOT / "kernels" / "csrc", ROOT / "kernels" / "simt", Path(__file__).parent
SECTOR = 32  # bytes: what a GPU moves at least
COMPILE = ["g++", "-std=c++20", "-O2", "-g0", "-fPIC", "-DSCAPHOID_SIMT", "-ffp-contract=off", "-w"]
# The calls before each access, without ThreadSanitizer, whose presence the executor would count on; accesses as they
# are written: none joined with its neighbours nor, being a vector, taken apart, as g++ would do for a CPU.
TRACED = [
    *("-fsanitize=thread", "-U__SANITIZE_THREAD__", "--param=tsan-instrument-func-entry-exit=0"),
    *("-fno-tree-vectorize", "-fno-store-merging", "-fno-tree-sra", "-fno-ipa-sra"),
]


class TraceUnavailable(Exception):
    """Kernels cannot be traced here, and why."""


@dataclass(frozen=True)
class Accesses:
    """Loads or stores of one launch. `requests`: of warps; `sectors`: 32-byte sectors that they moved, request by
    request, in one of them `most_sectors`; `needed_sectors`: that their bytes would fill, packed; `distinct_sectors`:
    each counted once a launch; `by_width`: threads' accesses by their bytes."""

    requests: int
    sectors: int
    most_sectors: int
    needed_sectors: int
    distinct_sectors: int
    by_width: dict[str, int]

    @property
    def packed(self) -> float:
        """Share of the sectors that a warp's requests would need if their bytes lay side by side: 1 is coalesced."""
        return self.needed_sectors / self.sectors if self.sectors else 1.0


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. `shared` is its dynamic shared memory in bytes."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    loads: Accesses
    stores: Accesses

    @property
    def requested_bytes(self) -> int:
        """Between the SMs and the caches."""
        return SECTOR * (self.loads.sectors + self.stores.sectors)

    @property
    def distinct_bytes(self) -> int:
        """At least between the caches and memory."""
        return SECTOR * (self.loads.distinct_sectors + self.stores.distinct_sectors)


def build_tracer(folder: Path) -> "Tracer":
    """Compiles the kernels for tracing into `folder`. Raises TraceUnavailable where something is missing and
    ValueError where the kernels do not compile."""
    if not (EXECUTOR / "include").is_dir() or not list(SOURCES.glob("cuda/*.cu")):
        raise TraceUnavailable("the SIMT executor (kernels/simt) or the kernels (kernels/csrc/cuda) are not here")
    if shutil.which("g++") is None:
        raise TraceUnavailable("g++ is missing")
    copy = folder / "csrc"
    shutil.copytree(SOURCES, copy)
    include = [f"-I{place}" for place in (EXECUTOR / "include", EXECUTOR, copy, copy / "cuda", HERE)]
    for source in sorted(copy.glob("cuda/*")):
        if source.name != "launch.h":
            source.write_text(re.sub(r"\bLAUNCH\(", "TRACED_LAUNCH(", source.read_text()))
    traced = [*COMPILE, *TRACED, *include, "-include", HERE / "trace.h", "-x", "c++"]
    commands = [[*traced, source, "-c", "-o", source.with_suffix(".o")] for source in sorted(copy.glob("cuda/*.cu"))]
    for source in (HERE / "trace.cpp", *sorted(EXECUTOR.glob("*.cpp"))):
        commands.append([*COMPILE, *include, source, "-c", "-o", folder / f"{source.stem}.o"])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    objects = [command[-1] for command in commands]
    library = folder / "libtraced.so"
    _run(["g++", "-shared", "-Wl,-z,defs", *objects, "-o", library, "-lpthread"])
    return Tracer(ctypes.CDLL(str(library)))


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the kernels do not compile for tracing: {done.stderr[-2000:]}")


class Tracer:
    """The C launch functions of every op (csrc/scaphoid_ops.h), traced."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.trace_json.restype = ctypes.c_char_p

    def __call__(self, function: str, *arguments: object) -> list[Launch]:
        """Calls `scaphoid_<function>_cuda`; arrays are its global memory. Numbers: int is int64_t, float double; other
        types as ctypes. The stream is added. Raises TraceUnavailable when the op has no such function or refuses."""
        self.library.trace_clear()
        passed = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                self.library.trace_buffer(ctypes.c_void_p(argument.ctypes.data), ctypes.c_size_t(argument.nbytes))
                passed.append(ctypes.c_void_p(argument.ctypes.data))
            elif isinstance(argument, float):
                passed.append(ctypes.c_double(argument))
            else:
                passed.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)
        try:
            call = self.library[f"scaphoid_{function}_cuda"]
        except AttributeError:
            raise TraceUnavailable(f"scaphoid_{function}_cuda is not among the kernels") from None
        if error := call(*passed, ctypes.c_void_p(0)):
            raise TraceUnavailable(f"scaphoid_{function}_cuda refused with error {error}")
        return [_launch(record) for record in json.loads(self.library.trace_json())]


def _launch(record: dict) -> Launch:
    name = re.split(r"[<(]", record.pop("kernel").strip("( "))[0].split("::")[-1].strip()
    loads, stores = Accesses(**record.pop("loads")), Accesses(**record.pop("stores"))
    return Launch(name, loads=loads, stores=stores, **record)


def array(shape: Sequence[int], dtype: type, fill: float | np.ndarray = 0) -> np.ndarray:
    """A dense array that begins at a sector, as device memory does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + SECTOR, np.uint8)
    start = -raw.ctypes.data % SECTOR
    made = raw[start : start + size].view(dtype).reshape(shape)
    made[...] = fill
    return made
