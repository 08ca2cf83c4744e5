"""What a study contains before anything is drawn: patient, views, label, lesion.

Everything is a function of (seed, study number, options): how many studies are made, in what order and by how many
processes changes nothing. Patient, views, lesion and label come from separate random streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scaphoid.trainer.data.phantom.anatomy import BODY_PARTS, Patient, View, sample_patient, sample_view
from scaphoid.trainer.data.phantom.lesions import Lesion, sample_lesion

_SPREAD = np.array([0.8191725133961645, 0.6710436067037893, 0.5497004779019703])  # powers of 1/1.22074…: an R3 sequence


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


DEFAULTS = Options()


@dataclass(frozen=True)
class Study:
    """One visit: views of the same bones, with one label and at most one lesion."""

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


def plan_study(seed: int, number: int, options: Options = DEFAULTS) -> Study:
    """What study `number` of the series `seed` contains; cheap, nothing is rendered. Every eighth study is a patient's
    second."""
    again = number % 8 == 7
    patient_number = number - 1 if again else number
    patient = sample_patient(_stream(seed, patient_number, 100))
    study, lesion, views = (_stream(seed, number, k) for k in range(3))
    # Spread evenly over the studies, so that a set of 500 has the intended mix: body part, label, extent of the lesion.
    part, label, extent = (_stream(seed, 0, 101).random(3) + number * _SPREAD) % 1
    body_part = options.body_parts[int(part * len(options.body_parts))]
    count = int(study.choice(4, p=(0.12, 0.3, 0.4, 0.18))) + 1
    names = [str(n) for n in study.permutation(("frontal", "lateral", "oblique"))]
    names = [*names, str(study.choice(("frontal", "oblique")))][:count]
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


def planned_views(seed: int, images: int, options: Options = DEFAULTS) -> Iterator[tuple[Study, int]]:
    """The first `images` views of the series, study by study (the last study may be cut short)."""
    number = 0
    while images > 0:
        study = plan_study(seed, number, options)
        for view in range(min(len(study.views), images)):
            yield study, view
        images -= len(study.views)
        number += 1
