"""What the compiler made of the kernels: registers, memory and instructions, read from the library's machine code.

Counts are of instructions in the code, not of instructions executed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scaphoid.kernels.kernel_names import readable_names

WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}

# Which kind of work an instruction is, by its name up to the first dot; the first match counts.
KINDS = (
    ("global load", r"LDG|LD"),
    ("global store", r"STG|ST"),
    ("global atomic", r"ATOMG|ATOM|RED|REDG"),
    ("shared", r"LDS|STS|ATOMS|LDSM|STSM"),
    ("local", r"LDL|STL"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX|SET)"),
    ("fp32", r"F(ADD|ADD2|MUL|MUL2|FMA|FMA2|SETP|SET|MNMX|MNMX3|SEL|CHK|SWZADD)(32I)?|MUFU"),
    ("fp16", r"H(ADD2|MUL2|FMA2|SETP2|SET2|MNMX2)"),
    ("conversion", r"F2F|F2I|I2F|I2I|F2FP|I2FP|F2IP|FRND|I2IP"),
    (
        "integer",
        r"I[A-Z0-9]+|LOP3?|LOP32I|SHF|SHL|SHR|LEA|VIADD|VIADDMNMX|VIMNMX3?|VABSDIFF|BMSK|BREV|FLO|POPC|SGXT|LEPC",
    ),
    ("warp", r"SHFL|VOTE|VOTEU|MATCH|REDUX|CREDUX|WARPSYNC"),
    ("barrier", r"BAR|MEMBAR|DEPBAR|ERRBAR|CCTL|FENCE|BPT"),
    ("call", r"CALL"),
    ("branch", r"BRA|BRX|JMP|JMX|EXIT|RET|BSSY|BSYNC|BREAK|BMOV|YIELD|NANOSLEEP|KILL|WARPSYNC|ENDCOLLECTIVE|RPCMOV"),
)
_KIND = re.compile("|".join(f"(?P<k{number}>(?:{pattern})$)" for number, (_, pattern) in enumerate(KINDS)))
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?U?([A-Z][A-Z0-9_]*)([A-Z0-9_.]*)(.*)")
_CALLED = re.compile(r"`\((\S+?)\)")
SYSTEM_SHARED = 1024  # of each block; from compute capability 9.0 on the tools count it with a kernel's own, if any
_DIVISION64 = re.compile(r"div_[su]64|rem_[su]64")


class ToolMissing(Exception):
    """A CUDA tool that is needed and where it was looked for."""


@dataclass
class Kernel:
    """One kernel for one architecture. `shared` is its static shared memory in bytes; `instructions` by kind, `loads`
    and `stores` of global memory by width in bits; `calls` what is called, by name, the called code being counted with
    the kernel."""

    name: str
    architecture: int
    registers: int = 0
    shared: int = 0
    stack: int = 0
    instructions: Counter = field(default_factory=Counter)
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)

    @property
    def base(self) -> str:
        """Its name without namespaces and template arguments: `crop<float, 4>` is `crop`."""
        return re.split(r"[<(]", self.name)[0].split("::")[-1]

    @property
    def divisions64(self) -> int:
        return sum(count for name, count in self.calls.items() if _DIVISION64.search(name))


def tool(name: str) -> Path:
    """cuobjdump, nvdisasm: on PATH, beside nvcc, or as a Python package (triton, which torch brings, has both)."""
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)] + [Path("/usr/local/cuda/bin")]
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        found = importlib.util.find_spec(package)
        places += (
            [Path(folder, inside) for folder in (found.submodule_search_locations or ()) if found] if found else []
        )
    for place in places:
        if (place / name).is_file():
            return (place / name).absolute()
    raise ToolMissing(f"{name} is missing: pip install nvidia-cuda-{name}, or install the CUDA toolkit")


def kernels_of(library: Path) -> list[Kernel]:
    """Every kernel of every architecture in a library, by name and architecture. Raises ToolMissing, and ValueError for
    a library without machine code for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(library, folder)  # cuobjdump writes into the folder it runs in
        subprocess.run(
            [tool("cuobjdump"), "-xelf", "all", Path(copy).name], cwd=folder, check=True, capture_output=True
        )
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            raise ValueError(f"{library.name} holds no GPU code: build it where nvcc is (SCAPHOID_CUDA=1)")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = [kernel for kernels in pool.map(cubin_kernels, cubins) for kernel in kernels]
    return sorted(found, key=lambda kernel: (kernel.name, kernel.architecture))


def cubin_kernels(cubin: Path) -> list[Kernel]:
    usage = _output(tool("cuobjdump"), "-res-usage", cubin)
    architecture = int(re.search(r"sm_(\d+)", cubin.name)[1])
    kernels = {}
    for name, resources in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", resources)}
        shared = max(0, used["SHARED"] - SYSTEM_SHARED * (architecture >= 90))
        kernels[name] = Kernel(name, architecture, used["REG"], shared, used["STACK"])
    if not kernels:
        return []
    read_sass(_output(tool("nvdisasm"), "-c", cubin), kernels)
    readable = readable_names([kernel.name for kernel in kernels.values()])
    for kernel in kernels.values():
        kernel.name = readable[kernel.name]
    return list(kernels.values())


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def read_sass(text: str, kernels: dict[str, Kernel]) -> None:
    """Counts the instructions of `nvdisasm -c` output into the kernels, by mangled name."""
    kernel = None
    for line in text.splitlines():
        if line.startswith(".text."):
            kernel = kernels.get(line.removeprefix(".text.").rstrip(":"))
        elif kernel and (match := _INSTRUCTION.match(line)):
            _count(kernel, *match.groups())


def _count(kernel: Kernel, name: str, modifiers: str, operands: str) -> None:
    if name == "NOP":
        return
    moves = (name == "HFMA2" and "-RZ, RZ" in operands) or (name == "IMAD" and modifiers.startswith(".MOV"))
    kind = "other" if moves else kind_of(name)
    kernel.instructions[kind] += 1
    if kind in ("global load", "global store"):
        counter = kernel.loads if kind == "global load" else kernel.stores
        counter[next((WIDTHS[part] for part in modifiers.split(".") if part in WIDTHS), 32)] += 1
    elif kind == "call":
        called = _CALLED.search(operands)
        name = called[1].split("$__cuda_")[-1].lstrip("$") if called else "unknown"
        kernel.calls["outlined code" if name.startswith(".L") else name] += 1


def kind_of(name: str) -> str:
    """Of an instruction's name without the U of a uniform one; moves, padding and what has no name here: `other`."""
    match = _KIND.match(name)
    return KINDS[int(match.lastgroup[1:])][0] if match else "other"
