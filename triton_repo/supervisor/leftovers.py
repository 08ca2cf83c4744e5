"""The supervisor's folder, and what supervisors that were killed left behind: folders and shared memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY, SHARED_MEMORY_PREFIX, started_at

FOLDER_PREFIX = ".scaphoid-server-"  # then the supervisor's PID
MARKER = "made-by-scaphoid-server"  # holds when the supervisor began


def make_folder() -> Path:
    """A folder of this process, for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
    (folder / MARKER).write_text(started_at(os.getpid()))
    return folder


def folders(parent: Path) -> Iterator[tuple[Path, bool]]:
    """Every supervisor's folder of this user, and whether its supervisor lives."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # it is removed at this moment
            pid = _pid(folder, FOLDER_PREFIX)
            if folder.lstat().st_uid == os.getuid() and (folder / MARKER).is_file() and pid.isdigit():
                yield folder, _lives(pid, (folder / MARKER).read_text(errors="replace"))


def remove(parent: Path, shared_memory: Path = SHARED_MEMORY) -> None:
    """Remove what this user's supervisors that are gone left in `parent`, and their servers' shared memory."""
    pids: dict[bool, set[str]] = {True: set(), False: set()}  # of those that live, and that are gone
    for folder, lives in folders(parent):
        pids[lives].add(_pid(folder, FOLDER_PREFIX))
        if not lives:
            shutil.rmtree(folder, ignore_errors=True)
    gone = pids[False] - pids[True]
    for left in shared_memory.glob(f"{SHARED_MEMORY_PREFIX}*"):
        with suppress(OSError):
            pid = _pid(left, SHARED_MEMORY_PREFIX)
            if pid.isdigit() and (pid in gone or not _lives(pid)) and left.lstat().st_uid == os.getuid():
                left.unlink()


def _pid(path: Path, prefix: str) -> str:
    return path.name.removeprefix(prefix).partition("-")[0]


def _lives(pid: str, began: str = "") -> bool:
    """Whether the process `pid` that began then lives; any process `pid` where an earlier release did not say when."""
    now = started_at(pid)
    return bool(now) and began in ("", now)
