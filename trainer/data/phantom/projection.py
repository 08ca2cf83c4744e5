"""What one view sees of a patient's limb: centimetres in three dimensions to pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from scaphoid.trainer.data.phantom.anatomy import STATIONS, Patient, Tube, View, build_skeleton, profile


@dataclass
class Projected:
    """A tube as one view sees it: pixels, and profiles sampled at STATIONS points along the axis."""

    tube: Tube
    start: np.ndarray  # [2] pixels (x, y)
    end: np.ndarray
    side: float  # +1 or -1: which way the lateral half lies
    half: np.ndarray  # half-width
    shift: np.ndarray  # sideways offset of the centre line
    depth: np.ndarray  # half-depth over half-width
    pixels_per_cm: float
    wall: np.ndarray = field(default_factory=lambda: np.zeros(0))  # cortical thickness, pixels

    @property
    def length(self) -> float:
        return float(np.hypot(*(self.end - self.start)))


def shown(tube: Tube, view: View) -> bool:
    """A finger radiograph shows its rays, and no more than the knuckles of the palm."""
    if view.rays is None:
        return True
    ray = int(tube.name.split()[1][0]) if tube.name[-2:-1] == "." else None
    return ray in view.rays or (ray is None and tube.name == "palm" and len(view.rays) > 1)


class Camera:
    """Projects points of the limb (cm) to pixels (x, y) of an image of `size` x `size`."""

    def __init__(self, patient: Patient, view: View, size: int) -> None:
        self.patient, self.view, self.size = patient, view, size
        self.pixels_per_cm = size / view.field_of_view * patient.size
        self.side = -1.0 if patient.mirrored else 1.0
        if view.rays is not None:
            tubes = build_skeleton(patient, view)
            ray = view.rays[len(view.rays) // 2] if len(view.rays) != 2 else view.rays[0]
            last = [t for t in tubes if t.name.startswith(("phalanx", "tip")) and f" {ray}." in t.name]
            self.centre = (self._turn(last[0].start, "lower") + self._turn(last[-1].end, "lower")) / 2
        else:
            self.centre = self._turn(np.array([*view.centre, 0.0]), "fixed")

    def _turn(self, point: np.ndarray, group: str) -> np.ndarray:
        c, s = math.cos(self.view.rotation), math.sin(self.view.rotation)
        x, y, z = point
        flat = np.array([x * c + z * s, y])
        if group == "lower":
            return _rotate(flat, self.view.flexion)
        if group == "torso":
            head = np.array([0.0, -30.0])
            return head + _rotate(flat - head, self.view.abduction)
        return flat

    def __call__(self, point: np.ndarray, group: str) -> np.ndarray:
        flat = (self._turn(point, group) - self.centre) * self.pixels_per_cm
        turned = _rotate(flat * np.array([self.side, 1.0]), self.view.roll)
        return turned + (0.5 + self.view.offset) * self.size

    def sees(self, tube: Tube) -> bool:
        """False where the tube lies outside the image for certain."""
        ends = np.stack([self(tube.start, tube.group), self(tube.end, tube.group)])
        margin = (3 * tube.radius + abs(tube.bow)) * 1.2 * self.pixels_per_cm
        return bool((ends.max(0) > -margin).all() and (ends.min(0) < self.size + margin).all())

    def project(self, tube: Tube) -> Projected:
        start, end = self(tube.start, tube.group), self(tube.end, tube.group)
        u, medial, lateral, deep = profile(tube.profile)
        c, s = math.cos(self.view.rotation) ** 2, math.sin(self.view.rotation) ** 2
        left, right = np.sqrt(medial**2 * c + deep**2 * s), np.sqrt(lateral**2 * c + deep**2 * s)
        scale = tube.radius * self.pixels_per_cm * (1.0 if tube.soft else self.patient.robust)
        half = (left + right) / 2 * scale
        depth = np.sqrt(((medial + lateral) / 2) ** 2 * s + deep**2 * c) / ((left + right) / 2)
        length = max(float(np.hypot(*(end - start))), 1.0)
        for edge, distance in ((half[0], u), (half[-1], 1 - u)):  # round the ends
            reach = np.clip(distance * length / max(tube.cap * edge, 1e-3), 0, 1)
            half = half * np.sqrt(1 - (1 - reach) ** 2)
        across = (right - left) / 2 * scale + tube.bow * self.pixels_per_cm * math.cos(self.view.rotation) * 4 * u * (
            1 - u
        )
        shaft = np.exp(-(((u - 0.5) / 0.33) ** 2) * 1.6) if tube.profile != "carpal" else np.full(STATIONS, 0.25)
        wall = scale * self.patient.cortex * (0.28 + 0.95 * shaft)
        return Projected(tube, start, end, self.side, half, across, depth, self.pixels_per_cm, wall)


def _rotate(point: np.ndarray, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([c * point[0] - s * point[1], s * point[0] + c * point[1]])


def deformed(bone: Projected, half: np.ndarray, wall: np.ndarray, depth: np.ndarray) -> Projected:
    """The same bone with another outline (an expansile lesion)."""
    return replace(bone, half=half, wall=wall, depth=depth)
