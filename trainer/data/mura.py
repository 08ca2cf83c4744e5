"""MURA v1.1 as published (Rajpurkar et al., 2018): MURA-v1.1/train/XR_WRIST/patient00001/study1_positive/image1.png.

The label is the study's and stands in its folder's name; `{split}_labeled_studies.csv` and
`{split}_image_paths.csv`, where present, must agree with the folders. MURA tells neither view nor boxes.
"""

from __future__ import annotations

import csv
import re
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from scaphoid.trainer.data.index import Index, InvalidIndexError, Radiograph

BODY_PARTS = ("elbow", "finger", "forearm", "hand", "humerus", "shoulder", "wrist")
SPLITS = ("train", "valid")
FOLDER = "MURA-v1.1"
_STUDY = re.compile(r"study\d+_(positive|negative)")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def read_mura(root: Path | str, splits: tuple[str, ...] = SPLITS) -> Index:
    """Index of MURA v1.1; `root` is the folder MURA-v1.1 or the one that holds it. Paths start with MURA-v1.1/, as in
    MURA's CSVs.

    Normal radiographs have boxes (), abnormal ones None (unknown). A file that is no readable image is left out with
    a warning that names it. Raises InvalidIndexError where a CSV file contradicts the folders, FileNotFoundError
    where nothing is found.
    """
    root = Path(root)
    root = root.parent if root.name == FOLDER else root
    unknown = set(splits) - set(SPLITS)
    if unknown or not splits:
        raise ValueError(f"splits: expected some of {', '.join(SPLITS)}, got {', '.join(map(str, splits)) or 'none'}")
    present = [s for s in splits if (root / FOLDER / s).is_dir()]
    if not present:
        raise FileNotFoundError(f"{root}: expected {FOLDER}/{splits[0]} in it; name the folder that holds {FOLDER}")
    found = [r for split in present for r in _read_split(root, split)]
    if not found:
        raise FileNotFoundError(
            f"{root / FOLDER}: expected {present[0]}/XR_WRIST/patient00001/study1_positive/image1.png …"
        )
    return Index(root, tuple(found))


def _read_split(root: Path, split: str) -> list[Radiograph]:
    found = []
    for path in sorted((root / FOLDER / split).glob("XR_*/*/*/*.png")):
        if path.name.startswith("."):  # the archive holds macOS's ._image1.png
            continue
        part, patient, study = path.parts[-4:-1]
        body_part, verdict = part.removeprefix("XR_").lower(), _STUDY.fullmatch(study)
        if body_part not in BODY_PARTS:
            raise InvalidIndexError(f"{path}: expected XR_ and one of {', '.join(BODY_PARTS)}, got {part!r}")
        if verdict is None:
            raise InvalidIndexError(f"{path}: expected study1_positive, study1_negative …, got {study!r}")
        sides = oriented_size(path)
        if sides is None:
            continue
        label = int(verdict[1] == "positive")
        found.append(
            Radiograph(
                image=path.relative_to(root).as_posix(),
                patient=patient,
                study=study,
                view="",
                body_part=body_part,
                label=label,
                boxes=None if label else (),
                width=sides[0],
                height=sides[1],
                split=split,
            )
        )
    _check_studies(root, split, found)
    _check_images(root, split, found)
    return found


def _check_studies(root: Path, split: str, found: list[Radiograph]) -> None:
    table = root / FOLDER / f"{split}_labeled_studies.csv"
    labels = {r.image.rpartition("/")[0]: r.label for r in found}
    for line, row in _rows(table):
        if len(row) != 2 or row[1] not in ("0", "1"):
            raise InvalidIndexError(f"{table}, line {line}: expected a study folder and 0 or 1, got {row}")
        study = row[0].strip("/")
        if study in labels and labels[study] != int(row[1]):
            raise InvalidIndexError(
                f"{table}, line {line}, column 2: expected {labels[study]}, by the name of {study}, got {row[1]}"
            )


def _check_images(root: Path, split: str, found: list[Radiograph]) -> None:
    table, known = root / FOLDER / f"{split}_image_paths.csv", {r.image for r in found}
    listed = [(line, row[0]) for line, row in _rows(table) if row[0] not in known]
    missing = [(line, image) for line, image in listed if not (root / image).exists()]
    if missing:
        line, image = missing[0]
        warnings.warn(f"{table}, line {line}: {image} does not exist ({len(missing)} such lines)", stacklevel=4)


def _rows(table: Path) -> list[tuple[int, list[str]]]:
    if not table.is_file():
        return []
    with open(table, newline="", encoding="utf-8") as file:
        return [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]


def oriented_size(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels after EXIF orientation, from the file's header; None, with a warning, for what is no
    image."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(_ORIENTATION) in _TRANSPOSED else (width, height)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        warnings.warn(f"{path}: left out, not a readable image ({type(error).__name__})", stacklevel=3)
        return None
