"""The programs of tests/kernels/programs, each of which compares an op's CUDA sources (under the SIMT executor) with
its CPU sources: as they are, under Address- and UndefinedBehaviorSanitizer, under ThreadSanitizer; over several
orders of threads. Without torch."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from scaphoid.kernels.simt import build

SOURCES = sorted((Path(__file__).parent / "programs").glob("*.cpp"))
SEEDS = {"plain": (0, 1), "asan": (3,), "tsan": (5,)}

pytestmark = pytest.mark.timeout(3600)  # the first test of a mode compiles for all of them


@cache
def _built(mode: str) -> dict[str, Path]:
    return dict(zip((source.stem for source in SOURCES), build.programs(SOURCES, mode, ops=True), strict=True))


@pytest.mark.parametrize(
    "mode",
    [
        "plain",
        pytest.param("asan", marks=pytest.mark.slow),
        pytest.param("tsan", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("program", [source.stem for source in SOURCES])
def test_program(program: str, mode: str) -> None:
    if reason := build.missing_tools():
        pytest.skip(reason)
    for seed in SEEDS[mode]:
        environment = {**os.environ, "SCAPHOID_SIMT_SEED": str(seed)}
        ran = subprocess.run([_built(mode)[program]], env=environment, capture_output=True, text=True, timeout=1500)
        assert ran.returncode == 0, f"seed {seed}: {ran.stdout[-4000:]}{ran.stderr[-4000:]}"
