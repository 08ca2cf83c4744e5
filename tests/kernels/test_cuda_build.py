"""The builds with and without a CUDA compiler. CUDA code is compiled for every architecture, not run on hardware."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scaphoid.kernels import budget, build_ops

ALL = [f"sm_{architecture}" for architecture in build_ops.ARCHITECTURES]
INSPECT = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
ask = ctypes.CDLL(sys.argv[1]).scaphoid_cuda_architectures
ask.restype = ctypes.c_char_p
print(ask().decode())
for key in ("CPU", "CUDA"):
    ops = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    print(*sorted(name for name in ops if name.startswith("scaphoid::")))
boxes, _ = torch.ops.scaphoid.object_box(torch.eye(5)[None], torch.ones(1, 5, 5), 5, 5)
print(boxes.tolist())
"""
PROGRAM = """
#include "scaphoid_ops.h"
#include <stdio.h>
#include <stdlib.h>
int main(void) {
  const float map[] = {0, 0, 0, 0, 1, 1};
  float box[4], margin[1];
  void* workspace = malloc(scaphoid_object_box_workspace(2, 3));
  scaphoid_object_box_cpu(map, map, 1, 2, 3, 20, 30, box, margin, workspace);
  free(workspace);
  printf("%g %g %g %g [%s]", box[0], box[1], box[2], box[3], scaphoid_cuda_architectures());
  return 0;
}
"""


@pytest.fixture
def toolkit(monkeypatch) -> build_ops.Toolkit:
    """The compiler of the CUDA build, with every architecture that it knows."""
    if build_ops.find_nvcc() is None:
        pytest.skip("there is no nvcc; pip install -e '.[dev]' brings one")
    monkeypatch.setenv("SCAPHOID_CUDA", "1")
    return build_ops.find_toolkit()


def inspect(library: Path) -> tuple[list[str], list[str], list[str], str]:
    """The library's GPU code, its ops for the CPU and for CUDA, and boxes it computes, in a fresh process."""
    command = [sys.executable, "-c", INSPECT, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    code, cpu, cuda, boxes = done.stdout.splitlines()
    return code.split(), cpu.split(), cuda.split(), boxes


def test_without_nvcc_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(build_ops, "find_nvcc", lambda: None)
    for wanted in ("auto", "0"):
        monkeypatch.setenv("SCAPHOID_CUDA", wanted)
        assert build_ops.find_toolkit() is None
    for wanted in ("1", "80 90"):
        monkeypatch.setenv("SCAPHOID_CUDA", wanted)
        with pytest.raises(SystemExit, match=rf'SCAPHOID_CUDA is "{wanted}", but there is no nvcc.*SCAPHOID_CUDA=0'):
            build_ops.find_toolkit()


def test_a_wrong_wish_or_home_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SCAPHOID_CUDA", "yes")
    with pytest.raises(SystemExit, match=r'must be auto, 0, 1 or architectures such as "80 87"; got "yes"'):
        build_ops.find_toolkit()
    monkeypatch.setenv("SCAPHOID_CUDA", "auto")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"{tmp_path}/bin/nvcc is missing; mend or unset CUDA_HOME"):
        build_ops.find_toolkit()


def test_architectures_are_those_that_nvcc_knows(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        '#!/bin/sh\n[ $1 = --version ] && echo "tools, release 12.6, V12.6.85" || '
        "echo compute_75 compute_80 compute_87 compute_90\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SCAPHOID_CUDA", "1")
    toolkit = build_ops.find_toolkit()
    assert toolkit.version == "12.6"
    assert toolkit.code == ("sm_75", "sm_80", "sm_87", "sm_90", "compute_90")
    monkeypatch.setenv("SCAPHOID_CUDA", "87 120")
    with pytest.raises(SystemExit, match=r"knows no architecture \[120\]; it knows \[75, 80, 87, 90\]"):
        build_ops.find_toolkit()


