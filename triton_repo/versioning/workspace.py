"""Folders beside a repository in which its next content is written. They carry a mark, and without it nothing of that
name is deleted: it is somebody else's."""

import shutil
from pathlib import Path

MARK = ".scaphoid"


def is_ours(folder: Path) -> bool:
    """Whether `make` made `folder`; an empty one may be, for a process can be killed before it leaves the mark."""
    return folder.is_dir() and not folder.is_symlink() and ((folder / MARK).is_file() or not any(folder.iterdir()))


def make(folder: Path) -> None:
    """A new one, in place of what a killed process left. Raises FileExistsError for a foreign one, which stays."""
    remove(folder)
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} is in the way and is not deleted unasked: rename it, or remove it yourself")
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def remove(folder: Path) -> None:
    """A foreign one stays. The mark goes last, so that what cannot be deleted now can be later."""
    if not is_ours(folder):
        return
    for each in folder.iterdir():
        if each.name != MARK:
            shutil.rmtree(each, ignore_errors=True)
    if not any(each.name != MARK for each in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
