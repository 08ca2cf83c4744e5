"""The canonical index: one row per radiograph, whatever data set it comes from."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1), half-open, in pixels of the EXIF-oriented original image."""

FILE_NAME = "index.csv"
LONGEST = 200  # characters of a cell that an error quotes


class InvalidIndexError(ValueError):
    """An index, or a data set that is read into one, is not as expected. The message names file, line and column."""


@dataclass(frozen=True)
class Radiograph:
    image: str
    """Path relative to the index's root, with forward slashes."""
    patient: str
    study: str
    """Unique within its patient."""
    view: str
    body_part: str
    label: int
    """1 abnormal, 0 normal: the study's, as in MURA."""
    boxes: tuple[Box, ...] | None
    """None: unknown. (): known to show no lesion, as in a view of an abnormal study in which it is not visible."""
    width: int
    height: int
    split: str


COLUMNS = tuple(f.name for f in fields(Radiograph))


@dataclass(frozen=True)
class Index:
    root: Path
    radiographs: tuple[Radiograph, ...]

    def __len__(self) -> int:
        return len(self.radiographs)

    def path(self, radiograph: Radiograph) -> Path:
        return self.root / radiograph.image

    def where(self, **wanted: object) -> Index:
        """The radiographs whose fields equal the given values, e.g. `index.where(split="train", body_part="wrist")`."""
        unknown = set(wanted) - set(COLUMNS)
        if unknown:
            raise ValueError(f"where: expected fields among {', '.join(COLUMNS)}, got {', '.join(sorted(unknown))}")
        keep = tuple(r for r in self.radiographs if all(getattr(r, k) == v for k, v in wanted.items()))
        return replace(self, radiographs=keep)


def write_index(index: Index, path: Path | None = None) -> Path:
    """Writes `index.csv` below the index's root (or at `path`). Unknown boxes are an empty cell, no lesion is `[]`."""
    path = Path(path) if path is not None else index.root / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for r in index.radiographs:
            row = [getattr(r, name) for name in COLUMNS]
            row[COLUMNS.index("boxes")] = "" if r.boxes is None else json.dumps([list(box) for box in r.boxes])
            writer.writerow(row)
    unfinished.replace(path)
    return path


def read_index(path: Path | str) -> Index:
    """Reads an index file, or `index.csv` in a folder; image paths are relative to the file's folder. Raises
    InvalidIndexError or FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        return _read(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidIndexError(f"{path}: expected a CSV file in UTF-8 as write_index writes it: {error}") from error


def _read(path: Path) -> Index:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such index; expected a CSV file with columns {', '.join(COLUMNS)}")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
        if missing:
            raise InvalidIndexError(
                f"{path}, line 1: expected columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}"
            )
        radiographs, seen = [], {}
        for row in reader:
            radiograph = _parse(row, path, reader.line_num)
            if radiograph.image in seen:
                first = seen[radiograph.image]
                raise InvalidIndexError(
                    f"{path}, line {reader.line_num}, column image: expected each image once, "
                    f"got {radiograph.image!r} again (first in line {first})"
                )
            seen[radiograph.image] = reader.line_num
            radiographs.append(radiograph)
    if not radiographs:
        raise InvalidIndexError(f"{path}: expected at least one radiograph below the header, got none")
    return Index(path.parent, tuple(radiographs))


def _parse(row: dict[str, str | None], path: Path, line: int) -> Radiograph:
    def wrong(column: str, expected: str) -> InvalidIndexError:
        return InvalidIndexError(
            f"{path}, line {line}, column {column}: expected {expected}, got {_short(row[column])}"
        )

    for column in COLUMNS:
        if row[column] is None:
            raise wrong(column, f"{len(COLUMNS)} cells in the line")
        if not row[column] and column not in ("boxes", "view"):
            raise wrong(column, "a value")
    image = str(row["image"])
    if Path(image).is_absolute() or ".." in Path(image).parts or "\\" in image:
        raise wrong("image", "a path below the index's folder, with forward slashes")
    if row["label"] not in ("0", "1"):
        raise wrong("label", "0 (normal) or 1 (abnormal)")
    sides = {}
    for column in ("width", "height"):
        if not str(row[column]).isdecimal() or int(str(row[column])) < 1:
            raise wrong(column, "a number of pixels, 1 or more")
        sides[column] = int(str(row[column]))
    try:
        boxes = _parse_boxes(str(row["boxes"]), sides["width"], sides["height"])
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise wrong(
            "boxes",
            f"nothing, or a JSON list of [x0, y0, x1, y1] with 0 <= x0 < x1 <= {sides['width']}, "
            f"0 <= y0 < y1 <= {sides['height']}",
        ) from None
    if row["label"] == "0" and boxes:
        raise wrong("boxes", "no boxes, since label is 0 (normal)")
    text = {name: str(row[name]) for name in ("patient", "study", "view", "body_part", "split")}
    return Radiograph(image=image, label=int(row["label"]), boxes=boxes, **sides, **text)


def _short(cell: str | None) -> str:
    shown = repr(cell)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}... ({len(shown)} characters)"


def _parse_boxes(cell: str, width: int, height: int) -> tuple[Box, ...] | None:
    if not cell:
        return None
    boxes = []
    for x0, y0, x1, y1 in json.loads(cell):
        box = tuple(float(c) for c in (x0, y0, x1, y1))
        if not all(math.isfinite(c) for c in box) or not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(cell)
        boxes.append(box)
    return tuple(boxes)


def split_by_patient(index: Index, fraction: float, seed: int) -> tuple[Index, Index]:
    """Two patient-disjoint indexes; the second holds close to `fraction` of the radiographs. Order is kept within each.

    Patients are taken in a seeded order, positives and negatives apart (a patient with an abnormal study counts as
    positive), so that both parts have about the same share of abnormal patients.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1 (exclusive), got {fraction}")
    sizes: dict[str, int] = {}
    positive: set[str] = set()
    for r in index.radiographs:
        sizes[r.patient] = sizes.get(r.patient, 0) + 1
        if r.label:
            positive.add(r.patient)
    if len(sizes) < 2:
        raise ValueError(f"index: expected at least two patients to split, got {len(sizes)} below {index.root}")
    held: set[str] = set()
    for group in (sorted(positive), sorted(set(sizes) - positive)):
        random.Random(seed).shuffle(group)
        wanted, taken = fraction * sum(sizes[p] for p in group), 0
        for patient in group:
            if abs(taken + sizes[patient] - wanted) >= abs(taken - wanted):
                break
            held.add(patient)
            taken += sizes[patient]
    smallest = min(sizes, key=lambda p: (sizes[p], p))
    if not held:
        held.add(smallest)
    elif len(held) == len(sizes):
        held.remove(smallest)
    first = tuple(r for r in index.radiographs if r.patient not in held)
    second = tuple(r for r in index.radiographs if r.patient in held)
    return replace(index, radiographs=first), replace(index, radiographs=second)