def test_nvcc_of_the_packages_is_found(monkeypatch):
    package = Path(next(iter(find_spec("nvidia").submodule_search_locations)), "cu13", "bin", "nvcc")
    if not package.is_file():
        pytest.skip("nvidia-cuda-nvcc is not installed; pip install -e '.[dev]' brings it")
    monkeypatch.setattr(build_ops, "SYSTEM", Path("/nowhere"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert build_ops.find_nvcc() == package
    monkeypatch.undo()
    assert (build_ops.Toolkit(package, "13.0", (80,)).root / "include" / "cuda_runtime.h").is_file()


@pytest.mark.slow
def test_cpu_build(build):
    built = build("torch", "0")
    assert "CPU only" in built.said
    code, cpu, cuda, boxes = inspect(built.path)
    assert (code, cuda) == ([], [])
    assert "scaphoid::object_box" in cpu
    assert boxes == "[[0.0, 0.0, 5.0, 5.0]]"


@pytest.mark.slow
def test_cuda_build_has_every_op_and_architecture(build, toolkit):
    built = build("torch", "1")
    assert "CPU and CUDA" in built.said
    code, cpu, cuda, boxes = inspect(built.path)
    assert code == list(toolkit.code)
    if toolkit.version == build_ops.STRICT_NVCC:
        assert code == [*ALL, "compute_120"]
    assert cuda == cpu
    assert boxes == "[[0.0, 0.0, 5.0, 5.0]]"


@pytest.mark.slow
def test_cuda_code_is_in_the_library(libraries, toolkit):
    """By cuobjdump, not by what the build says of itself."""
    cuobjdump = Path(next(iter(find_spec("nvidia").submodule_search_locations)), "cu13", "bin", "cuobjdump")
    if not cuobjdump.is_file():
        pytest.skip("nvidia-cuda-cuobjdump is not installed; pip install -e '.[dev]' brings it")
    for option, form, expected in (
        ("--list-elf", r"(sm_\d+)\.cubin", toolkit.code[:-1]),
        ("--list-ptx", r"(sm_\d+)\.ptx", toolkit.code[-2:-1]),
    ):
        listed = subprocess.run([cuobjdump, option, libraries["cuda"]], capture_output=True, text=True, check=True)
        held = re.findall(form, listed.stdout)
        assert {name: held.count(name) for name in held} == dict.fromkeys(expected, len(build_ops.sources("cuda/*.cu")))


@pytest.mark.slow
def test_compiles_without_a_warning(libraries):
    for source in build_ops.sources("cuda/*.cu"):
        said = (build_ops.OBJECTS / "cuda" / f"{source.stem}.o.log").read_text()
        assert "ptxas info" in said
        assert "warning" not in said.lower(), said
    assert "all-warnings" in build_ops.Toolkit(Path("nvcc"), build_ops.STRICT_NVCC, (80,)).flags()


@pytest.mark.slow
def test_kernels_keep_their_budget(libraries, toolkit):
    if toolkit.version != build_ops.STRICT_NVCC:
        pytest.skip(f"the budget is that of nvcc {build_ops.STRICT_NVCC}")
    measured, allowed = budget.measured(), budget.budget()
    remedy = "; if it is worth its price, write kernels/budget.toml anew: make budget"
    assert measured.keys() == allowed.keys(), f"kernels came or went{remedy}"
    for kernel, uses in measured.items():
        assert list(uses) == ALL
        for architecture, use in uses.items():
            limit = allowed[kernel][architecture]
            assert (use.stack, use.spilled) == (0, 0), f"{kernel} on {architecture} spills or uses local memory: {use}"
            assert use.registers <= limit.registers, f"{kernel} on {architecture}: {use} over {limit}{remedy}"
            assert use.shared <= limit.shared, f"{kernel} on {architecture}: {use} over {limit}{remedy}"


@pytest.mark.slow
def test_ptxas_is_read_right(monkeypatch, tmp_path, toolkit):
    """A kernel that indexes a local array at run time needs a stack, and the budget refuses it."""
    (tmp_path / "cuda").mkdir()
    source = tmp_path / "cuda" / "greedy.cu"
    source.write_text(
        "namespace scaphoid { namespace {\n"
        "template <class T> __global__ void greedy(T* to, unsigned at) {\n"
        "  __shared__ T shared[77];\n  T local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[at * i % 64] = to[i];\n"
        "  shared[threadIdx.x] = local[at];\n  __syncthreads();\n  to[threadIdx.x] = shared[at];\n}\n"
        "template __global__ void greedy<float>(float*, unsigned);\n} }\n"
    )
    command = [toolkit.nvcc, "-cubin", "-arch=sm_80", "-Xptxas=-v", source, "-o", tmp_path / "greedy.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (tmp_path / "cuda" / "greedy.o.log").write_text(log)
    monkeypatch.setattr(build_ops, "SOURCES", tmp_path)
    monkeypatch.setattr(build_ops, "OBJECTS", tmp_path)
    use = budget.measured()["greedy.cu: greedy<float>"]["sm_80"]
    assert (use.shared, use.stack, use.spilled) == (77 * 4, 64 * 4, 0)
    assert 0 < use.registers < 100
    with pytest.raises(ValueError, match=r"greedy<float> spills or uses local memory on sm_80"):
        budget.write(tmp_path / "budget.toml")


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["0", "1"])  # without an nvcc `build` skips the second alone
def test_edge_library_needs_no_torch(build, monkeypatch, tmp_path, cuda):
    monkeypatch.setenv("SCAPHOID_CUDA", cuda)
    toolkit = build_ops.find_toolkit() if cuda == "0" or build_ops.find_nvcc() else None
    library = build("edge", cuda).path
    (tmp_path / "program.c").write_text(PROGRAM)
    program = tmp_path / "program"
    command = ["gcc", "-Wall", "-Wextra", "-Werror", tmp_path / "program.c", f"-I{build_ops.SOURCES}", library]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", program], check=True)
    said = subprocess.run([program], env={}, capture_output=True, text=True, check=True).stdout
    assert said == f"10 10 30 20 [{' '.join(toolkit.code) if toolkit else ''}]"
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert library.name in listed
    assert not re.search("torch|python|cudart", listed)
