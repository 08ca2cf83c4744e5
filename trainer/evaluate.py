"""`scaphoid-evaluate`: what the predictions of a data set are worth. Joins the JSON lines that `scaphoid-predict`
wrote with the data set's index and reports classification per image and per study, for every score and body part, and
localisation beside its oracle, a random and a centre box.

    scaphoid-evaluate predictions.jsonl --index held_out/index.csv --twins twins.jsonl --out report
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from scaphoid.trainer import figures
from scaphoid.trainer.data.index import Index, read_index
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.localization import (
    SIZES,
    centre_boxes,
    key_area_oracle,
    lesion_size,
    localization_metrics,
    msfm_oracle,
    random_boxes,
)
from scaphoid.trainer.metrics import Estimate, classification_metrics, mean_estimate, median_estimate, study_level
from scaphoid.trainer.predictions import Case, Record, join, read_predictions
from scaphoid.trainer.tables import PARTS_MEAN, TOGETHER, as_json, reasons, tables

SCHEMA = "scaphoid.evaluation/1"


def evaluate(
    index: Index,
    records: Sequence[Record],
    threshold: float | None = None,
    map_size: tuple[int, int] | None = None,
    twins: Sequence[Record] | None = None,
    beside: Mapping[str, Sequence[Record]] | None = None,
) -> dict[str, Any]:
    """The whole report, as nested dicts with an `Estimate` at every leaf that is a metric.

    `threshold` defaults to the one that the predictions were judged by, `map_size` is (rows, columns) of the
    activation map of the run; without it there is no oracle. `twins` are predictions
    of the same radiographs with the lesion removed; `beside` those of other methods, by name. Of a triage every score
    of the whole flow is judged as it was given: the first stage's where that answered alone. Raises ValueError when no
    record is in the index or the records come from several flows or triages.
    """
    cases, unknown = join(records, index)
    if not cases:
        raise ValueError(f"none of the {len(records)} predicted images is in the index below {index.root}")
    flow, predicted = _flow(cases), _predicted(cases)
    first_only = sum(case.first_stage_only for case in predicted)
    threshold = cases[0].record.get("threshold", 0.5) if threshold is None else threshold
    scores = [name for name in FLOWS[flow].outputs if "probability" in name]
    return {
        "schema": SCHEMA,
        "flow": flow,
        "threshold": threshold,
        "counts": {
            **Counter(case.record["status"] for case in cases),
            **({"first stage only": first_only} if first_only else {}),
            "not in the index": len(unknown),
            "not predicted": len(index) - len(cases),
        },
        "classification": {
            score: classification(predicted, score, threshold)
            for score in scores
            if predicted and all(case.record.get(score) is not None for case in predicted)
        },
        "beside": {
            name: classification(_predicted(join(other, index)[0]), "probability", threshold, by_part=False)
            for name, other in (beside or {}).items()
        },
        "localization": localization(cases, flow, map_size, {k: join(v, index)[0] for k, v in (beside or {}).items()}),
        "twins": None if twins is None else twin_drop(predicted, _predicted(join(twins, index)[0])),
    }


def classification(cases: Sequence[Case], score: str, threshold: float, by_part: bool = True) -> dict[str, Any]:
    """{"image" | "study": {body part | "together" | "mean of parts": counts and metrics}} of one score."""
    parts = sorted({case.radiograph.body_part for case in cases}) if by_part else []
    report: dict[str, Any] = {"image": {}, "study": {}}
    for group in (*parts, TOGETHER):
        own = [case for case in cases if group in (TOGETHER, case.radiograph.body_part)]
        labels = [case.radiograph.label for case in own]
        probabilities = [case.record[score] for case in own]
        patients = [case.radiograph.patient for case in own]
        studies = study_level(labels, probabilities, _study_ids(own), patients)
        for level, arrays in (("image", (labels, probabilities, patients)), ("study", studies)):
            report[level][group] = {
                level: len(arrays[0]),
                "abnormal": int(np.sum(arrays[0])),
                "metrics": classification_metrics(*arrays, threshold=threshold),
            }
    for groups in report.values() if len(parts) > 1 else ():
        means = {
            name: Estimate(
                float(np.mean([groups[part]["metrics"][name].value for part in parts])),
                reason="mean over body parts: no interval",
            )
            for name in groups[TOGETHER]["metrics"]
        }
        groups[PARTS_MEAN] = {"metrics": means}
    return report


def localization(
    cases: Sequence[Case], flow: str, map_size: tuple[int, int] | None, beside: Mapping[str, Sequence[Case]]
) -> dict[str, Any]:
    """{"together" | lesion size: {"image": n, "without box": n, "methods": {method: metrics}}} over the abnormal
    radiographs with a visible lesion. Those without a box count as misses: they could not be predicted, or the first
    stage of a triage answered alone."""
    cases = [case for case in cases if case.shows_lesion]
    if not cases:
        return {}
    lesions = [case.radiograph.boxes for case in cases]
    sizes = np.array([(case.radiograph.height, case.radiograph.width) for case in cases], np.float64)
    boxes = np.array([case.box for case in cases], np.float64)
    methods, peaks = {flow: boxes, **_oracles(cases, flow, map_size, boxes, sizes)}, {flow: _peaks(cases)}
    for name, other in beside.items():
        own = {case.radiograph.image: case for case in other}
        found = [own.get(case.radiograph.image, Case(case.radiograph, {})) for case in cases]
        if not np.isnan(boxes_of := np.array([case.box for case in found], np.float64)).all():
            methods[name], peaks[name] = boxes_of, _peaks(found)
    methods["random box"], methods["centre box"] = random_boxes(boxes, sizes), centre_boxes(boxes, sizes)
    size_of = np.array([lesion_size(own, size) for own, size in zip(lesions, sizes, strict=True)])
    report: dict[str, Any] = {}
    for group in (TOGETHER, *SIZES):
        chosen = np.flatnonzero((size_of == group) | (group == TOGETHER))
        own, patients = [lesions[i] for i in chosen], [cases[i].radiograph.patient for i in chosen]
        without = int(np.isnan(boxes[chosen]).any(axis=1).sum())
        report[group] = {"image": len(chosen), "without box": without, "methods": {}}
        for method, found in methods.items() if len(chosen) else ():
            points = peaks.get(method)
            points = None if points is None or np.isnan(points).all() else points[chosen]
            report[group]["methods"][method] = localization_metrics(found[chosen], own, points, patients)
    return report


def _peaks(cases: Sequence[Case]) -> NDArray:
    """Where each map peaks, (x, y) [N, 2]; NaN where the record does not say."""
    return np.array([case.record.get("peak") or (np.nan,) * 2 for case in cases], np.float64)


def twin_drop(cases: Sequence[Case], twins: Sequence[Case]) -> dict[str, Any]:
    """How far the probability falls when the lesion is removed, over the radiographs that show one."""
    without = {twin.radiograph.image: twin.record["probability"] for twin in twins}
    pairs = [case for case in cases if case.shows_lesion and case.radiograph.image in without]
    drops = np.array([case.record["probability"] - without[case.radiograph.image] for case in pairs])
    patients = [case.radiograph.patient for case in pairs]
    return {
        "image": len(pairs),
        "median_drop": median_estimate(drops, patients),
        "mean_drop": mean_estimate(drops, patients),
        "share_that_drops": mean_estimate(drops > 0, patients),
    }


def _oracles(
    cases: Sequence[Case], flow: str, map_size: tuple[int, int] | None, boxes: NDArray, sizes: NDArray
) -> dict[str, NDArray]:
    lesions = [case.radiograph.boxes for case in cases]
    if map_size is None:  # what a method can form at all depends on it
        return {}
    if flow == "kalm":
        extents = boxes[:, 2:] - boxes[:, :2]
        return {"oracle": key_area_oracle(lesions, sizes, map_size, extents)}
    from scaphoid.trainer.stages.part_crops import KEPT, window_groups  # imports torch

    groups = window_groups(*map_size)
    main_boxes = np.array([case.main_box for case in cases], np.float64)
    return {
        "oracle": msfm_oracle(lesions, sizes, map_size, groups, KEPT),
        "oracle in its object box": msfm_oracle(lesions, sizes, map_size, groups, KEPT, object_boxes=main_boxes),
    }


def _flow(cases: Sequence[Case]) -> str:
    flows = sorted({str(case.record.get("flow")) for case in cases})
    if len(flows) > 1 or flows[0] not in FLOWS:
        raise ValueError(f"expected predictions of one flow ({', '.join(FLOWS)}), got {', '.join(flows)}")
    bands = sorted({str(case.record.get("band") or "none") for case in cases})
    if len(bands) > 1:
        raise ValueError(f"expected predictions of one triage or of none, got the bands {', '.join(bands)}")
    return flows[0]


def _predicted(cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if case.record["status"] == "ok"]


def _study_ids(cases: Sequence[Case]) -> list[str]:
    return [f"{one.body_part}/{one.patient}/{one.study}" for one in (case.radiograph for case in cases)]


def draw(cases: Sequence[Case], report: Mapping[str, Any], folder: Path) -> None:
    """ROC, calibration and PCL by lesion size as PNG files in `folder`."""
    labels = [case.radiograph.label for case in cases]
    scores = {name: (labels, [case.record[name] for case in cases]) for name in report["classification"]}
    figures.roc(scores, folder / "roc.png")
    figures.calibration(scores, folder / "calibration.png")
    if report["localization"]:
        figures.pcl_by_size(report["localization"], folder / "pcl_by_size.png")


@dataclass(frozen=True)
class Options:
    """Evaluate predictions: classification per image and study, and localisation beside its oracle.

    Args:
        predictions: JSON lines that scaphoid-predict wrote.
        index: index.csv of the data set, or its folder.
        out: folder for evaluation.json, roc.png, calibration.png and pcl_by_size.png.
        json: print the report as JSON instead of tables.
        threshold: probability from which an image or study is called abnormal (default: the predictions' own).
        map_size: rows and columns of the run's activation map, as the manifest has them; no oracle without.
        twins: predictions of the same radiographs with the lesion removed.
        beside: predictions of other methods (a parameter-randomised model, a baseline), named by their file.
    """

    predictions: tyro.conf.Positional[Path]
    index: Path
    out: Path | None = None
    json: bool = False
    threshold: float | None = None
    map_size: tuple[int, int] | None = None
    twins: Path | None = None
    beside: tuple[Path, ...] = ()


def _check(options: Options) -> None:
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold: expected a probability between 0 and 1, got {options.threshold}")
    if options.map_size is not None and min(options.map_size) < 1:
        raise ValueError(f"--map-size: expected 1 row and 1 column or more, got {options.map_size}")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: {options.out} is a file; the figures need a folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr when the files cannot be used."""
    options = tyro.cli(Options, prog="scaphoid-evaluate", args=arguments)
    try:
        _check(options)
        index, records = read_index(options.index), read_predictions(options.predictions)
        report = evaluate(
            index,
            records,
            options.threshold,
            options.map_size,
            read_predictions(options.twins) if options.twins else None,
            {path.stem: read_predictions(path) for path in options.beside},
        )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "evaluation.json").write_text(as_json(report) + "\n", encoding="utf-8")
            draw(_predicted(join(records, index)[0]), report, options.out)
    except (OSError, ValueError) as error:
        print(f"scaphoid-evaluate: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(as_json(report))
        return 0
    console = Console()
    console.print(f"{report['flow']}, threshold {report['threshold']}:", report["counts"])
    for table in tables(report):
        console.print(table)
    for reason in reasons(report):
        console.print(f"- {reason}")
    if options.out:
        console.print(f"Written to {options.out}: evaluation.json and figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
