"""Attenuation: tubes of bone and soft tissue, the torso, trabecular texture, and the tone curve of a radiograph.

Attenuation is in units of a line integral (dimensionless). All arrays are float32 `[size, size]` or a window of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from scaphoid.trainer.data.phantom.anatomy import STATIONS, Patient
from scaphoid.trainer.data.phantom.projection import Camera, Projected

CORTICAL, MARROW, SOFT, FAT = 1.15, 0.34, 0.2, 0.15  # attenuation per centimetre
_TILE = 512


@dataclass(frozen=True)
class Frame:
    """A window of the image in a tube's own coordinates: `along` from the start and `across` to the lateral side, in
    pixels."""

    window: tuple[slice, slice]
    along: np.ndarray
    across: np.ndarray


@lru_cache(maxsize=1)
def trabecular_tile() -> np.ndarray:
    """Periodic band-limited noise, drawn out along its first axis: struts of spongy bone. Fixed, unit variance."""
    noise = np.random.default_rng(20).standard_normal((_TILE, _TILE))
    fy, fx = np.fft.fftfreq(_TILE)[:, None], np.fft.fftfreq(_TILE)[None, :]
    along, across = np.hypot(fy * 2.2, fx), np.hypot(fy, fx * 1.3)
    band = along * np.exp(-((along / 0.10) ** 2)) + 0.5 * across * np.exp(-((across / 0.05) ** 2))
    tile = np.fft.ifft2(np.fft.fft2(noise) * band).real
    return (tile / tile.std()).astype(np.float32)


def frame_of(tube: Projected, size: int, margin: float) -> Frame | None:
    """The window within `margin` pixels of the tube, or None where it lies outside the image."""
    low = np.floor(np.minimum(tube.start, tube.end) - margin).astype(int).clip(0, size)
    high = np.ceil(np.maximum(tube.start, tube.end) + margin).astype(int).clip(0, size)
    if (high - low).min() < 2:
        return None
    axis = (tube.end - tube.start) / max(tube.length, 1e-6)
    normal = tube.side * np.array([axis[1], -axis[0]])
    x = np.arange(low[0], high[0], dtype=np.float32) + np.float32(0.5 - tube.start[0])
    y = np.arange(low[1], high[1], dtype=np.float32) + np.float32(0.5 - tube.start[1])
    along = (x * np.float32(axis[0]))[None] + (y * np.float32(axis[1]))[:, None]
    across = (x * np.float32(normal[0]))[None] + (y * np.float32(normal[1]))[:, None]
    return Frame((slice(low[1], high[1]), slice(low[0], high[0])), along, across)


def reach_of(tube: Projected) -> float:
    return float(tube.half.max() + np.abs(tube.shift).max() + 3)


def soft_attenuation(tube: Projected, frame: Frame) -> np.ndarray:
    """Muscle inside a layer of fat under the skin."""
    index, inside = _index(tube, frame)
    half, v = tube.half[index].astype(np.float32), frame.across - tube.shift[index].astype(np.float32)
    chord = np.sqrt(np.maximum(half * half - v * v, 0))
    muscle = np.sqrt(np.maximum((0.86 * half) ** 2 - v * v, 0))
    depth = (2 / tube.pixels_per_cm * tube.depth)[index].astype(np.float32)
    return inside * depth * (FAT * chord + (SOFT - FAT) * muscle)


def bone_attenuation(
    bone: Projected, frame: Frame, patient: Patient, slide: np.ndarray | None = None, plates: bool = True
) -> np.ndarray:
    """Cortical wall around trabecular marrow: the difference of two chords. `slide` displaces the bone sideways, per
    pixel."""
    index, inside = _index(bone, frame)
    v = frame.across - bone.shift[index].astype(np.float32)
    if slide is not None:
        v = v - slide
    inner = np.maximum(bone.half - bone.wall, 0)
    half, inner_half = bone.half.astype(np.float32)[index], inner.astype(np.float32)[index]
    v2 = v * v
    outer = np.sqrt(np.maximum(half * half - v2, 0))
    marrow = np.sqrt(np.maximum(inner_half * inner_half - v2, 0))
    spongy = (1 - bone.wall / bone.wall.max()) if bone.tube.profile != "carpal" else np.full(STATIONS, 0.8)
    shaft_to_end = (MARROW * (0.38 + 1.1 * spongy)).astype(np.float32)
    grain = (0.08 + 0.12 * spongy).astype(np.float32) * np.float32(patient.trabecular)
    zoom = np.float32(55 / bone.pixels_per_cm)  # tile pixels per image pixel: struts keep their size in millimetres
    salt = int(abs(bone.tube.start[0] * 97 + bone.tube.end[1] * 31)) + int(abs(patient.wobble[7]) * 500)
    tile = trabecular_tile()
    texture = tile[
        ((frame.along * zoom).astype(np.int32) + salt) & (_TILE - 1),
        ((v * zoom).astype(np.int32) + 3 * salt) & (_TILE - 1),
    ]
    density = patient.density * (2 / bone.pixels_per_cm * bone.depth)
    if plates and patient.growing and bone.tube.profile != "carpal":
        density = density * _growth_plate(bone)
    cortex = CORTICAL * (outer - marrow)
    return (
        inside
        * density.astype(np.float32)[index]
        * (cortex + marrow * shaft_to_end[index] * (1 + grain[index] * texture))
    )


def _growth_plate(bone: Projected) -> np.ndarray:
    """A smooth dark line with dense borders across the growing ends, in all bones of a child alike."""
    u = np.linspace(0, 1, STATIONS)
    width = max(1.3 * bone.pixels_per_cm / 10 / max(bone.length, 1), 0.006)
    ends = (0.06, 0.93) if bone.tube.profile in ("humerus", "radius", "ulna") else (0.12,)
    factor = np.ones(STATIONS)
    for end in ends:
        near = (u - end) / width
        factor += 0.3 * np.exp(-((near / 2.2) ** 2)) - 0.75 * np.exp(-(near**2))
    return factor


def _index(tube: Projected, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    u = frame.along * np.float32((STATIONS - 1) / max(tube.length, 1e-3))
    inside = (u >= 0) & (u <= STATIONS - 1)
    return u.clip(0, STATIONS - 1).astype(np.int32), inside


def draw_torso(camera: Camera, bone: np.ndarray, soft: np.ndarray, patient: Patient) -> None:
    """Scapula, ribs, chest wall and lung, added in place (shoulder and humerus radiographs)."""
    size, w = camera.size, patient.wobble

    def polygon(points, z=-1.0):
        return np.array([camera(np.array([x, y, z]), "torso") for x, y in points])

    chest = _filled(polygon([(-5.5, -37), (-40, -39), (-40, 14), (-9.5, 14), (-7.2, -10), (-6.2, -22)]), size)
    neck = _filled(polygon([(0, -35.2), (-7, -37.5), (-13, -41), (-40, -42), (-40, -20), (-6, -24), (2, -30)]), size)
    lung = _filled(polygon([(-10, -33), (-14, -36), (-40, -37), (-40, 12), (-12.5, 12), (-9.3, -14)]), size)
    blur = lambda mask, cm: cv2.GaussianBlur(mask, (0, 0), max(cm * camera.pixels_per_cm, 0.5))  # noqa: E731
    np.maximum(soft, SOFT * 9.5 * patient.flesh**0.5 * blur(np.maximum(chest, neck), 0.5), out=soft)
    soft -= SOFT * 5.5 * blur(lung, 0.4)
    rib = np.zeros((size, size), np.float32)
    for k in range(9):
        y = -38.5 + 3.6 * k + 0.3 * w[k]
        wall = (-12.5, -10, -9, -8.6, -8.4, -8.4, -8.8, -9.4, -10.2)[k]  # the lateral edge of the chest
        t = np.linspace(0, 1, 24)
        for fall, strength in ((-4.5, 0.42), (3.5, 0.24)):  # posterior half rises to the spine, anterior half falls
            arc = np.stack([wall - 15 * t**1.7, y + 3 + fall * t**0.55 + 1.2 * t * fall], 1)
            points = polygon(arc, z=-4)
            wide = _stroke(points, size, 1.15 * camera.pixels_per_cm)
            rib += strength * (wide - 0.5 * _stroke(points, size, 0.7 * camera.pixels_per_cm))
    blade = polygon(
        [
            (-2.6, -31.4),
            (-5.2, -32.6),
            (-9.6, -33.2),
            (-10.6, -30),
            (-9.6, -24),
            (-6.8, -17.8),
            (-5.9, -18.2),
            (-5.0, -23),
            (-3.2, -28.2),
        ]
    )
    mask = _filled(blade, size)
    rim = mask - _filled(blade.mean(0) + (blade - blade.mean(0)) * 0.9, size).clip(0, 1) * mask
    tile = np.tile(trabecular_tile(), (-(-size // _TILE),) * 2)[:size, :size]
    bone += patient.density * blur(rib + mask * (0.26 + 0.03 * patient.trabecular * tile) + 0.38 * rim, 0.06)


def _filled(points: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def _stroke(points: np.ndarray, size: int, width: float) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    cv2.polylines(mask, [np.round(points * 16).astype(np.int32)], False, 255, max(round(width), 1), cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise with about `cells` bumps along a side, in [-1, 1] or so."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


@dataclass(frozen=True)
class Exposure:
    """How a radiograph was exposed, processed and collimated. `field` is 1 inside the collimated field, 0 outside."""

    low: np.ndarray
    span: float
    curve: float
    level: float
    background: float
    mottle: np.ndarray
    field: np.ndarray
    outside: float

    def tone(self, attenuation: np.ndarray) -> np.ndarray:
        """Attenuation to brightness in [0, 1], without noise or collimation."""
        x = (attenuation - self.low) / np.float32(self.span)
        bright = (1 - np.exp(-self.curve * np.maximum(x, -0.05))) / np.float32(1 - np.exp(-self.curve))
        return np.clip(self.background + (self.level - self.background) * bright, 0, 1)

    def digitise(self, bright: np.ndarray) -> np.ndarray:
        """Adds quantum mottle and the collimator: uint8."""
        grey = (bright + self.mottle * (0.35 + 0.65 * bright)) * self.field + self.outside * (1 - self.field)
        return np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)


def sample_exposure(anatomy: np.ndarray, rng: np.random.Generator) -> Exposure:
    """`anatomy` is the attenuation without lesion or artefact, so that neither moves the exposure."""
    size = anatomy.shape[0]
    small = cv2.GaussianBlur(
        cv2.resize(anatomy, (size // 4, size // 4), interpolation=cv2.INTER_AREA), (0, 0), 0.045 * size / 4
    )
    equalise = rng.uniform(0.25, 0.6)
    low = np.float32(equalise) * cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR)
    field, outside = _collimator(size, rng)
    inside = (anatomy - low)[::4, ::4][field[::4, ::4] > 0.5]
    span = float(np.percentile(inside, 99.6)) if inside.size else 1.0
    headroom, curve, level, background, dose, soft_screen = rng.uniform(
        (1.0, 0.2, 0.78, 0.02, 0.008, 0), (1.25, 1.5, 0.98, 0.14, 0.026, 1)
    )
    grain = rng.standard_normal((size, size), dtype=np.float32)
    if soft_screen < 0.6:
        grain = cv2.GaussianBlur(grain, (0, 0), 0.7) * np.float32(2.2)
    return Exposure(low, max(span, 0.2) * headroom, curve, level, background, grain * np.float32(dose), field, outside)


def _collimator(size: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    draws = rng.random(8)
    turn = rng.normal(0, 4)
    outside = float(rng.uniform(0.0, 0.05))
    if draws[0] < 0.35:
        return np.ones((size, size), np.float32), outside
    half = size * (0.5 - 0.12 * draws[1:5] * (draws[4:8] < 0.7))
    corners = np.array([(-half[0], -half[1]), (half[2], -half[1]), (half[2], half[3]), (-half[0], half[3])])
    angle = np.radians(turn)
    corners = corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + size / 2
    return cv2.GaussianBlur(_filled(corners, size), (0, 0), size * 0.002), outside
