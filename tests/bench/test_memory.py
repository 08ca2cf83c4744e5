"""Freed memory stays with the process inside `kept_memory`, and only there."""

import json
import resource
import subprocess
import sys

import pytest
import torch

from scaphoid.bench.memory import NotGlibc, kept_memory

PAGES = 10_000  # of 4 KiB: above the 32 MiB that glibc maps anew in every call


def faults_of_filling() -> int:
    """Pages that the system had to bring while a tensor of about PAGES pages was made, filled and freed: the fewest of
    some tries, each smaller than what the one before has left: an aligned block of the same size may not fit in."""
    return min(_faults(PAGES - 16 * tries) for tries in range(8))


def faults_by_default_and_kept() -> tuple[int, int | None]:
    by_default = faults_of_filling()
    try:
        with kept_memory():
            return by_default, faults_of_filling()
    except NotGlibc:
        return by_default, None


def _faults(pages: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(pages * 4096, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_tensor_takes_the_pages_of_those_before_only_where_memory_is_kept():
    fresh = [sys.executable, __file__]  # where no test before has left free blocks
    by_default, kept = json.loads(subprocess.run(fresh, stdout=subprocess.PIPE, check=True).stdout)
    if kept is None:
        pytest.skip("this C library keeps no memory")
    assert by_default > 5 * kept


if __name__ == "__main__":
    print(json.dumps(faults_by_default_and_kept()))
