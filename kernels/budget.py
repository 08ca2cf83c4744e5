"""What each CUDA kernel may use on each architecture: registers and static shared memory, no stack, no spills.

`budget.toml` is what ptxas said when it was last written; a test refuses more. After a change that is worth its
price, write it anew and look at the difference:

    python -m scaphoid.kernels.budget
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from scaphoid.kernels import build_ops
from scaphoid.kernels.kernel_names import readable_names

PATH = build_ops.ROOT / "kernels" / "budget.toml"


@dataclass(frozen=True)
class Use:
    """What one kernel uses on one architecture: registers a thread, bytes of static shared memory a block, bytes of
    stack (local memory) and bytes spilled a thread."""

    registers: int
    shared: int
    stack: int
    spilled: int


def measured() -> dict[str, dict[str, Use]]:
    """What ptxas said in the last CUDA build, by kernel ("crop_resize.cu: crop<float>") and architecture ("sm_80")."""
    kernels: dict[str, dict[str, Use]] = {}
    for source in build_ops.sources("cuda/*.cu"):
        log = (build_ops.OBJECTS / "cuda" / f"{source.stem}.o.log").read_text()
        for mangled, architecture, said in re.findall(
            r"Compiling entry function '(\S+)' for '(sm_\d+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL
        ):
            use = Use(
                registers=_largest(r"Used (\d+) registers", said),
                shared=_largest(r"(\d+) bytes smem", said),
                stack=_largest(r"(\d+) bytes stack frame", said),
                spilled=_largest(r"(\d+) bytes spill (?:stores|loads)", said),
            )
            kernels.setdefault(f"{source.name}: {readable_names([mangled])[mangled]}", {})[architecture] = use
    return kernels


def _largest(pattern: str, text: str) -> int:
    return max((int(number) for number in re.findall(pattern, text)), default=0)


def budget() -> dict[str, dict[str, Use]]:
    """The budget file, in the form of `measured`."""
    return {
        kernel: {
            architecture: Use(registers, entry["shared"], stack=0, spilled=0)
            for architecture, registers in entry["registers"].items()
        }
        for kernel, entry in tomllib.loads(PATH.read_text()).items()
    }


def write(path: Path = PATH) -> None:
    """Writes what was measured as the budget. Raises ValueError for a kernel that spills or uses a stack."""
    lines = ["# What each kernel may use, written by `make budget`: registers a thread on each architecture, bytes of"]
    lines += ["# static shared memory a block. No kernel may spill or use a stack (local memory).", ""]
    for kernel, uses in sorted(measured().items()):
        if wrong := [name for name, use in uses.items() if use.stack or use.spilled]:
            raise ValueError(f"{kernel} spills or uses local memory on {', '.join(wrong)}: {uses[wrong[0]]}")
        registers = ", ".join(f"{name} = {use.registers}" for name, use in uses.items())
        shared = max(use.shared for use in uses.values())
        lines += [f'["{kernel}"]', f"registers = {{ {registers} }}", f"shared = {shared}", ""]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    build_ops.build("edge", build_ops.ROOT / "build" / "edge" / "libscaphoid_ops_c.so")
    write()
    print(f"wrote {PATH}")
