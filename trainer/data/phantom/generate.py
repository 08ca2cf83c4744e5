"""Radiograph-like phantoms in the MURA layout, with boxes for evaluation.

Every image is a function of (seed, study, view, options) alone: how many are generated, in what order and by how many processes
changes nothing. Patient, view, lesion, label and artefacts come from separate random streams, so a study with and without its
lesion is the same radiograph elsewhere.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from scaphoid.trainer.data.index import Box, Index, Radiograph, write_index
from scaphoid.trainer.data.phantom.anatomy import (
    BODY_PARTS,
    Camera,
    Patient,
    Projected,
    View,
    build_skeleton,
    sample_patient,
    sample_view,
    shown,
)
from scaphoid.trainer.data.phantom.artefacts import draw_artefacts, sample_artefacts
from scaphoid.trainer.data.phantom.lesions import Axis, Lesion, choose, lesion_change, sample_lesion
from scaphoid.trainer.data.phantom.texture import (
    Exposure,
    bone_attenuation,
    clouds,
    draw_torso,
    frame_of,
    reach_of,
    sample_exposure,
    soft_attenuation,
)

GENERATOR_VERSION = "1.0.0"
TWIN_MARGIN = 0.025  # a lesion changes no pixel farther than this fraction of the side outside its box
_VISIBLE = 0.1  # a lesion counts as visible where it changes the brightness (0-1) by this much …
_PLAIN = 0.32  # … and is strengthened towards this
_BOX = 0.16  # … and its box spans what changes by this fraction of its strongest change, at least 0.025
_SPREAD = np.array([0.8191725133961645, 0.6710436067037893, 0.5497004779019703])  # powers of 1/1.22074…: an R3 sequence


@dataclass(frozen=True)
class Frozen:
    """A set whose seed is fixed: models are compared on it."""

    seed: int
    images: int
    split: str


TRAINING = Frozen(seed=20171, images=4400, split="train")
TEST = Frozen(seed=77008, images=500, split="valid")


@dataclass(frozen=True)
class Options:
    size: int = 512
    """Side of the square images in pixels."""
    abnormal_fraction: float = 0.48
    """Probability that a study is abnormal."""
    marker_fraction: float = 0.7
    """How often a lead letter (L, R) lies in the field."""
    marker_correlation: float = 0.0
    """0: letters say nothing about the label. 1: they lie in all abnormal studies and in no normal one."""
    metal_fraction: float = 0.08
    """How often a ring, snap or chain is in the field."""
    metal_correlation: float = 0.0
    """As marker_correlation, for incidental metal (implants are abnormal in any case)."""
    body_parts: tuple[str, ...] = BODY_PARTS
    """Which of the seven body parts to draw."""

    def __post_init__(self) -> None:
        if self.size < 64:
            raise ValueError(f"size: expected at least 64 pixels, got {self.size}")
        for name in (
            "abnormal_fraction",
            "marker_fraction",
            "marker_correlation",
            "metal_fraction",
            "metal_correlation",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        unknown = set(self.body_parts) - set(BODY_PARTS)
        if unknown or not self.body_parts:
            raise ValueError(
                f"body_parts: expected some of {', '.join(BODY_PARTS)}, got {', '.join(sorted(unknown)) or 'none'}"
            )


@dataclass(frozen=True)
class Study:
    seed: int
    number: int
    patient_number: int
    order: int  # 1 for a patient's first study
    body_part: str
    patient: Patient
    views: tuple[View, ...]
    view_seeds: tuple[int, ...]
    abnormal: bool
    lesion: Lesion
    hidden: tuple[bool, ...]  # views in which the lesion projects out of sight


@dataclass(frozen=True)
class Phantom:
    """A rendered view. `box` is the lesion's, in pixels (x0, y0, x1, y1) half-open, or None where no lesion is visible."""

    image: np.ndarray
    box: Box | None
    kind: str
    study: Study
    view: View


