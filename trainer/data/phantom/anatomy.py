"""One upper limb per patient, and the seven views of it; projection.py turns them into pixels.

A patient's skeleton is built once, in centimetres, in three dimensions: the elbow is the origin, the humerus rises
along -y, the forearm and the hand fall along +y, +x is lateral and +z anterior. A body part is a camera (centre and
field of view); a view is a rotation about the limb's axis, so the frontal, oblique and lateral radiographs of a
study show the same bones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

BODY_PARTS = ("elbow", "finger", "forearm", "hand", "humerus", "shoulder", "wrist")
STATIONS = 512  # samples of a bone's profile along its axis

# Half-widths along the axis in multiples of the shaft's: (station, medial, lateral, anteroposterior).
_PROFILES: dict[str, list[tuple[float, float, float, float]]] = {
    "humerus": [
        (0, 1.9, 1.5, 1.8),
        (0.07, 2.15, 1.75, 1.95),
        (0.13, 1.4, 1.55, 1.4),
        (0.2, 1.08, 1.12, 1.1),
        (0.5, 1, 1, 1),
        (0.76, 1, 1, 0.95),
        (0.88, 1.6, 1.5, 0.95),
        (0.95, 2.7, 2.2, 1.1),
        (1, 2.0, 2.2, 1.35),
    ],
    "ulna": [
        (0, 1.2, 1.2, 1.5),
        (0.06, 1.5, 1.3, 1.9),
        (0.1, 1.25, 1.25, 1.3),
        (0.16, 1.2, 1.3, 1.4),
        (0.3, 1, 1, 1.05),
        (0.6, 0.85, 0.85, 0.85),
        (0.9, 0.72, 0.72, 0.72),
        (0.96, 1.0, 0.95, 0.95),
        (1, 0.85, 0.8, 0.8),
    ],
    "radius": [
        (0, 1.5, 1.5, 1.5),
        (0.035, 1.6, 1.6, 1.6),
        (0.075, 0.95, 0.95, 0.95),
        (0.13, 1.5, 1.0, 1.2),
        (0.2, 1, 1, 1),
        (0.5, 1.1, 1.1, 1),
        (0.8, 1.25, 1.2, 1.1),
        (0.92, 2.05, 1.8, 1.5),
        (0.97, 2.4, 2.0, 1.6),
        (1, 2.0, 2.0, 1.4),
    ],
    "metacarpal": [
        (0, 1.5, 1.5, 1.6),
        (0.12, 1.35, 1.35, 1.45),
        (0.3, 1, 1, 1.05),
        (0.6, 0.98, 0.98, 1.05),
        (0.82, 1.35, 1.35, 1.4),
        (0.94, 1.5, 1.5, 1.5),
        (1, 1.25, 1.25, 1.3),
    ],
    "phalanx": [
        (0, 1.6, 1.6, 1.45),
        (0.1, 1.5, 1.5, 1.4),
        (0.3, 1.05, 1.05, 0.95),
        (0.65, 0.92, 0.92, 0.85),
        (0.85, 1.2, 1.2, 1.0),
        (0.95, 1.25, 1.25, 1.1),
        (1, 1.1, 1.1, 1.0),
    ],
    "tip": [
        (0, 1.7, 1.7, 1.4),
        (0.15, 1.45, 1.45, 1.2),
        (0.5, 0.8, 0.8, 0.7),
        (0.8, 0.78, 0.78, 0.6),
        (0.92, 1.1, 1.1, 0.6),
        (1, 0.9, 0.9, 0.5),
    ],
    "carpal": [(0, 0.75, 0.85, 0.9), (0.3, 1, 0.95, 1), (0.65, 0.9, 1.05, 1), (1, 0.7, 0.7, 0.9)],
    "rod": [(0, 1, 1, 1), (0.5, 0.9, 0.9, 0.9), (1, 1.1, 1.1, 1.1)],
    "upper arm": [(0, 0.9, 1.15, 1.05), (0.2, 1.1, 1.1, 1.1), (0.6, 1, 1, 1), (1, 0.95, 0.95, 0.9)],
    "forearm": [(0, 1, 1, 1), (0.25, 1.05, 1.05, 1.0), (0.7, 0.75, 0.75, 0.72), (1, 0.64, 0.64, 0.55)],
    "palm": [
        (0, 0.66, 0.7, 0.55),
        (0.3, 0.72, 0.8, 0.48),
        (0.55, 0.95, 1.0, 0.45),
        (0.8, 1, 0.9, 0.38),
        (1, 0.95, 0.8, 0.28),
    ],
    "digit": [(0, 1.1, 1.1, 1.1), (0.5, 1, 1, 1), (1, 0.78, 0.78, 0.75)],
}


@dataclass(frozen=True)
class Tube:
    """A bone or a limb of soft tissue: a bowed axis with elliptic cross-sections. Lengths in centimetres."""

    name: str
    profile: str
    start: np.ndarray  # [3]
    end: np.ndarray  # [3]
    radius: float  # half-width of the shaft
    bow: float = 0.0  # sideways sag of the axis at its middle
    cap: float = 0.8  # length of the rounded ends, in multiples of the width there
    group: str = "lower"  # moves with: lower (below the elbow), upper (the humerus), torso
    soft: bool = False
    host: float = 1.0  # how often lesions choose this bone


@dataclass(frozen=True)
class Patient:
    """What the radiographs of one patient share."""

    size: float
    robust: float
    density: float
    cortex: float  # cortical thickness over half-width at the shaft
    trabecular: float
    flesh: float
    growing: bool
    mirrored: bool  # left limb
    wobble: np.ndarray  # [64] standard normal numbers: individual proportions


@dataclass(frozen=True)
class View:
    """One projection: limb rotation and joint angles in radians, camera in centimetres."""

    name: str
    body_part: str
    rotation: float
    flexion: float
    abduction: float
    curl: np.ndarray  # [5] flexion of each finger's joints
    centre: np.ndarray  # [2]
    field_of_view: float
    roll: float
    offset: np.ndarray  # [2] in fractions of the image side
    rays: tuple[int, ...] | None = None  # finger radiographs show these rays only


def sample_patient(rng: np.random.Generator) -> Patient:
    growing = bool(rng.random() < 0.15)
    size = rng.uniform(0.72, 0.9) if growing else rng.normal(1.0, 0.06)
    return Patient(
        size=float(np.clip(size, 0.7, 1.15)),
        robust=float(rng.uniform(0.86, 1.16)),
        density=float(rng.uniform(0.75, 1.2)),
        cortex=float(rng.uniform(0.2, 0.38)),
        trabecular=float(rng.uniform(0.6, 1.3)),
        flesh=float(rng.uniform(0.8, 1.35)),
        growing=growing,
        mirrored=bool(rng.random() < 0.5),
        wobble=rng.standard_normal(64),
    )


# body part: camera centre (y along the limb; fingers follow their ray), field of view, and per view (rotation, flexion)
# in degrees.
_CAMERAS: dict[str, tuple[tuple[float, float], float, dict[str, tuple[float, float]]]] = {
    "elbow": ((0.3, 0.0), 17, {"frontal": (0, 8), "lateral": (85, 85), "oblique": (40, 10)}),
    "finger": ((0.0, 38.0), 10.5, {"frontal": (0, 0), "lateral": (80, 0), "oblique": (40, 0)}),
    "forearm": ((0.0, 12.2), 32, {"frontal": (0, 0), "lateral": (72, 0), "oblique": (38, 0)}),
    "hand": ((0.4, 32.5), 23, {"frontal": (0, 0), "lateral": (68, 0), "oblique": (36, 0)}),
    "humerus": ((0.0, -15.5), 37, {"frontal": (0, 5), "lateral": (65, 25), "oblique": (30, 10)}),
    "shoulder": ((-3.0, -28.5), 21, {"frontal": (0, 0), "lateral": (50, 0), "oblique": (25, 0)}),
    "wrist": ((0.0, 27.0), 14, {"frontal": (0, 0), "lateral": (72, 0), "oblique": (38, 0)}),
}
_HANGING = {"hand", "wrist", "finger", "forearm"}  # usually shown with the fingers up


def sample_view(body_part: str, name: str, ray: int, rng: np.random.Generator) -> View:
    """`ray`: which finger (0 thumb … 4 little) a finger radiograph is centred on."""
    centre, fov, views = _CAMERAS[body_part]
    rotation, flexion = views[name]
    spread = {"frontal": 5.0, "lateral": 22.0, "oblique": 10.0}[name]
    wide = rng.random() < 0.22
    roll = rng.uniform(-55, 55) if wide else rng.normal(0, 7)
    roll += 180 * (body_part in _HANGING) * (rng.random() < 0.8)
    alone = rng.random() < (0.9 if name == "lateral" else 0.55)
    rays = None if body_part != "finger" else ((ray,) if alone else tuple({max(ray - 1, 1), ray, min(ray + 1, 4)}))
    return View(
        name,
        body_part,
        math.radians(rotation + rng.normal(0, 5)),
        math.radians(flexion + rng.normal(0, 6)),
        math.radians(rng.uniform(0, 22)),
        np.radians(np.abs(rng.normal(0, spread, 5))) * np.array([0.3, 1, 1, 1, 1]),
        np.array(centre),
        fov * rng.uniform(0.86, 1.18),
        math.radians(roll),
        rng.uniform(-0.07, 0.07, 2),
        rays,
    )


def build_skeleton(patient: Patient, view: View) -> list[Tube]:
    """Bones and soft tissue of the limb, before projection (the fingers' curl belongs to the view)."""
    w = patient.wobble

    def bone(name, profile, start, end, radius, i, **more) -> Tube:
        return Tube(
            name, profile, np.array(start, float), np.array(end, float), radius * (1 + 0.07 * w[i % 64]), **more
        )

    tubes = [
        bone("humerus", "humerus", (0.1, -31.3, 0), (0.1, 0.1, 0.1), 1.1, 0, bow=0.15 * w[1], group="upper"),
        bone("ulna", "ulna", (-0.75, -1.7, -0.7), (-1.35, 24.6, -0.4), 0.75, 2, bow=-0.2 + 0.1 * w[3]),
        bone("radius", "radius", (1.25, 0.75, 0.25), (0.55, 25.3, 0), 0.72, 4, bow=0.5 + 0.15 * w[5], cap=0.35),
    ]
    flesh = patient.flesh
    tubes += [
        bone("upper arm", "upper arm", (0, -33.5, 0), (0, 3.0, 0), 4.3 * flesh, 6, soft=True, group="upper", cap=1.0),
        bone("forearm", "forearm", (0, -3.2, 0), (-0.2, 28.5, 0), 4.0 * flesh, 7, soft=True, cap=0.95),
        bone("palm", "palm", (-0.2, 23.5, 0), (-0.05, 37.3, 0), 3.9 * flesh**0.5, 8, soft=True, cap=0.75),
    ]
    tubes += _hand(patient, view, bone)
    if view.body_part in ("shoulder", "humerus"):
        tubes += [
            bone("clavicle", "rod", (0.2, -33.6, 0.5), (-14, -35.5, 2), 0.62, 9, bow=0.9, group="torso"),
            bone("acromion", "rod", (-3.5, -33.0, -2.0), (1.5, -33.3, -0.5), 0.75, 10, group="torso", host=0.4),
            bone("coracoid", "rod", (-4.0, -31.8, 1.0), (-1.9, -30.6, 2.5), 0.55, 11, group="torso", host=0.3),
            bone("scapular spine", "rod", (-10.0, -30.5, -2.5), (-2.2, -32.6, -2.2), 0.42, 12, group="torso", host=0.2),
            bone("glenoid", "carpal", (-2.75, -31.6, -0.3), (-3.0, -28.0, -0.3), 0.75, 13, group="torso", host=0.5),
        ]
    return tubes


def _hand(patient: Patient, view: View, bone) -> list[Tube]:
    w, tubes = patient.wobble, []
    carpals = [
        ("scaphoid", 1.25, 26.9, 1.15, 0.72, 25),
        ("lunate", 0.0, 26.6, 0.85, 0.78, -10),
        ("triquetrum", -1.25, 27.0, 0.85, 0.68, -20),
        ("trapezium", 2.0, 28.3, 0.9, 0.72, 35),
        ("trapezoid", 1.1, 28.55, 0.75, 0.58, 10),
        ("capitate", 0.05, 28.35, 1.25, 0.72, 0),
        ("hamate", -1.05, 28.4, 1.1, 0.8, -15),
        ("pisiform", -1.5, 27.1, 0.5, 0.42, 0),
    ]
    for k, (name, x, y, half, radius, tilt) in enumerate(carpals):
        angle = math.radians(tilt + 8 * w[14 + k])
        step = half * np.array([math.sin(angle), math.cos(angle), 0])
        mid = np.array([x, y, 0.9 if name == "pisiform" else 0.25 * w[22 + k]])
        tubes.append(bone(name, "carpal", mid - step, mid + step, radius, 14 + k, cap=0.55, host=0.15))
    rays = [
        (2.45, 29.0, 38, 0.8, (4.4, 3.1, 2.3)),
        (1.25, 29.7, 9, 0.0, (6.7, 4.1, 2.4, 1.75)),
        (0.35, 29.8, 2, 0.0, (6.5, 4.5, 2.8, 1.85)),
        (-0.5, 29.7, -5, 0.0, (5.8, 4.2, 2.7, 1.85)),
        (-1.3, 29.5, -13, 0.1, (5.3, 3.3, 2.0, 1.7)),
    ]
    for r, (x, y, fan, z, lengths) in enumerate(rays):
        at, bend = np.array([x, y, z]), 0.0
        fan = math.radians(fan + 3 * w[30 + r])
        knuckle = at
        for k, length in enumerate(lengths):
            thumb = r == 0
            kind = "metacarpal" if k == 0 else ("tip" if k == len(lengths) - 1 else "phalanx")
            bend += 0 if k == 0 else view.curl[r]
            way = np.array([math.sin(fan) * math.cos(bend), math.cos(fan) * math.cos(bend), math.sin(bend)])
            length = length * (1 + 0.04 * w[35 + r])
            radius = (0.44, 0.40, 0.35, 0.29)[k + (thumb and k == 2)] * (1.12 if thumb else 0.88 if r == 4 else 1.0)
            tubes.append(
                bone(
                    f"{kind} {r}.{k}",
                    kind,
                    at,
                    at + way * length,
                    radius,
                    40 + r + k,
                    cap=0.45,
                    host=0.5 if kind == "tip" else 1.0,
                )
            )
            at = at + way * (length + 0.16)
            if k == 0:
                knuckle = at - way * (2.8 if thumb else 1.0)
            elif k == 1:
                tubes.append(
                    bone(f"digit {r}.1", "rod", knuckle, at, 0.98 * patient.flesh**0.5, 46 + r, soft=True, cap=0.5)
                )
                knuckle = at - way * 0.8
        tubes.append(
            bone(
                f"digit {r}.2", "digit", knuckle, at + way * 0.35, 0.92 * patient.flesh**0.5, 46 + r, soft=True, cap=0.7
            )
        )
    return tubes


@cache
def profile(name: str) -> tuple[np.ndarray, ...]:
    """Stations in [0, 1] and the three half-widths there, smoothed."""
    stations = np.array(_PROFILES[name])
    u = np.linspace(0, 1, STATIONS)
    kernel = np.hanning(41) / np.hanning(41).sum()
    rough = (np.interp(u, stations[:, 0], stations[:, k]) for k in (1, 2, 3))
    return u, *(np.convolve(np.pad(p, 20, "edge"), kernel, "valid") for p in rough)
