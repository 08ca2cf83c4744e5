"""Data sets of phantoms in the MURA layout, with boxes for evaluation, and the two frozen ones that models are compared
on.

This module is the subpackage's door: what other code needs is imported from here.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2

from scaphoid.trainer.data.index import Index, Radiograph, write_index
from scaphoid.trainer.data.phantom.anatomy import BODY_PARTS
from scaphoid.trainer.data.phantom.render import TWIN_MARGIN, Phantom, render, twin
from scaphoid.trainer.data.phantom.sheet import contact_sheet
from scaphoid.trainer.data.phantom.study import DEFAULTS, Options, Study, plan_study, planned_views

__all__ = [
    "BODY_PARTS",
    "GENERATOR_VERSION",
    "TEST",
    "TRAINING",
    "TWIN_MARGIN",
    "Frozen",
    "Options",
    "Phantom",
    "Study",
    "contact_sheet",
    "generate",
    "generate_frozen",
    "generator_of",
    "image_path",
    "plan_study",
    "planned_views",
    "render",
    "twin",
]

MARK = "phantoms.json"  # beside index.csv: what drew the radiographs, so that no model of them passes for a patient's
GENERATOR_VERSION = "1.0.0"
"""Goes up with every change of any pixel or box; models state the version they were trained on."""


@dataclass(frozen=True)
class Frozen:
    """A set whose seed is fixed: models are compared on it."""

    seed: int
    images: int
    split: str


TRAINING = Frozen(seed=20171, images=4400, split="train")
TEST = Frozen(seed=77008, images=500, split="valid")


def image_path(study: Study, view: int, split: str) -> str:
    """Where MURA would keep it, relative to the data set's root."""
    verdict = "positive" if study.abnormal else "negative"
    patient = f"MURA-v1.1/{split}/XR_{study.body_part.upper()}/patient{study.patient_number + 1:05d}"
    return f"{patient}/study{study.order}_{verdict}/image{view + 1}.png"


def generate(
    root: Path,
    images: int,
    seed: int,
    split: str = "train",
    options: Options = DEFAULTS,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Writes `images` phantoms below `root` in the MURA layout, MURA's two CSV files of the split, and index.csv with
    the boxes.

    `progress` is called with the number of images each time some are finished. The index is written last: a folder
    with an index.csv is complete.
    """
    if images < 1 or workers < 1:
        raise ValueError(f"images and workers: expected at least 1, got {images} and {workers}")
    views = list(planned_views(seed, images, options))
    work = partial(_write, Path(root), split, options)
    chunks = [views[i : i + 16] for i in range(0, len(views), 16)]
    if workers == 1:
        radiographs = [r for part in map(work, chunks) for r in _noted(part, progress)]
    else:  # spawned: forking a process that runs threads (torch, OpenCV) can hang
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            radiographs = [r for part in pool.map(work, chunks) for r in _noted(part, progress)]
    _write_mura_tables(Path(root), split, radiographs)
    index = Index(Path(root), tuple(radiographs))
    drawn = {"generator": GENERATOR_VERSION, "seed": seed, "images": images, "options": dataclasses.asdict(options)}
    (Path(root) / MARK).write_text(json.dumps(drawn, indent=1) + "\n")
    write_index(index)
    return index


def generator_of(root: Path) -> str | None:
    """The generator's version when the radiographs below `root` are phantoms; None for any other data set."""
    mark = Path(root) / MARK
    return json.loads(mark.read_text())["generator"] if mark.is_file() else None


def generate_frozen(
    root: Path, frozen: Frozen, size: int = 512, workers: int = 1, progress: Callable[[int], None] | None = None
) -> Index:
    """One of the frozen sets, TRAINING or TEST."""
    return generate(root, frozen.images, frozen.seed, frozen.split, Options(size=size), workers, progress)


def _noted(part: list[Radiograph], progress: Callable[[int], None] | None) -> list[Radiograph]:
    if progress is not None:
        progress(len(part))
    return part


def _write(root: Path, split: str, options: Options, views: list[tuple[Study, int]]) -> list[Radiograph]:
    cv2.setNumThreads(1)
    done = []
    for study, view in views:
        phantom = render(study, view, options)
        path = image_path(study, view, split)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        _, encoded = cv2.imencode(".png", phantom.image, [cv2.IMWRITE_PNG_COMPRESSION, 2])
        try:
            (root / path).write_bytes(encoded)  # cv2.imwrite tells no reason
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(root / path)) from None  # a full disk names no file
        done.append(
            Radiograph(
                image=path,
                patient=f"patient{study.patient_number + 1:05d}",
                study=path.split("/")[-2],
                view=study.views[view].name,
                body_part=study.body_part,
                label=int(study.abnormal),
                boxes=() if phantom.box is None else (phantom.box,),
                width=options.size,
                height=options.size,
                split=split,
            )
        )
    return done


def _write_mura_tables(root: Path, split: str, radiographs: list[Radiograph]) -> None:
    folder = root / "MURA-v1.1"
    studies = {os.path.dirname(r.image) + "/": r.label for r in radiographs}
    with open(folder / f"{split}_image_paths.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([r.image] for r in radiographs)
    with open(folder / f"{split}_labeled_studies.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(studies.items())