def plan_study(seed: int, number: int, options: Options = Options()) -> Study:
    """What study `number` of the series `seed` contains; cheap, nothing is rendered. Every eighth study is a patient's second."""
    again = number % 8 == 7
    patient_number = number - 1 if again else number
    patient = sample_patient(_stream(seed, patient_number, 100))
    study, lesion, views = (_stream(seed, number, k) for k in range(3))
    # Spread evenly over the studies, so that a set of 500 has the intended mix: body part, label, extent of the lesion.
    part, label, extent = (_stream(seed, 0, 101).random(3) + number * _SPREAD) % 1
    body_part = options.body_parts[int(part * len(options.body_parts))]
    count = int(study.choice(4, p=(0.12, 0.3, 0.4, 0.18))) + 1
    names = [str(n) for n in study.permutation(("frontal", "lateral", "oblique"))]
    names = (names + [str(study.choice(("frontal", "oblique")))])[:count]
    ray = int(study.integers(1, 5)) if study.random() < 0.85 else 0
    hidden = (study.random(4) < 0.09) & (np.arange(4) > 0)
    return Study(
        seed,
        number,
        patient_number,
        2 if again else 1,
        body_part,
        patient,
        tuple(sample_view(body_part, name, ray, views) for name in names),
        tuple(int(s) for s in views.integers(2**31, size=count)),
        bool(label < options.abnormal_fraction),
        sample_lesion(lesion, float(extent)),
        tuple(bool(h) for h in hidden[:count]),
    )


def _stream(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, number, purpose)))


def render(study: Study, view: int, options: Options = Options(), lesion: bool | None = None) -> Phantom:
    """The radiograph of one view. `lesion` switches the lesion on or off; None: as the study's label says."""
    shows = study.abnormal if lesion is None else lesion
    clean, exposure, change = _expose(study, view, options)
    box = None
    if shows and change is not None:
        box, delta, window = change
        clean = clean.copy()
        clean[window] += delta
    return Phantom(
        exposure.digitise(exposure.tone(clean)), box, study.lesion.kind if box else "none", study, study.views[view]
    )


def twin(study: Study, view: int, options: Options = Options()) -> tuple[Phantom, Phantom]:
    """The same radiograph with and without its lesion: same anatomy, noise and artefacts, whatever the study's label.

    They differ only inside the box enlarged by TWIN_MARGIN of the image side. Where the lesion is not visible they are equal.
    """
    clean, exposure, change = _expose(study, view, options)
    without = Phantom(exposure.digitise(exposure.tone(clean)), None, "none", study, study.views[view])
    if change is None:
        return replace(without), without
    box, delta, window = change
    clean[window] += delta
    return Phantom(exposure.digitise(exposure.tone(clean)), box, study.lesion.kind, study, study.views[view]), without


_Change = tuple[Box, np.ndarray, tuple[slice, slice]]


def _expose(study: Study, number: int, options: Options) -> tuple[np.ndarray, Exposure, _Change | None]:
    """(attenuation without lesion, exposure, the lesion's change of it) of one view."""
    size, patient, view = options.size, study.patient, study.views[number]
    rng = np.random.default_rng((study.view_seeds[number], 0))
    camera = Camera(patient, view, size)
    projected = [
        camera.project(tube) for tube in build_skeleton(patient, view) if shown(tube, view) and camera.sees(tube)
    ]
    soft, bone = np.zeros((2, size, size), np.float32)
    bones = []
    for tube in projected:
        frame = frame_of(tube, size, reach_of(tube))
        if frame is None:
            continue
        if tube.tube.soft:
            np.maximum(soft[frame.window], soft_attenuation(tube, frame), out=soft[frame.window])
        else:
            bone[frame.window] += bone_attenuation(tube, frame, patient)
            bones.append(tube)
    if view.body_part in ("shoulder", "humerus"):
        draw_torso(camera, bone, soft, patient)
    soft = cv2.GaussianBlur(soft, (0, 0), 0.004 * size + 0.1 * camera.pixels_per_cm)
    soft *= 1 + 0.05 * clouds(rng, size, 9) + 0.03 * clouds(rng, size, 30)
    sharpness = size / 512 * rng.uniform(0.55, 1.0)
    anatomy = cv2.GaussianBlur(soft + _normal_variants(bone, bones, rng), (0, 0), sharpness)
    exposure = sample_exposure(anatomy, rng)
    artefacts = sample_artefacts(
        np.random.default_rng((study.view_seeds[number], 1)),
        study.abnormal,
        options.marker_fraction,
        options.marker_correlation,
        options.metal_fraction,
        options.metal_correlation,
    )
    clean = anatomy + cv2.GaussianBlur(draw_artefacts(artefacts, soft, bones, patient.mirrored), (0, 0), sharpness)
    change = None if study.hidden[number] else _lesion(study, number, projected, clean, exposure, sharpness)
    return clean, exposure, change


