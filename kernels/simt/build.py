"""Compiles the CUDA sources for the SIMT executor, with g++ and ninja: a library for Python, programs for sanitizers.

Everything lands in build/simt, where ninja compiles again only what has changed.
"""

import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SIMT = ROOT / "kernels" / "simt"
SOURCES = ROOT / "kernels" / "csrc"
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
JOBS = 2


def missing_tools() -> str | None:
    """Why nothing can be built here, or None."""
    absent = [tool for tool, path in (("g++", shutil.which("g++")), ("ninja", _ninja())) if path is None]
    return f"the SIMT executor needs {' and '.join(absent)}" if absent else None


def library() -> Path:
    """The C functions scaphoid_*_cuda, and scaphoid_simt_seed and scaphoid_simt_error (runtime.cpp)."""
    out = OUT / "libscaphoid_simt.so"
    plan = _Plan()
    objects = plan.compile([*SOURCES.glob("cuda/*.cu"), *SIMT.glob("*.cpp")], "plain")
    plan.link(objects, out, ["-shared", "-Wl,--no-undefined"])
    plan.run("library")
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
    plan, outs = _Plan(), []
    parts = [*SOURCES.glob("cpu/*.cpp"), *SOURCES.glob("cuda/*.cu")] if ops else []
    common = plan.compile([*parts, *SIMT.glob("*.cpp")], mode)
    for source in sources:
        out = OUT / mode / source.parent.name / source.stem
        plan.link([*plan.compile([source], mode), *common], out, MODES[mode])
        outs.append(out)
    plan.run(f"{mode}-{'ops' if ops else 'alone'}")
    return outs


class _Plan:
    """A ninja file. Commands run in kernels/csrc."""

    def __init__(self) -> None:
        self.text = "ninja_required_version = 1.8\n"
        self.edges = 0

    def compile(self, sources: Iterable[Path], mode: str) -> list[Path]:
        return [self._object(source, mode) for source in sorted(sources)]

    def _object(self, source: Path, mode: str) -> Path:
        out = OUT / mode / source.parent.name / f"{source.name}.o"
        executor = EXECUTOR if source.parent.name != "cpu" else []
        command = ["g++", *FLAGS, *MODES[mode], *executor, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        self._edge(out, [source], command, f"  deps = gcc\n  depfile = {out}.d\n")
        return out

    def link(self, objects: list[Path], out: Path, flags: list[str]) -> None:
        self._edge(out, objects, ["g++", *flags, *objects, "-o", out])

    def _edge(self, out: Path, inputs: list[Path], command: list[object], more: str = "") -> None:
        self.edges += 1
        line = " ".join(shlex.quote(str(part)) for part in command).replace("$", "$$")
        self.text += f"rule r{self.edges}\n  command = {line}\n  description = {out.name}\n{more}"
        self.text += f"build {_path(out)}: r{self.edges} {' '.join(map(_path, inputs))}\n"

    def run(self, name: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        with open(OUT / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # builds at the same time share objects
            file = OUT / f"{name}.ninja"
            file.write_text(f"builddir = {_path(OUT)}\n{self.text}")
            command = [_ninja(), "-C", SOURCES, "-f", file, "-j", str(JOBS)]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the SIMT executor does not compile {name}:\n{done.stdout}{done.stderr}")


def _ninja() -> str | None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("ninja", path=path)


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
