"""The SIMT executor: every bug of simt/bugs.cu is caught and named, the kernels of simt/correct.cu pass.

What the executor itself sees is caught in every build; bounds and alignment need Address- and UndefinedBehavior-
Sanitizer, races ThreadSanitizer.
"""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from scaphoid.kernels.simt import build

SOURCES = Path(__file__).parent / "simt"
LANE = r"\n  at .*bugs\.cu:\d+, block \(0, 0, 0\), thread \(\d+, 0, 0\) \(warp \d, lane \d+\)\n"
NOT_A_NUMBER = r"\d+ of the results are not a number"

# Kernel -> what is said of it.
BY_THE_EXECUTOR = {
    "missing_barrier": NOT_A_NUMBER,
    "missing_syncwarp": NOT_A_NUMBER,
    "uninitialised_shared": "^1 of the results are not a number",
    "uninitialised_dynamic": "^64 of the results are not a number",
    "divergent_barrier": r"divergent __syncthreads: other threads of the block wait at .*bugs\.cu:\d+" + LANE,
    "barrier_of_some": "(__syncthreads after threads of the block have exited|a thread exits while .* __syncthreads)"
    + LANE,
    "barrier_after_exit": "(__syncthreads after threads of the block have exited|a thread exits while .* __syncthreads)"
    + LANE,
    "barrier_and_shuffle": r"nothing can go on\n  thread .* waits at __syncthreads, .*bugs\.cu:\d+\n"
    r"  thread .* waits at __shfl_xor_sync with mask 0xffffffff, .*bugs\.cu:\d+\n  in block \(0, 0, 0\)",
    "caller_not_in_mask": "__shfl_down_sync with mask 0x0000ffff: the calling lane is not in it" + LANE,
    "shuffle_of_some": "(__shfl_down_sync with mask .*: lanes? .* exited|a thread exits while .* __shfl_down_sync)"
    + LANE,
    "absent_lanes": "__shfl_down_sync with mask 0xffffffff: the block has no lanes 20 21 .* 31" + LANE,
    "lane_not_in_mask": "__shfl_sync reads lane 16, which is not in its mask 0x0000ffff" + LANE,
    "masks_differ": "__shfl_xor_sync with mask 0x.*: lane .* waits with mask 0x.*" + LANE,
    "sites_differ": "__shfl_xor_sync: other lanes of mask 0xffffffff are at __shfl_xor_sync, .*" + LANE,
    "wrong_ballot_mask": "(__ballot_sync with mask 0xffffffff: lanes? .* exited|a thread exits while .* __ballot_sync)"
    + LANE,
    "width_of_24": "__shfl_down_sync with width 24, which is not a power of two up to 32" + LANE,
    "widths_differ": "__shfl_down_sync with width (16, on other lanes 8|8, on other lanes 16)" + LANE,
    "shared_out_of_bounds": "something was written behind the end of shared array values",
    "dynamic_out_of_bounds": "something was written behind the end of shared array values",
    "too_much_static": "with last the block has 49156 bytes of shared memory, more than 49152" + LANE,
    "block_too_large": r"more than 1024 threads: grid \(1, 1, 1\), block \(1025, 1, 1\)\ncudaErrorInvalidConfiguration",
    "block_too_large_in_3d": "more than 1024 threads",
    "block_too_deep": "more than 64 threads in z",
    "block_of_none": "a block of no threads",
    "grid_of_none": "a grid of no blocks",
    "grid_too_high": "more than 65535 blocks in y or z",
    "grid_too_deep": "more than 65535 blocks in y or z",
    "shared_too_large": "49153 bytes of dynamic shared memory, more than 49152\ncudaErrorInvalidValue",
}
BY_ADDRESS_SANITIZER = {
    "shared_out_of_bounds": r"(index 64 out of bounds|heap-buffer-overflow .* in shared_out_of_bounds)",
    "dynamic_out_of_bounds": "heap-buffer-overflow .* in dynamic_out_of_bounds",
    "global_out_of_bounds": "heap-buffer-overflow .* in global_out_of_bounds",
    "misaligned_vector": "store to misaligned address 0x[0-9a-f]+ for type 'struct float4'",
    "stack_overflow": "SEGV .* in stack_overflow",
}
BY_THREAD_SANITIZER = [
    "missing_barrier",
    "missing_middle_barrier",
    "missing_syncwarp",
    "syncwarp_for_syncthreads",
    "shuffle_for_syncwarp",
    "blocks_race",
    "blocks_race_after_barrier",
    "plain_increment",
    "atomic_and_plain",
]
SEEDS = (0, 1, 2)

