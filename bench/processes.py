"""What a server and its backends hold: resident memory, descriptors, shared memory. Linux; reads /proc alone."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Held:
    """At one moment, all processes of a session together. `rss_mib` counts a page once for each process that maps it;
    `shared_files` are the files of /dev/shm with the server's prefix."""

    at_s: float
    processes: int
    rss_mib: float
    descriptors: int
    shared_files: int
    shared_mib: float


def session(leader: int) -> list[int]:
    """The living processes of the session led by `leader`: a server with its backends."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()  # a name may hold spaces; what follows does not
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def held(leader: int, prefix: str, at_s: float) -> Held:
    """Of the session led by `leader`, whose shared memory's names begin with `prefix`."""
    processes, pages, descriptors = 0, 0, 0
    for pid in session(leader):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            processes += 1
        except OSError:
            continue
    files = shared_files(prefix)
    return Held(at_s, processes, pages * PAGE / MIB, descriptors, len(files), 512 * sum(map(_blocks, files)) / MIB)


def rss_by_name(leader: int) -> dict[str, float]:
    """MiB of resident memory by the name of the process; Triton's backend processes share one."""
    found: Counter[str] = Counter()
    for pid in session(leader):
        try:
            found[Path(f"/proc/{pid}/comm").read_text().strip()] += (
                int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB
            )
        except OSError:
            continue
    return dict(found)


def shared_files(prefix: str) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{prefix}*"))


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks
    except OSError:
        return 0
