"""The supervisor's folder, and what supervisors that were killed left behind: folders and shared memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY, SHARED_MEMORY_PREFIX

FOLDER_PREFIX = ".scaphoid-server-"  # then the supervisor's PID
MARKER = "made-by-scaphoid-server"


def make_folder() -> Path:
    """A folder of this process, for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
    (folder / MARKER).touch()
    return folder


def folders(parent: Path) -> Iterator[tuple[Path, bool]]:
    """Every supervisor's folder of this user, and whether its supervisor lives."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # it is removed at this moment
            pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
            if folder.lstat().st_uid == os.getuid() and (folder / MARKER).is_file() and pid.isdigit():
                yield folder, _lives(pid)


def remove(parent: Path, shared_memory: Path = SHARED_MEMORY) -> None:
    """Remove what this user's supervisors whose PID is gone left in `parent`, and their servers' shared memory."""
    for folder, lives in folders(parent):
        if not lives:
            shutil.rmtree(folder, ignore_errors=True)
    for left in shared_memory.glob(f"{SHARED_MEMORY_PREFIX}*"):
        with suppress(OSError):
            pid = left.name.removeprefix(SHARED_MEMORY_PREFIX).partition("-")[0]
            if pid.isdigit() and not _lives(pid) and left.lstat().st_uid == os.getuid():
                left.unlink()


def _lives(pid: str) -> bool:
    return Path("/proc", pid).exists()
