"""What the C library does with freed memory: keep it, as in a process that runs for hours, or give it back."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h>; the defaults are glibc's.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}
KEEP = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}


class NotGlibc(Exception):
    """This C library has no `mallopt`."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it, freed memory stays with the process and is taken again by the next tensor. By default glibc maps every
    block above 32 MiB anew, and the system fills its pages with zeros one by one as they are first written. Raises
    NotGlibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise NotGlibc("keeping freed memory needs glibc's mallopt, which this C library lacks")
    try:
        _set(library, KEEP)
        yield
    finally:
        _set(library, DEFAULTS)
        library.malloc_trim(0)


def _set(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        if not library.mallopt(option, value):
            raise NotGlibc(f"mallopt refused option {option} = {value}")
