"""A folder beside another one, in which its next content is written, and the exchange of the two.

It carries a mark, and without that nothing of its name is deleted: it is somebody else's. What is there stays until the
new content is complete, and comes back when an interruption, or the next process after a kill, finds neither.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scaphoid.export.lock import locked

MARK = ".scaphoid"
SUFFIX = ".partial"


@dataclass(frozen=True)
class Workspace:
    """Of the folder `place`: what comes there is written to `new`, which is not there yet."""

    place: Path

    @property
    def folder(self) -> Path:
        return self.place.with_name(self.place.name + SUFFIX)

    @property
    def new(self) -> Path:
        return self.folder / "new"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    def exchange(self) -> None:
        """What is in `new` takes its place."""
        if self.place.exists():
            self.place.rename(self.old)
        self.new.rename(self.place)
        if self.old.exists():
            self.old.rename(self.folder / "gone")  # half deleted it must not come back

    def put_back(self) -> None:
        """What was moved away, when nothing came to its place."""
        if self.old.exists() and not self.place.exists():
            self.old.rename(self.place)


@contextmanager
def beside(place: Path, wait_s: float = 0) -> Iterator[Workspace]:
    """The workspace of `place`, this process's alone, empty and gone afterwards. Raises InUse when another process has
    it and does not end within `wait_s` seconds, FileExistsError for what is foreign and has its name, which stays."""
    work = Workspace(place)
    refuse_foreign(work.folder)
    with locked(work.folder, alone=True, wait_s=wait_s, make=True):
        refuse_foreign(work.folder)
        work.put_back()
        clear(work.folder)
        (work.folder / MARK).touch()
        try:
            yield work
        finally:
            work.put_back()
            remove(work.folder)


def is_ours(folder: Path) -> bool:
    """Whether `folder` was made here; an empty one may be, for a process can be killed before it leaves the mark."""
    return folder.is_dir() and not folder.is_symlink() and ((folder / MARK).is_file() or not any(folder.iterdir()))


def refuse_foreign(folder: Path) -> None:
    """Raises FileExistsError for what is there and not ours."""
    if (folder.exists() or folder.is_symlink()) and not is_ours(folder):
        raise FileExistsError(f"{folder} is in the way and is not deleted unasked: rename it, or remove it yourself")


def make(folder: Path) -> None:
    """A marked folder in place of what a killed process left. Raises FileExistsError for a foreign one, which stays."""
    refuse_foreign(folder)
    remove(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def clear(folder: Path) -> None:
    """Of what is in a folder of ours, the folders: no loose file is."""
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)


def remove(folder: Path) -> None:
    """A foreign one stays. The mark goes last, so that what cannot be deleted now can be later."""
    if is_ours(folder):
        clear(folder)
        if not any(each.name != MARK for each in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
