"""Freed memory stays with the process inside `kept_memory`, and only there."""

import resource

import pytest
import torch

from scaphoid.bench.memory import NotGlibc, kept_memory

PAGES = 10_000  # of 4 KiB: above the 32 MiB that glibc maps anew in every call


def faults_of_filling() -> int:
    """Pages that the system had to bring while a tensor of PAGES pages was made, filled and freed: the fewest of some
    tries, since what is kept may at first not fit."""
    return min(_faults() for _ in range(8))


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(PAGES * 4096, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_tensor_takes_the_pages_of_those_before_only_where_memory_is_kept():
    try:
        with kept_memory():
            kept = faults_of_filling()
    except NotGlibc as reason:
        pytest.skip(str(reason))
    assert faults_of_filling() > 5 * kept
