"""Abnormalities: fracture line, displacement, lytic and sclerotic lesion, metal implant.

A lesion belongs to a study: it sits at one place of one bone and every view projects it. It is drawn from a random
stream of its own, for normal studies too, so that switching it on or off moves nothing else. Each kind returns the
change of attenuation.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from scaphoid.trainer.data.phantom.anatomy import STATIONS, Patient
from scaphoid.trainer.data.phantom.projection import Projected, deformed
from scaphoid.trainer.data.phantom.texture import Frame, bone_attenuation, clouds, frame_of, reach_of

KINDS = ("fracture", "displacement", "lytic", "sclerotic", "metal")
_METAL = 6.0  # attenuation of an implant: off the scale


@dataclass(frozen=True)
class Lesion:
    """`extent` is the wanted side of the box (square root of its area) as a fraction of the image side."""

    kind: str
    extent: float
    strength: float
    places: tuple[
        tuple[float, float, float], ...
    ]  # candidates: (which bone, station along it, place across it), each in [0, 1)
    seed: int


def sample_lesion(rng: np.random.Generator, p: float) -> Lesion:
    """`p` in [0, 1) picks the extent: half of the boxes are 6-10 % of the image wide, a tenth of them 30 % and more."""
    extent = float(np.interp(p, (0, 0.5, 0.67, 0.79, 1), (0.055, 0.077, 0.14, 0.4, 0.6)))
    weights = np.array([0.22, 0.2, 0.22, 0.2, 0.16]) if extent < 0.2 else np.array([0.05, 0.15, 0.31, 0.29, 0.2])
    kind = KINDS[int(rng.choice(5, p=weights))]
    places = tuple(tuple(row) for row in rng.random((40, 3)))
    return Lesion(kind, extent, float(rng.uniform(0.75, 1.0)), places, int(rng.integers(2**31)))


@dataclass(frozen=True)
class Axis:
    """Where a view shows a bone: its ends in pixels, and how often lesions choose it."""

    start: np.ndarray
    end: np.ndarray
    host: float

    @property
    def length(self) -> float:
        return float(np.hypot(*(self.end - self.start)))


def choose(place: tuple[float, float, float], axes: dict[str, Axis]) -> tuple[str, float, float]:
    """(bone, station along it in [0, 1], place across it in half-widths) of one of a lesion's candidate places."""
    which, along, across = place
    weights = np.cumsum([axis.host * axis.length**0.7 for axis in axes.values()])
    bone = int(np.searchsorted(weights, which * weights[-1], side="right").clip(0, len(axes) - 1))
    return list(axes)[bone], 0.1 + 0.8 * along, across - 0.5


def lesion_change(
    lesion: Lesion, bone: Projected, part: float, across: float, patient: Patient, size: int
) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """(window, change of attenuation in it) of the lesion drawn into `bone` at a place from `choose`; None where it
    leaves the image."""
    frame = frame_of(bone, size, reach_of(bone) + 1.1 * lesion.extent * size)
    if frame is None:
        return None
    rng = np.random.default_rng(lesion.seed)
    station = part * bone.length
    offset = across * _at(bone.half, bone, station)
    draw = {
        "fracture": _fracture,
        "displacement": _displacement,
        "lytic": _lytic,
        "sclerotic": _sclerotic,
        "metal": _metal,
    }[lesion.kind]
    return frame.window, draw(lesion, bone, frame, station, offset, size, patient, rng)


def _at(values: np.ndarray, bone: Projected, station: float) -> float:
    return float(np.interp(station, np.linspace(0, bone.length, STATIONS), values))


def _break_lines(bone, frame: Frame, station: float, length: float, rng) -> np.ndarray:
    """Signed distance along the axis from a jagged line that runs `length` pixels along the bone as it crosses it."""
    half = max(_at(bone.half, bone, station), 2.0)
    slope = np.clip(length / (2.2 * half), 0.12, 2.6) * rng.choice((-1, 1))
    jag = np.interp(np.linspace(-1.6, 1.6, 128), np.linspace(-1.6, 1.6, 17), rng.standard_normal(17) * 0.16 * half)
    v = frame.across - _at(bone.shift, bone, station)
    index = ((v / half + 1.6) * 40).clip(0, 127).astype(np.int32)
    return frame.along - station - slope * v - jag.astype(np.float32)[index]


