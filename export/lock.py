"""Locks on folders, which the kernel releases when the process that holds them ends, however it ends.

A folder can be locked where nothing can be written, and needs no line in the manifest as a file would. The locks are
known to one machine: they do not keep another one from changing what both have mounted.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaphoid.export.artefacts import ManifestError

LOOK_S = 0.1
LOCKS = Path("/proc/locks")  # "1: FLOCK  ADVISORY  WRITE 4711 fd:00:131 0 EOF": process, then device and inode


class InUse(ManifestError):
    """Another process holds what is wanted. One line: which, and what to do."""


@contextmanager
def locked(folder: Path, *, alone: bool, wait_s: float, make: bool = False) -> Iterator[None]:
    """Hold `folder`, `alone` or beside others that do not want it alone. Raises InUse after `wait_s` seconds, also for
    a folder that is not there, unless told to `make` it: whoever replaces it has just removed it."""
    deadline = time.monotonic() + wait_s
    while (descriptor := _try(folder, alone, make)) is None:
        if time.monotonic() >= deadline:
            waited = f" and was not released within {wait_s:g} s" if wait_s else ""
            raise InUse(f"{folder} is in use by {holder(folder)}{waited}: let that finish, or end it, and try again")
        time.sleep(LOOK_S)
    try:
        yield
    finally:
        os.close(descriptor)


def _try(folder: Path, alone: bool, make: bool) -> int | None:
    """What holds the lock, for `os.close`; None when another process does, or has replaced the folder meanwhile."""
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    held = False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None


def holder(folder: Path) -> str:
    """The process that has locked `folder`, with the beginning of its command; one in another container is not seen."""
    try:
        found = folder.stat()
        inode = f":{found.st_ino}"
        exactly = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}{inode}"
        held = [words for line in LOCKS.read_text().splitlines() if (words := line.split())[1] == "FLOCK"]
        held.sort(key=lambda words: words[5] != exactly)  # some file systems show another device than to `stat`
        pid = next(words[4] for words in held if words[5].endswith(inode))
        command = " ".join(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").split())
    except (OSError, StopIteration, IndexError):
        return "another process"
    return f"process {pid} ({command[:120]})"
