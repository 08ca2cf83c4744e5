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
SEEDS = {"plain": (0, 1, 2), "asan": (3, 4), "tsan": (5,)}
LONG_UNDER_TSAN = ("activation_maps", "crop_resize")  # minutes each: `make sanitize` runs them

pytestmark = pytest.mark.timeout(3600)  # the first test of a mode compiles for all of them


@cache
def _built(mode: str) -> dict[str, Path]:
    return dict(zip((source.stem for source in SOURCES), build.programs(SOURCES, mode, ops=True), strict=True))


def _runs() -> list:
    marks = {"plain": [], "asan": [pytest.mark.slow], "tsan": [pytest.mark.slow]}
    runs = [(source.stem, mode) for mode in SEEDS for source in SOURCES]
    long = [pytest.mark.thorough]
    return [
        pytest.param(*run, marks=marks[run[1]] + (long if run[1] == "tsan" and run[0] in LONG_UNDER_TSAN else []))
        for run in runs
    ]


@pytest.mark.parametrize(("program", "mode"), _runs())
def test_program(program: str, mode: str) -> None:
    if reason := build.missing_tools():
        pytest.skip(reason)
    for seed in SEEDS[mode]:
        environment = {**os.environ, "SCAPHOID_SIMT_SEED": str(seed)}
        ran = subprocess.run([_built(mode)[program]], env=environment, capture_output=True, text=True, timeout=1500)
        assert ran.returncode == 0, f"seed {seed}: {ran.stdout[-4000:]}{ran.stderr[-4000:]}"