def _gap(distance: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-((distance / width) ** 4))


def _run(bone: Projected, station: float, side: float) -> float:
    """How far along the bone a box of the wanted area reaches, given the bone's width."""
    return float(np.clip(side**2 / (2 * max(_at(bone.half, bone, station), 2.0)), 0.5 * side, 2.4 * side))


def _fracture(lesion, bone, frame, station, offset, size, patient, rng) -> np.ndarray:
    side = lesion.extent * size
    width = max(0.0055 * size, 0.055 * side) * rng.uniform(0.9, 1.3)
    whole = bone_attenuation(bone, frame, patient)
    run = _run(bone, station, side)
    distance = _break_lines(bone, frame, station, run, rng)
    gap = _gap(distance, width)
    if rng.random() < 0.45 or lesion.extent > 0.15:  # a second line: a butterfly fragment
        second = _break_lines(bone, frame, station + rng.uniform(-0.2, 0.2) * run, run, rng)
        gap = np.maximum(gap, _gap(second, 0.8 * width))
    dense = 0.3 * np.exp(-((distance / (4 * width)) ** 2))  # impacted margins
    return whole * ((1 + dense) * (1 - lesion.strength * gap) - 1)


def _displacement(lesion, bone, frame, station, offset, size, patient, rng) -> np.ndarray:
    side = lesion.extent * size
    whole = bone_attenuation(bone, frame, patient)
    half = max(_at(bone.half, bone, station), 2.0)
    distance = _break_lines(bone, frame, station, 0.5 * side, rng)
    step = np.clip(0.45 * side, 0.35 * half, 1.5 * half) * rng.choice((-1, 1)) * rng.uniform(0.8, 1.1)
    reach = max(0.6 * _run(bone, station, side), 1.2 * abs(step))
    slide = np.where(distance > 0, step * np.exp(-((np.maximum(distance, 0) / reach) ** 2)), 0).astype(np.float32)
    moved = bone_attenuation(bone, frame, patient, slide=slide)
    gap = _gap(distance, max(0.006 * size, 0.05 * side))
    return moved * (1 - 0.9 * lesion.strength * gap) - whole


def _blob(frame: Frame, bone, station, offset, along, across, rng) -> np.ndarray:
    """1 inside an irregular ellipse, falling to 0 at its rim; also the normalised radius."""
    u = (frame.along - station) / along
    v = (frame.across - _at(bone.shift, bone, station) - offset) / across
    angle = np.arctan2(v, u)
    lobes = sum(
        a * np.cos(k * angle + f)
        for k, a, f in zip((2, 3, 5, 7), rng.normal(0, (0.08, 0.07, 0.05, 0.03)), rng.uniform(0, 6.3, 4), strict=True)
    )
    return np.hypot(u, v) * (1 + lobes)


def _inside(distance: np.ndarray) -> np.ndarray:
    """1 where the distance is negative, 0 where it is positive, smooth between."""
    return 0.5 - 0.5 * np.tanh(distance / 2)


def _lytic(lesion, bone, frame, station, offset, size, patient, rng) -> np.ndarray:
    side = lesion.extent * size
    whole = bone_attenuation(bone, frame, patient)
    half = max(_at(bone.half, bone, station), 2.0)
    across = min(side / 2, 0.92 * half)
    along = np.clip((side / 2) ** 2 / across, side / 2, 1.9 * side / 2)
    expansile = side / 2 > 0.8 * half
    host = bone
    if expansile:  # the bone balloons into a thin shell
        u = np.linspace(0, bone.length, STATIONS)
        bulge = np.exp(-(((u - station) / (0.5 * side)) ** 4))
        target = np.clip(0.5 * side, 1.12 * half, 3.2 * half)
        host = deformed(
            bone,
            bone.half + bulge * (target - half),
            bone.wall * (1 - 0.5 * bulge),
            bone.depth * (1 - bulge * (1 - half / target)),
        )
        across, along, offset = 0.86 * target, 0.46 * side, 0.0
    radius = _blob(frame, bone, station, offset * 0.5, along, across, rng)
    hole = _inside((radius - 0.95) * 14)
    rim = (0.15 + 0.4 * rng.random()) * np.exp(-(((radius - 1.08) / 0.09) ** 2))
    septa = 1 - 0.25 * rng.random() * np.abs(np.sin(3 * radius + frame.along / max(side, 1) * 7))
    kept = 1 - 0.85 * lesion.strength * hole * septa
    return bone_attenuation(host, frame, patient) * (kept + rim * (not expansile)) - whole


