"""FracAtlas (Abedeen et al., Scientific Data 2023, doi 10.1038/s41597-023-02432-4): fractures of hand, leg, hip and
shoulder.

Two layouts are read: the published one (dataset.csv, images/Fractured, images/Non_fractured, Annotations/YOLO) and a
flat one (index.csv, images, labels). Boxes are YOLO lines, `class cx cy w h` relative to the image.

FracAtlas names no patients, but neighbouring ids share them: `patient` is a block of ids, and splits are made by
block.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from scaphoid.trainer.data.index import Box, Index, InvalidIndexError, Radiograph
from scaphoid.trainer.data.mura import oriented_size

BLOCK = 50  # ids to a block: runs of one patient's radiographs are shorter
_REGIONS = ("hand", "leg", "hip", "shoulder")
_VIEWS = ("frontal", "lateral", "oblique")
_NAME = re.compile(r"IMG(\d+)\.jpe?g", re.IGNORECASE)


def read_fracatlas(root: Path | str) -> Index:
    """Index of FracAtlas below `root`, label 1 = fractured, split "all": use `split_by_patient`, which keeps blocks
    together.

    A fractured radiograph without its annotation file has boxes None. A file that is missing or no image is left out
    with a warning.
    """
    root = Path(root)
    flat, published = root / "index.csv", root / "dataset.csv"
    table = flat if flat.is_file() else published
    if not table.is_file():
        raise FileNotFoundError(f"{root}: expected dataset.csv (FracAtlas as published) or index.csv in it")
    found = []
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        key = "image" if table == flat else "image_id"
        missing = {key, "fractured"} - set(reader.fieldnames or [])
        if missing:
            raise InvalidIndexError(
                f"{table}, line 1: expected columns {key} and fractured; missing: {', '.join(sorted(missing))}"
            )
        for row in reader:
            radiograph = _read_row(root, table, reader.line_num, row, flat=table == flat)
            if radiograph is not None:
                found.append(radiograph)
    if not found:
        raise InvalidIndexError(f"{table}: none of the radiographs it lists was found below {root / 'images'}")
    return Index(root, tuple(found))


def _read_row(root: Path, table: Path, line: int, row: dict[str, str], flat: bool) -> Radiograph | None:
    name, fractured = row["image" if flat else "image_id"], row["fractured"]
    number = _NAME.fullmatch(name or "")
    if number is None:
        raise InvalidIndexError(f"{table}, line {line}: expected a name such as IMG0000013.jpg, got {name!r}")
    if fractured not in ("0", "1"):
        raise InvalidIndexError(f"{table}, line {line}, column fractured: expected 0 or 1, got {fractured!r}")
    label = int(fractured)
    image = f"images/{name}" if flat else f"images/{'Fractured' if label else 'Non_fractured'}/{name}"
    annotation = root / ("labels" if flat else "Annotations/YOLO") / (Path(name).stem + ".txt")
    sides = oriented_size(root / image)
    if sides is None:
        return None
    named = lambda names: "+".join(n for n in names if row.get(n) == "1")  # noqa: E731  published: a column of 0 and 1 each
    return Radiograph(
        image=image,
        patient=f"block{int(number[1]) // BLOCK:04d}",
        study=Path(name).stem,
        view=row["view"] if flat else named(_VIEWS),
        body_part=(row["region"] if flat else named(_REGIONS)) or "unknown",
        label=label,
        boxes=_read_boxes(annotation, *sides) if label else (),
        width=sides[0],
        height=sides[1],
        split="all",
    )


def _read_boxes(path: Path, width: int, height: int) -> tuple[Box, ...] | None:
    """YOLO lines to pixels, cut at the image's border. None where there is no file or no line."""
    if not path.is_file():
        return None
    boxes = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            _, cx, cy, w, h = (float(v) for v in text.split())
        except ValueError:
            raise InvalidIndexError(f"{path}, line {line}: expected `class cx cy w h`, got {text!r}") from None
        x0, x1 = (min(max(c * width, 0.0), float(width)) for c in (cx - w / 2, cx + w / 2))
        y0, y1 = (min(max(c * height, 0.0), float(height)) for c in (cy - h / 2, cy + h / 2))
        if not (x0 < x1 and y0 < y1):
            raise InvalidIndexError(f"{path}, line {line}: expected a box inside the image (fractions), got {text!r}")
        boxes.append((x0, y0, x1, y1))
    return tuple(boxes) or None