def _normal_variants(bone: np.ndarray, bones: list[Projected], rng: np.random.Generator) -> np.ndarray:
    """Decoys: a bone island (small, round, dense) or a nutrient canal (a fine slanting line), each in one image of six."""
    size, draws = bone.shape[0], rng.random(7)
    long = [b for b in bones if b.length > 0.12 * size]
    if not long:
        return bone
    host = long[int(draws[0] * len(long))]
    at = host.start + (host.end - host.start) * (0.15 + 0.7 * draws[1])
    mask = np.zeros((size, size), np.uint8)
    if draws[2] < 0.16:
        cv2.circle(
            mask, tuple(int(c) for c in at), max(int(size * (0.005 + 0.005 * draws[3])), 1), 255, -1, cv2.LINE_AA
        )
        return bone * (1 + 0.5 * mask.astype(np.float32) / 255)
    if draws[2] < 0.32:
        axis = (host.end - host.start) / host.length
        way = (axis + 0.25 * (draws[4] - 0.5) * axis[::-1]) * size * (0.02 + 0.03 * draws[5])
        cv2.line(mask, tuple(int(c) for c in at - way), tuple(int(c) for c in at + way), 255, 1, cv2.LINE_AA)
        return bone * (1 - 0.3 * cv2.GaussianBlur(mask, (0, 0), size / 512).astype(np.float32) / 255)
    return bone


def _lesion(
    study: Study, number: int, projected: list[Projected], clean: np.ndarray, exposure: Exposure, sharpness: float
) -> _Change | None:
    size = len(clean)
    found = _site(study, size)
    if found is None:
        return None
    name, part, across = found
    bone = next((b for b in projected if b.tube.name == name), None)
    if bone is None:
        return None
    column, row = (int(c) for c in bone.start + (bone.end - bone.start) * part)
    if not (0 <= column < size and 0 <= row < size) or exposure.field[row, column] < 0.5:
        return None
    drawn = lesion_change(study.lesion, bone, part, across, study.patient, size)
    if drawn is None:
        return None
    window, raw = drawn
    delta = cv2.GaussianBlur(raw.astype(np.float32), (0, 0), sharpness, borderType=cv2.BORDER_CONSTANT)
    local = replace(exposure, low=exposure.low[window])
    before = local.tone(clean[window])

    def brightness_change() -> np.ndarray:
        return np.abs(local.tone(clean[window] + delta) - before) * exposure.field[window]

    seen = brightness_change()
    strongest = float(seen.max())
    if 0 < strongest < _PLAIN:  # too faint behind thick tissue: denser, or more destroyed
        delta *= min(_PLAIN / strongest, 2.0)
        seen = brightness_change()
        strongest = float(seen.max())
    if strongest < _VISIBLE or (seen > _VISIBLE).sum() < 1.2e-4 * size**2:
        return None
    rows, columns = (np.flatnonzero((seen > max(_BOX * strongest, 0.025)).any(axis)) for axis in (1, 0))
    margin = TWIN_MARGIN * size
    taper_rows = np.clip(
        1 - (np.maximum(rows[0] - np.arange(len(seen)), np.arange(len(seen)) - rows[-1])) / margin, 0, 1
    )
    wide = np.arange(seen.shape[1])
    taper_columns = np.clip(1 - np.maximum(columns[0] - wide, wide - columns[-1]) / margin, 0, 1)
    delta *= (taper_rows[:, None] * taper_columns[None]).astype(np.float32)
    top, left = window[0].start, window[1].start
    box = (float(left + columns[0]), float(top + rows[0]), float(left + columns[-1] + 1), float(top + rows[-1] + 1))
    return box, delta, window


def _site(study: Study, size: int) -> tuple[str, float, float] | None:
    """(bone, station 0-1, place across in half-widths) of the first candidate that lies well inside every view, or inside most."""
    seen = [_axes(study, k, size) for k in range(len(study.views))]
    first = {name: axis for name, axis in seen[0].items() if _visible_part(axis, size)}
    best, most = None, 0
    for place in study.lesion.places if first else ():
        name, part, across = choose(place, first)
        inside = 0
        for view in seen:
            axis = view.get(name)
            at = None if axis is None else (axis.start + (axis.end - axis.start) * part) / size
            inside += (
                at is not None and bool(((at > 0.13) & (at < 0.87)).all()) and axis.length > 0.5 * first[name].length
            )
        if inside > most:
            best, most = (name, part, across), inside
        if most == len(seen):
            break
    return best


