"""The predictions of a data set: the JSON lines that `scaphoid-predict` wrote, joined with the data set's index."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaphoid.trainer.contracts import PREDICTION_SCHEMA
from scaphoid.trainer.data.index import Index, Radiograph

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A radiograph of the index and what was predicted for it."""

    radiograph: Radiograph
    record: Record

    @property
    def shows_lesion(self) -> bool:
        """Whether it counts for localisation: abnormal, with a lesion known to be visible."""
        return bool(self.radiograph.label and self.radiograph.boxes)

    @property
    def box(self) -> Sequence[float]:
        return self._coordinates("box")

    @property
    def main_box(self) -> Sequence[float]:
        return self._coordinates("main_box")

    @property
    def first_stage_only(self) -> bool:
        """Whether a triage's first stage answered alone: there is a probability and no box."""
        return self.record.get("whole") is False

    def _coordinates(self, name: str) -> Sequence[float]:
        return self.record.get(name) or (np.nan,) * 4


def read_predictions(path: Path) -> list[Record]:
    """The records of one JSON-lines file, the last of each image, each stage's probability under the flow's name for
    it. A copy of another image takes over what was predicted for that. Where a triage's first stage answered alone, its
    probability stands for that with parts too. A half-written last line (an interrupted run) is left out. Raises
    ValueError, naming file and line, on anything else that is not a prediction."""
    lines = path.read_text(encoding="utf-8").split("\n")
    if not _is_json(lines[-1]):
        lines.pop()
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _parse(line, f"{path}, line {number}")
            stages = {f"{stage}_probability": value for stage, value in (record.get("stages") or {}).items()}
            if record.get("whole") is False and record.get("parts"):
                stages["probability_with_parts"] = record["probability"]
            found[record["image"]] = record | stages
    if not found:
        raise ValueError(f"{path}: holds no prediction; run scaphoid-predict first")
    originals = (found.get(record.get("duplicate_of") or "", record) for record in found.values())
    return [original | {"image": image} for image, original in zip(found, originals, strict=True)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); write it anew with scaphoid-predict") from None
    schema = record.get("schema") if isinstance(record, dict) else record
    if schema != PREDICTION_SCHEMA:
        raise ValueError(f"{where}: expected schema {PREDICTION_SCHEMA!r}, got {schema!r}")
    if missing := {"image", "status", "flow"} - set(record):
        raise ValueError(f"{where}: a prediction needs {', '.join(sorted(missing))}")
    for name in ("box", "main_box"):
        if record.get(name) is not None and np.shape(record[name]) != (4,):
            raise ValueError(f"{where}: expected {name} as four numbers, got {record[name]}")
    return record


def join(records: Iterable[Record], index: Index) -> tuple[list[Case], list[str]]:
    """Records to radiographs, by the longest ending of the path that the index knows: so a copy of the data set, or its
    twins in another folder, join too. Also returns the images that the index does not know, or knows of another size.
    Raises ValueError when two files join one radiograph."""
    known = {radiograph.image: radiograph for radiograph in index.radiographs}
    cases: dict[str, Case] = {}
    unknown = []
    for record in records:
        parts = Path(record["image"]).resolve().parts
        endings = ("/".join(parts[start:]) for start in range(len(parts)))
        image = next((ending for ending in endings if ending in known), None)
        if image is None or not _same_size(known[image], record):
            unknown.append(record["image"])
        elif image in cases:
            both = f"{cases[image].record['image']} and {record['image']}"
            raise ValueError(f"{both} are both {image} of the index: evaluate one data set's predictions at a time")
        else:
            cases[image] = Case(known[image], record)
    return list(cases.values()), unknown


def _same_size(radiograph: Radiograph, record: Record) -> bool:
    width, height = record.get("width"), record.get("height")
    return not (width and height) or (width, height) == (radiograph.width, radiograph.height)