pytestmark = pytest.mark.timeout(1800)  # the first test of a mode compiles for all of them


@cache
def _built(mode: str) -> dict[str, Path]:
    sources = sorted(SOURCES.glob("*.cu"))
    return dict(zip((source.stem for source in sources), build.programs(sources, mode, ops=False), strict=True))


def _run(mode: str, program: str, *arguments: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    if reason := build.missing_tools():
        pytest.skip(reason)
    environment = {**os.environ, "SCAPHOID_SIMT_SEED": str(seed)}
    command = [_built(mode)[program], *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("bug", BY_THE_EXECUTOR)
def test_executor_catches(bug: str) -> None:
    for seed in SEEDS:
        ran = _run("plain", "bugs", bug, seed=seed)
        assert ran.returncode == 1, ran.stderr
        assert re.search(BY_THE_EXECUTOR[bug], ran.stderr), ran.stderr
        assert "SIMT" not in ran.stderr or f"SIMT: kernel {bug}: " in ran.stderr, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", BY_ADDRESS_SANITIZER)
def test_address_sanitizer_catches(bug: str) -> None:
    ran = _run("asan", "bugs", bug)
    assert ran.returncode != 0, ran.stderr
    assert re.search(BY_ADDRESS_SANITIZER[bug], ran.stderr), ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", BY_THREAD_SANITIZER)
def test_thread_sanitizer_catches(bug: str) -> None:
    for seed in SEEDS:
        ran = _run("tsan", "bugs", bug, seed=seed)
        assert ran.returncode != 0, f"seed {seed}: {ran.stderr}"
        assert re.search(f"SUMMARY: ThreadSanitizer: data race .* in {bug}", ran.stderr), ran.stderr


@pytest.mark.parametrize("bug", ["missing_middle_barrier", "shuffle_for_syncwarp", "blocks_race_after_barrier"])
def test_races_without_a_trace(bug: str) -> None:
    """The results are right in every order that the executor takes: ThreadSanitizer alone sees them."""
    for seed in SEEDS:
        ran = _run("plain", "bugs", bug, seed=seed)
        assert ran.returncode == 0, ran.stderr


def test_every_bug_is_expected_somewhere() -> None:
    text = (SOURCES / "bugs.cu").read_text()
    bugs = set(re.findall(r"^    (?:BUG\(|\{\")(\w+)", text, re.MULTILINE))
    assert bugs == {*BY_THE_EXECUTOR, *BY_ADDRESS_SANITIZER, *BY_THREAD_SANITIZER}


@pytest.mark.parametrize(
    "mode", ["plain", pytest.param("asan", marks=pytest.mark.slow), pytest.param("tsan", marks=pytest.mark.slow)]
)
def test_correct_kernels_pass(mode: str) -> None:
    ran = _run(mode, "correct")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Sanitizer: " not in ran.stderr, ran.stderr


def test_order_follows_from_seed() -> None:
    """The first thread to come is named."""
    said = [_run("plain", "bugs", "caller_not_in_mask", seed=seed).stderr for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert said[:4] == said[4:]
    assert len(set(said)) > 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("__activemask()", "use of deleted function"),
        ("__shfl_sync(~0U, dim3(1), 0)", "no matching function"),  # a struct: CUDA has no such overload
        ("atomicMin(out, 1.0F)", "no matching function"),
    ],
)
def test_refused_by_the_compiler(call: str, said: str) -> None:
    if reason := build.missing_tools():
        pytest.skip(reason)
    source = f'#include "launch.h"\n__global__ void kernel(float* out) {{ {call}; }}\n'
    command = ["g++", *build.FLAGS, *build.EXECUTOR, "-fsyntax-only", "-"]
    ran = subprocess.run(command, cwd=build.SOURCES, input=source, capture_output=True, text=True)
    assert ran.returncode != 0
    assert said in ran.stderr, ran.stderr
