"""Watches a folder: every radiograph that arrives is predicted once.

Results go to OUT as they come: a line for each image in `predictions.jsonl` (the lines that scaphoid-predict writes and
scaphoid-evaluate reads), the image to `done/`, or to `rejected/` beside a `.reason.txt`; a name that is taken there,
or too long, begins with the content's digest. A file that cannot be moved is left alone until it changes. A file counts
as complete when its size and time have stayed the same from one look to the next; names that begin with a dot or end in
.part or .tmp are left alone, so that a writer may rename when it is done. After a restart what the journal already
holds is moved and not predicted again. Neither names nor pixels are logged.
"""

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

from scaphoid.export.artefacts import sha256
from scaphoid.export.disk import FULL, room_in
from scaphoid.export.edge.flow import BATCH, Flow, Result
from scaphoid.export.lock import locked
from scaphoid.trainer.journal import JOURNAL, Journal, Prediction

UNFINISHED = (".part", ".tmp")
REASON = ".reason.txt"
LONGEST_SUFFIX = 16  # of a shortened name; what is longer is no suffix
State = tuple[int, int]  # of a file: its size and time of change


class Arrivals:
    """The complete files of a folder, in order of arrival."""

    def __init__(self, inbox: Path) -> None:
        self._inbox = inbox
        self._seen: dict[str, State] = {}
        self._left: dict[str, State] = {}

    def leave(self, path: Path) -> None:
        """Tells of the file at `path` no more until it changes."""
        if path.name in self._seen:
            self._left[path.name] = self._seen[path.name]

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
        self._left = {name: state for name, state in self._left.items() if now.get(name) == state}
        return [self._inbox / name for _, name in complete if name not in self._left]


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
        InUse when another process watches into `out`, OSError when it cannot be written, ValueError when
        `inbox` is a folder that results go to."""
        if not self.inbox.is_dir():
            raise NotADirectoryError(f"{self.inbox} is no folder: name the one that radiographs arrive in")
        places = [self.out, self.out / "done", self.out / "rejected"]
        if self.inbox.resolve() in [place.resolve() for place in places]:
            raise ValueError(f"results would go into {self.inbox}, which is watched: name another folder for them")
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        with (
            room_in(self.out),
            locked(self.out, alone=True, wait_s=0),
            Journal(self.out / JOURNAL) as journal,
        ):
            arrivals = Arrivals(self.inbox)
            while not stop.is_set():
                complete = arrivals.look()
                for start in range(0, len(complete), BATCH):
                    if not stop.is_set():
                        self._predict(complete[start : start + BATCH], journal, arrivals)
                stop.wait(seconds)

    def _predict(self, paths: Sequence[Path], journal: Journal, arrivals: Arrivals) -> None:
        wanted = [name for name in self.flow.outputs if self.parts or "parts" not in name]
        digests = {path: _digest(path) for path in paths if path.exists()}  # some may be gone since
        asked = (self.flow.name, self.flow.version, self.parts)
        known = [path for path in digests if journal.find(path.name, digests[path], *asked)]
        new = [path for path in digests if path not in known]
        for path in known:
            self._put(path, digests[path], "known", None, arrivals)
        for path, result in zip(new, self.flow.predict(new, wanted), strict=True):
            if result.reason and not path.exists():  # removed while it was read: nothing is known of it
                self.finished("gone")
                continue
            prediction = self._prediction(path, result, digests[path])
            journal.append(prediction)
            journal.sync()  # before the image is moved: what is in done/ has its line, whatever happens
            self._put(path, digests[path], prediction.status, result.reason, arrivals)

    def _put(self, path: Path, digest: str, status: str, reason: str | None, arrivals: Arrivals) -> None:
        """Moves what has its line in the journal to where its `reason`, or none, belongs. One that cannot be moved
        leaves the others alone; a full disk ends it all."""
        folder = self.out / ("rejected" if reason else "done")
        try:
            place = _free_place(folder, path.name, digest, REASON if reason else "")
            shutil.move(path, place)
            if reason:
                place.with_name(place.name + REASON).write_text(reason + "\n")
        except OSError as error:
            if error.errno in FULL:
                raise
            arrivals.leave(path)
            status += f", not moved: {error.strerror or type(error).__name__}"
        self.finished(status)

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


def _free_place(folder: Path, name: str, digest: str, beside: str) -> Path:
    """Where a file of that `name` may go in `folder` and write over nothing, nor what is named as it with `beside`
    after it: its own name, or a shortened one behind the `digest`."""
    folder.mkdir(parents=True, exist_ok=True)
    longest = os.pathconf(folder, "PC_NAME_MAX") - len(beside)  # in bytes
    numbers = ("", *(f"{number}-" for number in range(2, 10_000)))
    shortened = (_shortened(f"{digest[:12]}-{number}", name, longest) for number in numbers)
    for place in itertools.chain([name], shortened):
        taken = any(os.path.lexists(folder / each) for each in {place, place + beside})
        if not taken and len(os.fsencode(place)) <= longest:
            return folder / place
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def _shortened(prefix: str, name: str, longest: int) -> str:
    """`name` behind `prefix`, without as much of its end before the suffix as makes it `longest` bytes."""
    suffix = Path(name).suffix if len(Path(name).suffix) <= LONGEST_SUFFIX else ""
    stem = name.removesuffix(suffix)
    while len(os.fsencode(prefix + stem + suffix)) > longest:
        stem = stem[:-1]
    return prefix + stem + suffix
