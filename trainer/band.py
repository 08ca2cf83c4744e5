"""The band of a two-call triage, which triage.py fits, and the file that carries it to who asks. Needs numpy alone."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaphoid.trainer.journal import weights_of

SCHEMA = "scaphoid.band/1"
FIRST = {"msfm": "main_probability", "msfm_fma": "main_probability"}
"""The output of each flow that its first stage gives. KALM's comes out of its last step, after both CNNs: nothing would
be saved."""


class Band(NamedTuple):
    """First-stage probabilities from `low` to `high`, both included, are uncertain; none are when `low` > `high`."""

    low: float
    high: float

    def holds(self, probability: ArrayLike) -> NDArray[np.bool_]:
        probability = np.asarray(probability)
        return (probability >= self.low) & (probability <= self.high)

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}" if self.low <= self.high else "that holds nobody"


NOBODY, EVERYBODY = Band(1.0, 0.0), Band(0.0, 1.0)


class BandError(ValueError):
    """A band that cannot be used. One line: which, what was expected, and what to do."""


class Answerer(NamedTuple):
    """Who gave the answers that a band is fitted on, which it is worth something for: the flow, the hash of its
    weights, and whether the parts were classified."""

    flow: str
    weights: str
    parts: bool


@dataclass(frozen=True)
class Fitted:
    """What a band file holds; `validation` tells a reader how the band was found."""

    band: Band
    answerer: Answerer
    validation: Mapping[str, Any]

    def check_asked(self, flow: str, parts: bool) -> None:
        """Raises BandError for another flow, or with parts instead of without."""
        fitted_on, have = self.answerer, {True: "with parts", False: "without parts (--no-parts)"}
        if flow != fitted_on.flow:
            raise BandError(f"the band was fitted on {fitted_on.flow}, not {flow}: ask that flow, or take another band")
        if parts != fitted_on.parts:
            raise BandError(f"the band was fitted on answers {have[fitted_on.parts]}, not {have[parts]}: ask alike")

    def check_weights(self, model_version: str) -> None:
        """Raises BandError unless the version, `1@3f2a9c1b`, is of the weights that the band was fitted on."""
        weights = weights_of(model_version)
        if weights != self.answerer.weights:
            raise BandError(
                f"the band was fitted on weights {self.answerer.weights}, the server's are {weights or 'not told'}: "
                "fit one on their answers (python -m scaphoid.trainer.triage --help)"
            )


def write_band(path: Path, fitted: Fitted) -> None:
    content = {"schema": SCHEMA, **fitted.answerer._asdict(), **fitted.band._asdict(), "validation": fitted.validation}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_band(path: Path) -> Fitted:
    """Raises BandError for a file that holds no band, OSError when it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}, expected {SCHEMA!r}")
        ends, validation = (content["low"], content["high"]), content.get("validation")
        if not all(type(end) in (int, float) and 0 <= end <= 1 for end in ends):
            raise ValueError(f"low and high: expected probabilities, got {reprlib.repr(ends)}")
        band = Band(*map(float, ends))
        if band.low > band.high and band != NOBODY:
            raise ValueError(f"low {band.low} is above high {band.high}")
        answerer = Answerer(content["flow"], content["weights"], content["parts"])
        if answerer.flow not in FIRST:
            raise ValueError(f"flow {reprlib.repr(answerer.flow)}: expected one of {', '.join(FIRST)}")
        if not isinstance(answerer.weights, str) or not answerer.weights:
            raise ValueError(f"weights: expected their hash, got {reprlib.repr(answerer.weights)}")
        if not isinstance(answerer.parts, bool):
            raise ValueError(f"parts: expected true or false, got {reprlib.repr(answerer.parts)}")
        if not isinstance(validation or {}, dict):
            raise ValueError(f"validation: expected an object, got {reprlib.repr(validation)}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BandError(f"{path} is no band that python -m scaphoid.trainer.triage wrote ({reason}): fit it") from None
    return Fitted(band, answerer, validation or {})