def _axes(study: Study, number: int, size: int) -> dict[str, Axis]:
    """Where one view shows each bone's axis."""
    view = study.views[number]
    camera = Camera(study.patient, view, size)
    tubes = (t for t in build_skeleton(study.patient, view) if not t.soft and shown(t, view))
    return {t.name: Axis(camera(t.start, t.group), camera(t.end, t.group), t.host) for t in tubes}


def _visible_part(axis: Axis, size: int) -> bool:
    points = axis.start + np.linspace(0.1, 0.9, 9)[:, None] * (axis.end - axis.start)
    return bool(((points > 0.12 * size) & (points < 0.88 * size)).all(1).any())


def planned_views(seed: int, images: int, options: Options = Options()) -> Iterator[tuple[Study, int]]:
    """The first `images` views of the series, study by study (the last study may be cut short)."""
    number = 0
    while images > 0:
        study = plan_study(seed, number, options)
        for view in range(min(len(study.views), images)):
            yield study, view
        images -= len(study.views)
        number += 1


def image_path(study: Study, view: int, split: str) -> str:
    verdict = "positive" if study.abnormal else "negative"
    folder = f"MURA-v1.1/{split}/XR_{study.body_part.upper()}/patient{study.patient_number + 1:05d}/study{study.order}_{verdict}"
    return f"{folder}/image{view + 1}.png"


def generate(
    root: Path,
    images: int,
    seed: int,
    split: str = "train",
    options: Options = Options(),
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Writes `images` phantoms below `root` in the MURA layout, MURA's two CSV files of the split, and index.csv with the boxes.

    `progress` is called with the number of images each time some are finished. The index is written last: a folder with an
    index.csv is complete.
    """
    if images < 1 or workers < 1:
        raise ValueError(f"images and workers: expected at least 1, got {images} and {workers}")
    views = list(planned_views(seed, images, options))
    work = partial(_write, Path(root), split, options)
    chunks = [views[i : i + 16] for i in range(0, len(views), 16)]
    radiographs: list[Radiograph] = []
    if workers == 1:
        results = map(work, chunks)
        radiographs = [r for part in results for r in _noted(part, progress)]
    else:
        with ProcessPoolExecutor(workers) as pool:
            radiographs = [r for part in pool.map(work, chunks) for r in _noted(part, progress)]
    _write_mura_tables(Path(root), split, radiographs)
    index = Index(Path(root), tuple(radiographs))
    write_index(index)
    return index


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
        if not cv2.imwrite(str(root / path), phantom.image, [cv2.IMWRITE_PNG_COMPRESSION, 2]):
            raise OSError(f"{root / path}: could not be written; check the free space and the permissions of {root}")
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


def contact_sheet(
    seed: int, path: Path, columns: int = 6, tile: int = 256, boxes: bool = True, options: Options = Options()
) -> Path:
    """Writes a PNG with a row per body part: the left half normal, the right half abnormal (`boxes`: with the lesions' boxes)."""
    rows = []
    for row, part in enumerate(options.body_parts):
        only = replace(options, body_parts=(part,))
        tiles: dict[bool, list[np.ndarray]] = {False: [], True: []}
        wanted, number = {False: columns - columns // 2, True: columns // 2}, 1000 * row
        while any(len(tiles[k]) < wanted[k] for k in tiles):
            study, number = plan_study(seed, number, only), number + 1
            if len(tiles[study.abnormal]) == wanted[study.abnormal]:
                continue
            phantom = render(study, number % len(study.views), only)
            if phantom.box is not None or not study.abnormal:
                tiles[study.abnormal].append(_captioned(phantom, tile, boxes))
        rows.append(np.hstack(tiles[False] + tiles[True]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.vstack(rows)):
        raise OSError(f"{path}: could not be written; check the folder's permissions and that the name ends in .png")
    return path


def _captioned(phantom: Phantom, tile: int, boxes: bool) -> np.ndarray:
    picture = cv2.cvtColor(cv2.resize(phantom.image, (tile, tile), interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    if boxes and phantom.box is not None:
        x0, y0, x1, y1 = (int(round(c * tile / phantom.image.shape[0])) for c in phantom.box)
        cv2.rectangle(picture, (x0, y0), (x1, y1), (0, 190, 255), 1, cv2.LINE_AA)
    text = f"{phantom.study.body_part} {phantom.view.name}" + (f" {phantom.kind}" if boxes and phantom.box else "")
    cv2.putText(picture, text, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (90, 200, 90), 1, cv2.LINE_AA)
    return picture
