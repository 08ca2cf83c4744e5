"""Which radiographs a prediction run is about, and reading one: everything that is wrong with an input is found here.

Folders are walked in sorted order; inside them only files that look like radiographs count (by suffix, or by the DICOM
magic: archives name files by their UID), while a file that is named on its own is always read and judged.
"""

import hashlib
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from scaphoid.trainer.data.dicom import is_dicom, read_dicom, to_pgm
from scaphoid.trainer.data.guard import MAX_BYTES, RejectedImage, check_encoded

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".pgm"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
_STUDY_FOLDER = re.compile(r"study\d+(_\w+)?", re.IGNORECASE)
_PATIENT_FOLDER = re.compile(r"patient\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One radiograph to predict. `study_in_header`: a DICOM header, where there is one, names the study instead."""

    path: Path
    study: str
    study_in_header: bool = False


@dataclass(frozen=True)
class Rejection:
    """An input that cannot be predicted, and why. `duplicate_of` names the input that it repeats."""

    path: Path
    reason: str
    study: str
    duplicate_of: Path | None = None


@dataclass
class Collection:
    """What the given paths hold: radiographs in order, inputs that were rejected, how many files are no images."""

    sources: list[Source] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # by suffix


@dataclass(frozen=True)
class Loaded:
    """A radiograph that passed the guard: the bytes to send, the file's content hash, its size in pixels, its study."""

    encoded: bytes
    sha256: str
    width: int
    height: int
    study: str


def collect(
    paths: Iterable[Path],
    study_of: Mapping[Path, str] | None = None,
    one_image_studies: bool = False,
    skip: Path | None = None,
) -> Collection:
    """Every radiograph under `paths` (files or folders, but nothing under the folder `skip`), each once.

    `study_of` gives studies by resolved path (from an index) and wins; otherwise a study is the MURA `studyN_*` folder
    of a patient, a DICOM file's own study, or the parent folder; with `one_image_studies` every image is its own.
    """
    collection, seen, known = Collection(), dict[Path, Path](), study_of or {}
    for given in paths:
        for path in _files(given, collection, skip and skip.resolve()):
            real = path.resolve()
            if real in known:
                source = Source(path, known[real])
            elif one_image_studies:
                source = Source(path, str(path))
            else:
                source = _in_folder_study(path)
            if real in seen:
                reason = f"the same file as {seen[real]}, given twice, predicted once"
                collection.rejections.append(Rejection(path, reason, source.study, seen[real]))
            else:
                seen[real] = path
                collection.sources.append(source)
    return collection


def load(source: Source, salt: bytes) -> Loaded:
    """Read one radiograph and check it before anything is sent; DICOM becomes 8-bit pixels here, so no tag leaves.

    `salt` keeps the study's pseudonym from being looked up. Raises RejectedImage with the reason.
    """
    return _guarded(_read(source.path), source, salt)


def load_image(image: str | Path | bytes | np.ndarray) -> Loaded:
    """What `load` gives, for a path, a file's bytes, or grey pixels uint8 [H, W]; of no study. Raises RejectedImage."""
    if isinstance(image, str | Path):
        return load(Source(Path(image), ""), b"")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 2:
            raise RejectedImage(f"pixels of {image.dtype} {list(image.shape)}: expected uint8 [H, W]")
        image = to_pgm(image)
    if not isinstance(image, bytes):
        raise RejectedImage(f"an image is a path, bytes or uint8 pixels [H, W], got {type(image).__name__}")
    return _guarded(image, Source(Path(), ""), b"")


def _guarded(data: bytes, source: Source, salt: bytes) -> Loaded:
    try:
        return _checked(data, source, salt)
    except RejectedImage:
        raise
    except (
        Exception
    ) as error:  # a hostile file may trip any decoder; its message may quote a tag, so only its kind is told
        raise RejectedImage(f"cannot be read ({type(error).__name__})") from error


def _checked(data: bytes, source: Source, salt: bytes) -> Loaded:
    digest = hashlib.sha256(data).hexdigest()
    if not is_dicom(data) and source.path.suffix.lower() not in DICOM_SUFFIXES:
        header = check_encoded(data)
        width, height = (header.height, header.width) if _is_turned(data) else (header.width, header.height)
        return Loaded(data, digest, width, height, source.study)
    radiograph = read_dicom(data, salt)
    height, width = radiograph.pixels.shape
    study = f"dicom-{radiograph.study}" if source.study_in_header and radiograph.study else source.study
    return Loaded(to_pgm(radiograph.pixels), digest, width, height, study)


def _files(given: Path, collection: Collection, skip: Path | None) -> Iterable[Path]:
    """The files to consider under one given path; what cannot be read goes to the collection's rejections."""
    try:
        mode = given.stat().st_mode
    except OSError as error:
        collection.rejections.append(Rejection(given, _os_reason(error), _parent(given)))
        return
    if stat.S_ISDIR(mode):
        before = len(collection.rejections)
        found = list(_walk(given, collection, skip))
        if not found and len(collection.rejections) == before:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES | DICOM_SUFFIXES))
            reason = f"a folder without radiographs (looked for {suffixes}, and DICOM files of any name)"
            collection.rejections.append(Rejection(given, reason, str(given)))
        yield from found
    elif stat.S_ISREG(mode):
        yield given
    else:
        collection.rejections.append(Rejection(given, "neither a file nor a folder", _parent(given)))


def _walk(folder: Path, collection: Collection, skip: Path | None) -> Iterable[Path]:
    def refused(error: OSError) -> None:
        refused_folder = Path(error.filename or folder)
        collection.rejections.append(Rejection(refused_folder, f"folder: {_os_reason(error)}", str(refused_folder)))

    for parent, folders, names in os.walk(folder, onerror=refused):
        if skip is not None and Path(parent).resolve() == skip:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or name == "DICOMDIR":
                continue
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES | DICOM_SUFFIXES or _has_dicom_magic(path):
                yield path
            else:
                kind = "without a suffix" if not suffix or suffix[1:].isdigit() else suffix  # a UID ends in a number
                collection.skipped[kind] += 1


def _has_dicom_magic(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return True  # let it be read, and rejected with the system's reason


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RejectedImage("not a file")
        if status.st_size > MAX_BYTES:
            raise RejectedImage(f"{status.st_size / 2**20:.0f} MB, more than the limit of {MAX_BYTES / 2**20:.0f} MB")
        return path.read_bytes()
    except OSError as error:
        raise RejectedImage(_os_reason(error)) from error


def _os_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "permission denied"
    return f"cannot be read ({error.strerror or error})"


def _in_folder_study(path: Path) -> Source:
    """A source whose study is the MURA study folder, or the parent folder unless a DICOM header knows better."""
    folders = path.absolute().parent.parts
    if _STUDY_FOLDER.fullmatch(folders[-1]):
        depth = 3 if len(folders) > 3 and _PATIENT_FOLDER.fullmatch(folders[-2]) else 2  # part / patient / study
        return Source(path, "/".join(folders[-depth:]))
    return Source(path, _parent(path), study_in_header=True)


def _parent(path: Path) -> str:
    return str(path.parent if path.parent.name else path.absolute().parent)


def _is_turned(data: bytes) -> bool:
    """Whether EXIF swaps width and height: sizes and boxes are those of the radiograph as it is shown."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF: Pillow raises whatever that leads to, and the orientation is unknown
        return False
