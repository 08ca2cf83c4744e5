"""Compiles the op library: which compilers, architectures, flags and sources. Needs g++ and ninja; nvcc where CUDA is
to be included; torch for the torch library alone.

    python kernels/build_ops.py torch --out kernels/libscaphoid_ops.so   # what `pip install` runs: torch.ops.scaphoid.*
    python3 kernels/build_ops.py edge --out libscaphoid_ops_c.so         # the C interface (scaphoid_ops.h), no torch

`SCAPHOID_CUDA` says whether CUDA is included: `auto` (the default: where nvcc is found), `0` (never), `1` (or fail), or
architectures such as `"80 87"` (those alone, or fail). nvcc is looked for in `CUDA_HOME`, on `PATH`, in /usr/local/cuda
and among the Python packages (nvidia-cuda-nvcc).
"""

import argparse
import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "csrc"
OBJECTS = ROOT / "build" / "ops"
SYSTEM = Path("/usr/local/cuda")
PACKAGES = "cuda-toolkit[cccl,nvcc]==13.0.3.0"  # as in pyproject.toml's dev extra

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)  # Turing to Blackwell; a compiler leaves out those it lacks
STRICT_NVCC = "13.0"  # the release that the sources are tested with: its warnings are errors
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest release that can load the library

LANGUAGE = ["-std=c++20", "-O3", "-DNDEBUG"]
HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CPU = ["-ffp-contract=off", "-fno-math-errno"]  # the same rounding on every processor
CUDA = ["--fmad=false", "-Xptxas=-v"]  # the same rounding as the CPU; the log says what each kernel uses
LINK = ["-shared", "-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler, and for which architectures it compiles here."""

    nvcc: Path
    version: str
    architectures: tuple[int, ...]

    @property
    def root(self) -> Path:
        """Its include and lib folders' parent, asked of nvcc itself, which may be a link or a wrapper."""
        command = [self.nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return Path(re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)[1]).resolve()

    @property
    def code(self) -> tuple[str, ...]:
        """What the library holds: machine code for each architecture, PTX of the newest for those to come."""
        return (*(f"sm_{a}" for a in self.architectures), f"compute_{self.architectures[-1]}")

    def flags(self) -> list[str]:
        """What nvcc is told, without sources and outputs."""
        newest = self.architectures[-1]
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures[:-1]]
        targets.append(f"-gencode=arch=compute_{newest},code=[compute_{newest},sm_{newest}]")
        strict = ["-Werror", "all-warnings"] if self.version == STRICT_NVCC else []
        return [*LANGUAGE, *CUDA, *strict, f"-Xcompiler={','.join(HOST)}", *targets]


def find_nvcc() -> Path | None:
    """nvcc in CUDA_HOME, on PATH, in /usr/local/cuda, in the package nvidia-cuda-nvcc; None where there is none."""
    if home := os.environ.get("CUDA_HOME"):
        if not Path(home, "bin", "nvcc").is_file():
            sys.exit(f"scaphoid ops: CUDA_HOME is {home}, but {home}/bin/nvcc is missing; mend or unset CUDA_HOME")
        return Path(home, "bin", "nvcc")
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    packages = importlib.util.find_spec("nvidia")
    homes = [
        SYSTEM,
        *(Path(p, "cu13") for p in (packages.submodule_search_locations if packages else ())),
    ]
    return next((home / "bin" / "nvcc" for home in homes if (home / "bin" / "nvcc").is_file()), None)


def find_toolkit() -> Toolkit | None:
    """The CUDA compiler to use as SCAPHOID_CUDA says, or None for a CPU library."""
    wanted = os.environ.get("SCAPHOID_CUDA", "auto")
    if wanted == "0":
        return None
    if not re.fullmatch(r"auto|1|\d{2,3}( \d{2,3})*", wanted):
        sys.exit(f'scaphoid ops: SCAPHOID_CUDA must be auto, 0, 1 or architectures such as "80 87"; got "{wanted}"')
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "auto":
            return None
        sys.exit(
            f'scaphoid ops: SCAPHOID_CUDA is "{wanted}", but there is no nvcc in CUDA_HOME, on PATH, in {SYSTEM} or '
            f'among the packages; install one (pip install "{PACKAGES}") or set SCAPHOID_CUDA=0'
        )
    known = {int(a) for a in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))}
    asked = (
        tuple(map(int, wanted.split()))
        if wanted not in ("auto", "1")
        else tuple(a for a in ARCHITECTURES if a in known)
    )
    if missing := set(asked) - known:
        sys.exit(f"scaphoid ops: {nvcc} knows no architecture {sorted(missing)}; it knows {sorted(known)}")
    return Toolkit(nvcc, re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))[1], asked)


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def sources(pattern: str) -> list[Path]:
    """Sources below csrc, relative to it."""
    return sorted(path.relative_to(SOURCES) for path in SOURCES.glob(pattern))


