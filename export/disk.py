"""A full disk, told in one line. What it makes writers raise names no folder, and often no reason."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, what the user may have of it, or of one file

SCRATCH = "set TMPDIR to one on another disk"  # of folders that Python's tempfile chose


@contextmanager
def room_in(folder: Path, instead: str = "name a folder on another disk") -> Iterator[None]:
    """Raises OSError with such a line for a write to `folder` that did not fit; `instead` of freeing some, do that."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"no space left in {folder} ({error.strerror}): free some, or {instead}") from None


def claim(path: Path, size: int) -> None:
    """Whether `size` bytes fit where `path` was to be written: raises OSError with the system's reason when they do
    not. Leaves nothing there."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)
