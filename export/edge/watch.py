"""Watches a folder: every radiograph that arrives is predicted once.

Results go to OUT as they come: a line for each image in `predictions.jsonl` (the lines that scaphoid-predict writes and
scaphoid-evaluate reads), the image to `done/`, or to `rejected/` beside a `.reason.txt`. A file counts as complete when
its size and time have stayed the same from one look to the next; names that begin with a dot or end in .part or .tmp
are left alone, so that a writer may rename when it is done. After a restart what the journal already holds is moved and
not predicted again. Neither names nor pixels are logged.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

from scaphoid.export.artefacts import sha256
from scaphoid.export.disk import room_in
from scaphoid.export.edge.flow import BATCH, Flow, Result
from scaphoid.trainer.journal import JOURNAL, Journal, Prediction

UNFINISHED = (".part", ".tmp")
State = tuple[int, int]  # of a file: its size and time of change


class Arrivals:
    """The complete files of a folder, in order of arrival."""

    def __init__(self, inbox: Path) -> None:
        self._inbox = inbox
        self._seen: dict[str, State] = {}

    def look(self) -> list[Path]:
        """Those that are as they were at the last look. Raises OSError when the folder cannot be read."""
        now: dict[str, State] = {}
        with os.scandir(self._inbox) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.endswith(UNFINISHED):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # gone since
                    continue
                if stat.S_ISREG(status.st_mode):
                    now[entry.name] = (status.st_size, status.st_mtime_ns)
        complete = sorted((now[name][1], name) for name in now if self._seen.get(name) == now[name])
        self._seen = now
        return [self._inbox / name for _, name in complete]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError when another process watches into `folder`, with its number: it is in the lock's file."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as lock:  # not "w", which would empty the file of whoever holds it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(20).strip()
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise BlockingIOError(
                f"{who} already watches into {folder} and holds {folder / '.lock'}: stop it, or name another folder"
            ) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield


@dataclass
class Watch:
    """Predicts into `out` what arrives in `inbox`. `parts`: whether MSFM's windows are classified; `threshold`: None
    for the artefacts' own; `finished` is told each file's status."""

    flow: Flow
    inbox: Path
    out: Path
    parts: bool = True
    threshold: float | None = None
    finished: Callable[[str], None] = lambda status: None

    def run(self, stop: Event, seconds: float = 1.0) -> None:
        """Looks every so many `seconds` until `stop` is set; what is being predicted then is finished first. Raises
        BlockingIOError when `out` is taken by another process, OSError when it cannot be written, ValueError when
        `inbox` is a folder that results go to."""
        if not self.inbox.is_dir():
            raise NotADirectoryError(f"{self.inbox} is no folder: name the one that radiographs arrive in")
        places = [self.out, self.out / "done", self.out / "rejected"]
        if self.inbox.resolve() in [place.resolve() for place in places]:
            raise ValueError(f"results would go into {self.inbox}, which is watched: name another folder for them")
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        with room_in(self.out), alone_in(self.out), Journal(self.out / JOURNAL) as journal:
            arrivals = Arrivals(self.inbox)
            while not stop.is_set():
                complete = arrivals.look()
                for start in range(0, len(complete), BATCH):
                    if not stop.is_set():
                        self._predict(complete[start : start + BATCH], journal)
                stop.wait(seconds)

    def _predict(self, paths: Sequence[Path], journal: Journal) -> None:
        wanted = [name for name in self.flow.outputs if self.parts or "parts" not in name]
        digests = {path: _digest(path) for path in paths if path.exists()}  # some may be gone since
        asked = (self.flow.name, self.flow.version, self.parts)
        known = [path for path in digests if journal.find(path.name, digests[path], *asked)]
        new = [path for path in digests if path not in known]
        for path in known:
            _move(path, self.out / "done", digests[path])
            self.finished("known")
        for path, result in zip(new, self.flow.predict(new, wanted), strict=True):
            prediction = self._prediction(path, result, digests[path])
            journal.append(prediction)
            journal.sync()  # before the image is moved: what is in done/ has its line, whatever happens
            moved = _move(path, self.out / ("rejected" if result.reason else "done"), digests[path])
            if result.reason:
                moved.with_name(moved.name + ".reason.txt").write_text(result.reason + "\n")
            self.finished(prediction.status)

    def _prediction(self, path: Path, result: Result, digest: str) -> Prediction:
        """The line about the file at `path`, whose content has the sha256 `digest`; it is a study of its own."""
        threshold = self.flow.threshold if self.threshold is None else self.threshold
        return Prediction(
            **asdict(replace(result, image=path.name)),
            study=path.name,
            flow=self.flow.name,
            model_version=self.flow.version,
            parts=self.parts,
            status="rejected" if result.reason else "ok",
            threshold=threshold,
            sha256=digest,
        ).judged(threshold)


def _digest(path: Path) -> str:
    """Of the file's content; of nothing where it cannot be read, which predicting it will say too."""
    try:
        return sha256(path)
    except OSError:
        return ""


def _move(path: Path, folder: Path, digest: str) -> Path:
    """Moves a file, which keeps its name unless another one of that name is there."""
    place = folder / path.name
    if place.exists():
        place = folder / f"{digest[:12]}-{path.name}"
    shutil.move(path, place)
    return place