def _sclerotic(lesion, bone, frame, station, offset, size, patient, rng) -> np.ndarray:
    side = lesion.extent * size
    whole = bone_attenuation(bone, frame, patient)
    half = max(_at(bone.half, bone, station), 2.0)
    cm = 2 / bone.pixels_per_cm
    radius = _blob(
        frame,
        bone,
        station,
        offset * (side < half),
        side / 2 * rng.uniform(1.0, 1.25),
        side / 2 * rng.uniform(0.8, 1.0),
        rng,
    )
    cloud = clouds(rng, 256, int(rng.integers(9, 18)))
    shape = frame.along.shape
    tone = 1 + 0.3 * cv2.resize(cloud, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    core = _inside((radius - 0.85) * 9)
    inside = np.minimum(whole / (0.35 * cm * half + 1e-6), 1)
    outside = 0.55 * (side / 2 > 0.8 * half)  # grows out of the bone: cloud-like new bone
    thick = 0.5 * min(half, side / 2) + 0.2 * (side / 2)  # new bone, half its depth in pixels
    dense = thick * cm * rng.uniform(0.55, 0.85) * lesion.strength + 0.35
    return core * np.maximum(tone, 0.25) * dense * np.maximum(inside, outside)


def _metal(lesion, bone, frame, station, offset, size, patient, rng) -> np.ndarray:
    """Plate with screws, nail, or crossed wires, along the bone; inside the bone's length."""
    side = lesion.extent * size
    half = max(_at(bone.half, bone, station), 2.0)
    kind = (
        rng.choice(("plate", "nail", "wires", "screw"))
        if lesion.extent < 0.2
        else rng.choice(("plate", "plate", "nail"))
    )
    length = min(2.0 * side if kind in ("plate", "nail") else 1.25 * side, 0.94 * bone.length)
    middle = float(np.clip(station, 0.53 * length, max(bone.length - 0.53 * length, 0.53 * length)))
    mid = _at(bone.shift, bone, middle)
    u, v = frame.along - middle, frame.across - mid
    soft = lambda d: np.clip(0.5 - d, 0, 1)  # noqa: E731  signed distance in pixels to coverage

    def bar(angle: float, at: float, aside: float, long: float, wide: float) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        p, q = (u - at) * c + (v - aside) * s, -(u - at) * s + (v - aside) * c
        return soft(np.hypot(np.maximum(np.abs(p) - long / 2 + wide / 2, 0), q) - wide / 2)

    thin = max(0.011 * size, 0.3 * half)
    if kind == "nail":
        return _METAL * np.maximum(
            bar(0, 0, 0, length, max(0.8 * half, thin)), bar(1.4, 0.36 * length, 0, 2.1 * half, 0.6 * thin)
        )
    if kind == "wires":
        tilt = rng.uniform(0.25, 0.7)
        return _METAL * np.maximum(bar(tilt, 0, 0, length, 0.6 * thin), bar(-tilt, 0.1 * length, 0, length, 0.6 * thin))
    if kind == "screw":
        tilt = rng.uniform(0.5, 1.3)
        thread = bar(tilt, 0, 0, length, thin) * (
            0.75 + 0.25 * np.sign(np.sin((u * np.cos(tilt) + v * np.sin(tilt)) * 4.5 / thin))
        )
        c, s = np.cos(tilt) * length / 2, np.sin(tilt) * length / 2
        return _METAL * np.maximum(thread, bar(tilt + np.pi / 2, c, s, 2.2 * thin, 0.9 * thin))
    aside = rng.choice((-1, 0, 1)) * 0.9 * half
    plate = bar(0, 0, aside, length, max(0.75 * half, 1.5 * thin))
    count = int(np.clip(length / (2.2 * thin), 3, 8))
    for at in np.linspace(-0.42, 0.42, count) * length:
        plate = np.maximum(plate, bar(np.pi / 2, at, aside * 0.1, 2.2 * half, 0.55 * thin) if aside else plate)
        if not aside:
            plate = plate * (1 - 0.8 * soft(np.hypot(u - at, v) - 0.32 * thin * 1.2))
    return _METAL * plate