class NinjaFile:
    """A ninja file, edge by edge, in the folder that takes its logs. Commands run in csrc, so that no path of this
    machine is compiled in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = f"ninja_required_version = 1.8\nbuilddir = {_path(folder)}\n"
        self.edges = 0

    def add(self, built: Path, inputs: list[Path], line: str, depfile: str = "") -> Path:
        """One shell line that makes `built` of `inputs` and, in `depfile`, of what else it read."""
        self.edges += 1
        self.text += f"rule r{self.edges}\n  command = {line.replace('$', '$$')}\n  description = {built.name}\n"
        self.text += f"  deps = gcc\n  depfile = {depfile}\n" if depfile else ""
        self.text += f"build {_path(built)}: r{self.edges} {' '.join(map(_path, inputs))}\n"
        return built

    def run(self, name: str, *wanted: object, **how: object) -> subprocess.CompletedProcess:
        """Makes what is out of date. `how` goes to subprocess.run."""
        file = self.folder / f"{name}.ninja"
        file.write_text(self.text)
        return subprocess.run([find_ninja(), "-C", SOURCES, "-f", file, *map(str, wanted)], **how)


def find_ninja() -> str | None:
    """ninja beside this interpreter or on PATH."""
    return shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Builds at the same time share a folder's objects: one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def shell_line(command: list[object]) -> str:
    return " ".join(shlex.quote(str(part)) for part in command)


def compile_line(command: list[object], source: Path, built: Path) -> str:
    """A compiler's `command` completed by dependencies (in BUILT.d), source and object."""
    return shell_line([*command, "-MD", "-MF", f"{built}.d", "-c", source, "-o", built])


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compile(ninja: NinjaFile, source: Path, into: str, command: list[object], log: bool = False) -> Path:
    """Adds an object. `log` keeps what the compiler said beside it."""
    built = OBJECTS / into / f"{source.stem}.o"
    line = compile_line(command, source, built)
    if log:
        kept = shlex.quote(f"{built}.log")
        line = f"{line} > {kept} 2>&1 || {{ cat {kept} >&2; exit 1; }}"
    return ninja.add(built, [source], line, f"{built}.d")


def _link(ninja: NinjaFile, objects: list[Path], name: str, libraries: list[object]) -> Path:
    built = OBJECTS / name
    return ninja.add(built, objects, shell_line(["g++", *LINK, *objects, *libraries, "-o", built]))


def plan(kind: str, toolkit: Toolkit | None) -> tuple[NinjaFile, Path]:
    """The ninja file of one library, "torch" or "edge", and where ninja puts that library."""
    ninja, flavour = NinjaFile(OBJECTS), "cuda" if toolkit else "cpu"
    code = " ".join(toolkit.code) if toolkit else ""
    host = ["g++", *LANGUAGE, *HOST, *CPU, "-I."]
    objects = [_compile(ninja, source, "cpu", host) for source in sources("cpu/*.cpp")]
    objects.append(_compile(ninja, Path("architectures.cpp"), flavour, [*host, f'-DSCAPHOID_CUDA_CODE="{code}"']))
    libraries: list[object] = []
    if toolkit:
        nvcc = [toolkit.nvcc, *toolkit.flags(), "-I."]
        objects += [_compile(ninja, source, "cuda", nvcc, log=True) for source in sources("cuda/*.cu")]
        libraries += [f"-L{toolkit.root / lib}" for lib in ("lib64", "lib") if (toolkit.root / lib).is_dir()]
        libraries += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    if kind == "edge":
        built = _link(ninja, objects, f"{flavour}/libscaphoid_ops_c.so", libraries)
        return ninja, built

    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    host += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"-isystem{torch / 'include'}"]  # our warnings, not torch's
    host += [f"-ffile-prefix-map={torch}=torch"]  # its macros carry __FILE__
    libraries += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if toolkit:
        host += ["-DSCAPHOID_CUDA", f"-isystem{toolkit.root / 'include'}"]
        libraries += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]  # brings libtorch_cuda where torch has one
    registrations = [Path("schema.cpp"), *sources("registration/*.cpp")]
    objects += [_compile(ninja, source, f"{flavour}/registration", host) for source in registrations]
    built = _link(ninja, objects, f"{flavour}/libscaphoid_ops.so", libraries)
    return ninja, built


def build(kind: str, out: Path) -> None:
    """Builds the "torch" or the "edge" library as `out`; what is up to date is not compiled again."""
    toolkit = find_toolkit()
    if find_ninja() is None:
        sys.exit("scaphoid ops: ninja is missing; install it (pip install ninja, or the system's ninja-build)")
    with alone_in(OBJECTS):
        ninja, built = plan(kind, toolkit)
        print(f"scaphoid ops ({kind}): {'CPU and CUDA ' + toolkit.version if toolkit else 'CPU only'}", flush=True)
        if ninja.run("build", built).returncode:
            hint = "; to build without CUDA set SCAPHOID_CUDA=0" if toolkit else ""
            sys.exit(f"scaphoid ops: the build failed, see above{hint}")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, out.with_suffix(".tmp"))
        out.with_suffix(".tmp").replace(out)  # a process that has the old one loaded keeps it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["torch", "edge"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    build(arguments.kind, arguments.out.resolve())
