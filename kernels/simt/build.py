"""Compiles the CUDA sources for the SIMT executor, with g++ and ninja: a library for Python, programs for sanitizers.

Everything lands in build/simt, where ninja compiles again only what has changed.
"""

import ctypes
import shutil
from collections.abc import Iterable
from pathlib import Path

from scaphoid.kernels.build_ops import ROOT, SOURCES, NinjaFile, alone_in, compile_line, find_ninja, shell_line

SIMT = ROOT / "kernels" / "simt"
OUT = ROOT / "build" / "simt"

# As the op library is compiled for CPU and CUDA: the same rounding everywhere.
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-I.", "-Icuda"]
EXECUTOR = ["-x", "c++", "-DSCAPHOID_SIMT", f"-I{SIMT / 'include'}"]
MODES = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
UNWATCHED = ["-DSIMT_THREAD_SANITIZER"]  # the executor itself, where kernels are compiled for ThreadSanitizer
JOBS = 2


def missing_tools() -> str | None:
    """Why nothing can be built here, or None."""
    absent = [tool for tool, path in (("g++", shutil.which("g++")), ("ninja", find_ninja())) if path is None]
    return f"the SIMT executor needs {' and '.join(absent)}" if absent else None


def library() -> Path:
    """The C functions scaphoid_*_cuda, and scaphoid_simt_seed and scaphoid_simt_error (runtime.cpp)."""
    ninja = NinjaFile(OUT)
    objects = _compile(ninja, [*SOURCES.glob("cuda/*.cu"), *SIMT.glob("*.cpp")], "plain")
    out = _link(ninja, objects, OUT / "libscaphoid_simt.so", ["-shared", "-Wl,--no-undefined"])
    _run(ninja, "library")
    return out


def load_library() -> ctypes.CDLL:
    """The library for Python: its functions' pointers are plain memory, and no stream is needed.

    `scaphoid_simt_seed(n)` picks the order in which blocks and threads run from then on. A function that returns an
    error (not 0) has said why on stderr and in `scaphoid_simt_error()` (bytes).
    """
    loaded = ctypes.CDLL(str(library()))
    loaded.scaphoid_simt_seed.argtypes = [ctypes.c_ulonglong]
    loaded.scaphoid_simt_seed.restype = None
    loaded.scaphoid_simt_error.restype = ctypes.c_char_p
    return loaded


def programs(sources: Iterable[Path], mode: str, ops: bool) -> list[Path]:
    """Programs of one source file each, in a mode of MODES; `ops`: with the ops for CPU and CUDA, or by themselves."""
    ninja, outs = NinjaFile(OUT), []
    parts = [*SOURCES.glob("cpu/*.cpp"), *SOURCES.glob("cuda/*.cu")] if ops else []
    common = _compile(ninja, [*parts, *SIMT.glob("*.cpp")], mode)
    for source in sources:
        objects = [*_compile(ninja, [source], mode), *common]
        outs.append(_link(ninja, objects, OUT / mode / source.parent.name / source.stem, MODES[mode]))
    _run(ninja, f"{mode}-{'ops' if ops else 'alone'}")
    return outs


def _compile(ninja: NinjaFile, sources: Iterable[Path], mode: str) -> list[Path]:
    objects = []
    for source in sorted(sources):
        built = OUT / mode / source.parent.name / f"{source.name}.o"
        executor = EXECUTOR if source.parent.name != "cpu" else []
        watched = UNWATCHED if mode == "tsan" and source.parent == SIMT else MODES[mode]
        line = compile_line(["g++", *FLAGS, *watched, *executor], source, built)
        objects.append(ninja.add(built, [source], line, f"{built}.d"))
    return objects


def _link(ninja: NinjaFile, objects: list[Path], out: Path, flags: list[str]) -> Path:
    return ninja.add(out, objects, shell_line(["g++", *flags, *objects, "-o", out]))


def _run(ninja: NinjaFile, name: str) -> None:
    with alone_in(OUT):
        done = ninja.run(name, "-j", JOBS, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the SIMT executor does not compile {name}:\n{done.stdout}{done.stderr}")
