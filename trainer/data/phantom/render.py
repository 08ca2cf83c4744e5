"""From a study to pixels: anatomy, exposure, artefacts, and the lesion switched on or off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from scaphoid.trainer.data.index import Box
from scaphoid.trainer.data.phantom.anatomy import View, build_skeleton
from scaphoid.trainer.data.phantom.artefacts import draw_artefacts, sample_artefacts
from scaphoid.trainer.data.phantom.lesions import Axis, choose, lesion_change
from scaphoid.trainer.data.phantom.projection import Camera, Projected, shown
from scaphoid.trainer.data.phantom.study import DEFAULTS, Options, Study
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

TWIN_MARGIN = 0.025  # a lesion changes no pixel farther than this fraction of the side outside its box
_VISIBLE = 0.1  # a lesion counts as visible where it changes the brightness (0-1) by this much …
_PLAIN = 0.32  # … and is strengthened towards this
_BOX = 0.16  # … and its box spans what changes by this fraction of its strongest change, at least 0.025


@dataclass(frozen=True)
class Phantom:
    """A rendered view. `box` is the lesion's, (x0, y0, x1, y1) half-open in pixels; None where no lesion is visible."""

    image: np.ndarray
    box: Box | None
    kind: str
    study: Study
    view: View


def render(study: Study, view: int, options: Options = DEFAULTS, lesion: bool | None = None) -> Phantom:
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


def twin(study: Study, view: int, options: Options = DEFAULTS) -> tuple[Phantom, Phantom]:
    """The same radiograph with and without its lesion: same anatomy, noise and artefacts, whatever the study's label.

    They differ only inside the box enlarged by TWIN_MARGIN of the image side. Where the lesion is not visible they
    are equal.
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
    """Decoys: a bone island (small, round, dense) or a nutrient canal (a fine slanting line), one image in six each."""
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
    """The change of attenuation, kept to the enlarged box; None where this view does not show the lesion."""
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
    """(bone, station 0-1, place across in half-widths) of the first candidate that lies well inside every view, or
    inside most."""
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
