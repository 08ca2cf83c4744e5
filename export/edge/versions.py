"""Versions of what an edge device runs, each in a folder of its own, and the link `current` to the one in use:

    ROOT/versions/0001-3f2a9c1b/{artefacts,engines}/
    ROOT/current -> versions/0001-3f2a9c1b

The link is replaced in one step, so a power cut leaves the old version or the new one. Going back renames the version
that is left behind, so that going back twice does not return to it.
"""

import os
import shutil
from pathlib import Path

from scaphoid.export.artefacts import MANIFEST, sha256, verify

CURRENT, VERSIONS, GIVEN_UP = "current", "versions", ".rolled-back"


class VersionError(Exception):
    """A version that is not there or not whole. One line that says which, and what to do."""


def add(root: Path, artefacts: Path) -> Path:
    """Copies verified `artefacts` into a version of their own, not yet in use; gives its folder, the one that is there
    when the same artefacts were added before. Raises ManifestError, OSError."""
    verify(artefacts)
    digest = sha256(artefacts / MANIFEST)[:8]
    existing = _versions(root)
    for folder in existing:
        if folder.name.endswith(f"-{digest}"):
            return folder
    taken = [int(path.name.partition("-")[0]) for path in (root / VERSIONS).glob("[0-9]*")]
    folder = root / VERSIONS / f"{max(taken, default=0) + 1:04}-{digest}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(artefacts, partial / "artefacts")
        verify(partial / "artefacts")
        partial.rename(folder)
    except shutil.Error as error:  # of every file that was not copied
        _, _, why = error.args[0][0]
        raise OSError(f"{artefacts} was not copied into {root}: {why}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def use(root: Path, version: str) -> Path:
    """Makes `version`, a folder's name, the current one. Raises VersionError, ManifestError."""
    folder = root / VERSIONS / version
    if folder not in _versions(root):
        there = ", ".join(path.name for path in _versions(root)) or "none"
        raise VersionError(f"{root} has no version {version!r}; it has {there}")
    verify(folder / "artefacts")
    if (root / CURRENT).exists() and not (root / CURRENT).is_symlink():
        raise VersionError(f"{root / CURRENT} is no link that was made here: move it away first")
    link = root / f".{CURRENT}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(VERSIONS, version))
    os.replace(link, root / CURRENT)
    return folder


def current(root: Path) -> Path:
    """The folder in use. Raises VersionError when there is none."""
    if not (root / CURRENT).is_dir():
        raise VersionError(f"{root} has no current version: install one")
    return (root / CURRENT).resolve()


def rollback(root: Path) -> Path:
    """Makes the version before the current one current, and gives its folder. Raises VersionError when there is none
    that is whole."""
    left = current(root)
    earlier = [folder for folder in _versions(root) if folder.name < left.name]
    if not earlier:
        raise VersionError(f"{root} has no version before {left.name}: it stays in use")
    folder = use(root, earlier[-1].name)
    left.rename(left.with_name(left.name + GIVEN_UP))
    return folder


def _versions(root: Path) -> list[Path]:
    """Every version that may be used, in order of age."""
    return sorted(path for path in (root / VERSIONS).glob("[0-9]*") if not path.name.endswith(GIVEN_UP))
