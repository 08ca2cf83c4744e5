"""The gate's report to read: tables for a terminal and for `parity.md`, from the same rows."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from scaphoid.export.manifest import FIGURES
from scaphoid.export.markdown import table as markdown_table

SCORE_NAMES = {
    "auroc": "AUROC",
    "kappa": "kappa",
    "auroc_with_parts": "AUROC with parts",
    "kappa_with_parts": "kappa with parts",
    "centre_hit": "box centre in lesion",
}


class Rows(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def verdict(report: dict) -> str:
    """One line: passed or not, on what."""
    images = report["images"]
    known = f" ({images['abnormal']} abnormal, {images['patients']} patients)" if images["patients"] else ""
    outcome = "passed" if report["passed"] else f"FAILED ({len(report['failures'])} findings)"
    return f"{outcome}: {images['count']} {images['origin']}{known}, against eager fp32 on {report['cpu']}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def rounds(quantized: Mapping) -> Rows:
    """What quantising did to one model: a round each, the last one being the result."""
    total = sum(quantized["layers"].values())
    images = f"{quantized['calibration_images']} calibration and {quantized['validation_images']} validation images"
    return Rows(
        f"int8 of flow {quantized['flow']} beside fp32, {images}",
        ("int8 layers", "AUROC", "kappa", "probability", "median IoU", "5th percentile"),
        [
            (
                f"{total - sum(map(len, each['fp32_layers'].values()))} of {total}",
                *(f"{each[name]:.4f}" for name in FIGURES),
            )
            for each in quantized["rounds"]
        ],
    )


def _all_rows(report: dict) -> Iterator[Rows]:
    yield from map(rounds, report["quantization"])
    flows = report["flows"]
    names = [
        (each["flow"], f"{each['engine']} {each['precision']}" + (f", {each['note']}" if each["note"] else ""))
        for each in flows
    ]
    yield Rows(
        "Flows",
        ("flow", "engine", "largest probability difference", "mean", "verdicts flipped", "images beyond", ""),
        [
            (
                *name,
                _figure(
                    max((p["largest"] for p in each["probability"].values() if p["largest"] is not None), default=0)
                ),
                _figure(each["probability"]["probability"]["mean"]),
                str(each["verdict_flips"]),
                str(each["beyond"]),
                "FAILED" if each["failures"] else "passed",
            )
            for name, each in zip(names, flows, strict=True)
        ],
    )
    yield Rows(
        "Boxes",
        ("flow", "engine", "box", "largest difference (pixels)", "within 1 pixel", "IoU median", "5th percentile"),
        [
            (*name, box, *(_figure(values[key]) for key in BOX_FIGURES))
            for name, each in zip(names, flows, strict=True)
            for box, values in each["boxes"].items()
        ],
    )
    yield Rows(
        "Scores (difference with a 95 % interval, patients resampled)",
        ("flow", "engine", "score", "eager", "engine's", "difference", "interval"),
        [
            (
                *name,
                SCORE_NAMES[score],
                _figure(values["eager"]),
                _figure(values["engine"]),
                _figure(values["difference"]),
                f"{_figure(values['low'])} to {_figure(values['high'])}",
            )
            for name, each in zip(names, flows, strict=True)
            for score, values in each["scores"].items()
        ],
    )
    yield Rows(
        "Images beyond the tolerance, and verdicts that flipped",
        ("flow", "engine", "image", "probability difference", "pixels", "IoU", "margin"),
        [
            (*name, str(one["image"]), *(_figure(one[key]) for key in ("probability", "pixels", "iou", "margin")))
            for name, each in zip(names, flows, strict=True)
            for one in each["images_beyond"]
        ]
        + [
            (
                *name,
                str(one["image"]),
                f"verdict: {one['eager']:.3g} to {_figure(one['engine'])}",
                "",
                "",
                _figure(one["margin"]),
            )
            for name, each in zip(names, flows, strict=True)
            for one in each["verdicts_flipped"]
        ],
    )
    yield Rows(
        "Stage by stage, on eager's inputs (maps and large logits relative to an image's largest)",
        ("format", "precision", "stage", "output", "largest error", "at most", "mean error", "at most", ""),
        [
            (
                *(row[key] for key in ("format", "precision", "stage", "output")),
                *(_figure(figure) for key in ("largest", "mean") for figure in (row[key], row["at_most"][key])),
                "passed" if row["passed"] else "FAILED",
            )
            for row in report["stages"]
        ],
    )


BOX_FIGURES = ("largest_pixels", "within_1_pixel", "iou_median", "iou_5th_percentile")


def table(rows: Rows) -> Table:
    found = Table(*rows.header, title=rows.title)
    for row in rows.rows:
        found.add_row(*map(escape, row))
    return found


def tables(report: dict) -> Iterator[Table | str]:
    """The report for a terminal."""
    for rows in _all_rows(report):
        if rows.rows:
            yield table(rows)
    yield from report["notes"]
    yield from report["failures"]
    yield verdict(report)


def markdown(report: dict) -> str:
    """The report as `parity.md`."""
    lines = ["# Parity with eager fp32", "", verdict(report), ""]
    lines += [f"- {line}" for line in (*report["notes"], *report["failures"])]
    for title, header, rows in _all_rows(report):
        if rows:
            lines += ["", f"## {title}", "", *markdown_table(header, rows)]
    lines += [
        "",
        "Images are numbered from 1, as they stand in the index. The tolerances are in parity.json.",
    ]
    return "\n".join(lines) + "\n"
