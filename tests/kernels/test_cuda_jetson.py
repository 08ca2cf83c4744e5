"""The CUDA sources under the compiler of Jetson's CUDA 12.6, for Orin (sm_87).

Packages bring that compiler as a library (NVRTC), which compiles for the device alone: the launch functions, host code
elsewhere, are compiled as device code that launches kernels, so they are checked too. Compiled, not run on hardware.
"""

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from scaphoid.kernels import build_ops

MATH = "#include <cuda/std/cmath>\nnamespace std { using namespace cuda::std; }\n"
MEMORY = "#include <cuda/std/cstddef>\nusing cuda::std::size_t;\nnamespace std { using ::memcpy; using ::memset; }\n"
WHOLE = "#include <cuda/std/cstdint>\nusing namespace cuda::std;\n"
# NVRTC has no standard library but CUDA's own; the sources ask for these.
HEADERS = {
    "climits": "#include <cuda/std/climits>\n",
    "cmath": MATH,
    "cstddef": MEMORY,
    "cstdint": WHOLE + "namespace std { using namespace cuda::std; }\n",
    "cstring": MEMORY,
    "math.h": MATH + "using namespace cuda::std;\n",
    "stddef.h": MEMORY,
    "stdint.h": WHOLE,
    "string.h": MEMORY,
    "type_traits": "#include <cuda/std/type_traits>\nnamespace std { using namespace cuda::std; }\n",
    "utility": "#include <cuda/std/utility>\nnamespace std { using namespace cuda::std; }\n",
}
FLAGS = [
    "--gpu-architecture=sm_87",
    "--std=c++20",
    "--fmad=false",
    "--device-as-default-execution-space",
    "--relocatable-device-code=true",
    "--ptxas-options=-v",
    "--diag-suppress=1097",  # visibility means nothing to NVRTC
]


def package(name: str) -> Path:
    spec = find_spec(f"nvidia.{name}") if find_spec("nvidia") else None
    if spec is None:
        pytest.skip(f"CUDA 12.6's nvidia.{name} is not installed; pip install -e '.[dev]' brings it")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    library = ctypes.CDLL(str(package("cuda_nvrtc") / "lib" / "libnvrtc.so.12"))
    major, minor = ctypes.c_int(), ctypes.c_int()
    assert library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0
    assert (major.value, minor.value) == (12, 6)
    return library


def compile_for_orin(nvrtc: ctypes.CDLL, source: str, name: str) -> tuple[bool, str]:
    """Whether it compiles, and what the compiler said."""

    def strings(values) -> ctypes.Array:
        return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))

    folders = [build_ops.SOURCES, build_ops.SOURCES / "cuda", package("cuda_runtime") / "include"]
    flags = [*FLAGS, *(f"-I{folder}" for folder in [*folders, package("cuda_cccl") / "include"])]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    texts, names = strings([f"#pragma once\n{text}" for text in HEADERS.values()]), strings(HEADERS)
    assert (
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(HEADERS), texts, names) == 0
    )
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), strings(flags))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return not failed, log.value.decode()


@pytest.mark.parametrize("source", build_ops.sources("cuda/*.cu"), ids=lambda source: source.stem)
def test_compiles_without_warnings_or_spills(nvrtc, source):
    path = build_ops.SOURCES / source
    compiled, log = compile_for_orin(nvrtc, path.read_text(), str(path))
    assert compiled, log
    assert "warning" not in log, log
    kernels = re.findall(r"entry function '(\S+)'.*?(\d+) bytes stack.*?(\d+) bytes spill", log, re.DOTALL)
    assert kernels, f"no kernel was compiled: {log}"
    for kernel, stack, spilled in kernels:
        assert (int(stack), int(spilled)) == (0, 0), f"{kernel} uses local memory or spills: {log}"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("__global__ void k(float* x) { x[0] = missing; }", "missing"),
        ("__global__ void k(float* x) { int unused; x[0] = 1; }", "warning"),
        (
            '__global__ void k() {}\nextern "C" int launch() { LAUNCH(k, 1, 1, 0, 0, 3); return 0; }',
            "too many arguments",
        ),
    ],
)
def test_faults_are_seen(nvrtc, fault, said):
    compiled, log = compile_for_orin(nvrtc, f'#include "launch.h"\n{fault}\n', "fault.cu")
    assert said in log
    assert compiled == (said == "warning")
