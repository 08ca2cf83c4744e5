"""What is bright but no finding: lead letters, rings, snaps and bracelets."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from scaphoid.trainer.data.phantom.projection import Projected

_METAL = 6.0
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_COMPLEX)


@dataclass(frozen=True)
class Artefacts:
    """Whether each kind is shown, and the random stream it is drawn from (the same whether shown or not)."""

    marker: bool
    metal: bool
    seed: int


def sample_artefacts(
    rng: np.random.Generator,
    abnormal: bool,
    marker_fraction: float,
    marker_correlation: float,
    metal_fraction: float,
    metal_correlation: float,
) -> Artefacts:
    """Correlation 0: as often with abnormal as with normal studies. Correlation 1: with abnormal studies always, with
    normal ones never."""

    def probability(base: float, correlation: float) -> float:
        return base + correlation * (1 - base) if abnormal else base * (1 - correlation)

    marker, metal = rng.random(2)
    return Artefacts(
        bool(marker < probability(marker_fraction, marker_correlation)),
        bool(metal < probability(metal_fraction, metal_correlation)),
        int(rng.integers(2**31)),
    )


def draw_artefacts(artefacts: Artefacts, soft: np.ndarray, bones: list[Projected], mirrored: bool) -> np.ndarray:
    """Attenuation of the artefacts, float32 [size, size]; `soft` is the soft tissue's, which letters avoid."""
    size = soft.shape[0]
    out = np.zeros((size, size), np.float32)
    if artefacts.marker:
        _letters(out, soft, mirrored, np.random.default_rng((artefacts.seed, 0)))
    if artefacts.metal:
        _jewellery(out, bones, np.random.default_rng((artefacts.seed, 1)))
    return out


def _letters(out: np.ndarray, soft: np.ndarray, mirrored: bool, rng: np.random.Generator) -> None:
    size = out.shape[0]
    scale = rng.uniform(0.035, 0.075) * size
    text = ("L" if mirrored else "R") + rng.choice(
        ("", "", "", " " + "".join(rng.choice(list("ABCDEFGHJKLMNPSTW"), 2)))
    )
    font, heavy = int(rng.choice(_FONTS)), max(round(scale / 7), 1)
    factor = cv2.getFontScaleFromHeight(font, int(scale), heavy)
    (w, h), _ = cv2.getTextSize(text, font, factor, heavy)
    w, h = w + 2 * heavy + 2, h + 2 * heavy + 2
    stamp = np.zeros((h, w), np.uint8)
    cv2.putText(stamp, text, (heavy, h - heavy - 1), font, factor, 255, heavy, cv2.LINE_AA)
    if rng.random() < 0.2:
        cv2.rectangle(stamp, (0, 0), (w - 1, h - 1), 255, max(heavy // 2, 1))
    stamp = np.rot90(stamp, int(rng.choice((0, 0, 0, 1, 3))))
    if rng.random() < 0.1:
        stamp = stamp[:, ::-1]
    h, w = stamp.shape
    places = [(int(rng.uniform(0.03, 0.95) * (size - w)), int(rng.uniform(0.03, 0.95) * (size - h))) for _ in range(12)]
    x, y = min(places, key=lambda p: float(soft[p[1] : p[1] + h : 4, p[0] : p[0] + w : 4].mean()))
    out[y : y + h, x : x + w] += 3.5 * stamp.astype(np.float32) / 255


def _jewellery(out: np.ndarray, bones: list[Projected], rng: np.random.Generator) -> None:
    size, draws = out.shape[0], rng.random(6)
    mask = np.zeros((size, size), np.uint8)
    rings = [b for b in bones if b.tube.name.startswith("phalanx") and b.tube.name.endswith(".1")]
    if rings and draws[0] < 0.6:  # a ring: a bright band across the finger, rounded
        bone = rings[int(draws[1] * len(rings))]
        axis = (bone.end - bone.start) / max(bone.length, 1)
        centre, half = bone.start + axis * bone.length * (0.35 + 0.3 * draws[2]), 0.95 * bone.pixels_per_cm
        angle = float(np.degrees(np.arctan2(axis[1], axis[0]))) + 90
        axes = (int(half), int(half * (0.1 + 0.25 * draws[3])))
        cv2.ellipse(
            mask,
            tuple(int(c) for c in centre),
            axes,
            angle,
            0,
            360,
            255,
            max(int(0.2 * bone.pixels_per_cm), 2),
            cv2.LINE_AA,
        )
    else:  # a snap or a bead: a small ring, or two, or a row of them (a chain), anywhere
        x, y, r = (0.1 + 0.8 * draws[1]) * size, (0.1 + 0.8 * draws[2]) * size, (0.014 + 0.016 * draws[3]) * size
        for k in range(int(rng.choice((1, 1, 2, 6)))):
            centre = (int(x + 2.3 * r * k * np.cos(6.3 * draws[4])), int(y + 2.3 * r * k * np.sin(6.3 * draws[4])))
            cv2.circle(mask, centre, int(r), 255, -1, cv2.LINE_AA)
            cv2.circle(mask, centre, int(r * 0.55), 120, -1, cv2.LINE_AA)
    out += _METAL * mask.astype(np.float32) / 255
