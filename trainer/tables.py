"""An evaluation report as tables for a terminal, and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from scaphoid.trainer.metrics import Estimate

TOGETHER = "together"
PARTS_MEAN = "mean of parts"
HEADINGS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "kappa": "kappa",
    "sensitivity": "sensit.",
    "specificity": "specif.",
    "jpe": "JPE",
    "pcl_0.3": "PCL 0.3",
    "pcl_0.5": "PCL 0.5",
    "pcl_0.7": "PCL 0.7",
    "mean_iou": "mean IoU",
    "max_box_acc_v2": "MaxBox",
    "centre_hit": "centre hit",
    "pointing": "pointing",
}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report as tables: scores side by side, the flow's probability per body part, localisation, sizes, twins."""
    scores, shown = report["classification"], []
    for level in ("image", "study"):
        rows = {name: groups[level][TOGETHER] for name, groups in (scores | report["beside"]).items()}
        shown.append(_table(f"Scores, per {level}, all body parts", rows, level))
        if "probability" in scores:
            shown.append(_table(f"probability, per {level}", scores["probability"][level], level))
    for group, found in report["localization"].items():
        rows = {method: {"metrics": metrics} for method, metrics in found["methods"].items()}
        of = "" if group == TOGETHER else f" of {group} lesions"
        misses = f", {found['without box']} without a box, which are misses" if found["without box"] else ""
        shown.append(_table(f"Localisation{of}: {found['image']} radiographs{misses}", rows))
    if report["twins"]:
        twins = dict(report["twins"])
        rows = {name.replace("_", " "): {"metrics": {"estimate": twins[name]}} for name in twins if name != "image"}
        shown.append(_table(f"Lesion removed: {twins['image']} pairs, drop of the probability", rows))
    return shown


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], level: str = "") -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title), box=box.SIMPLE_HEAD, padding=0)
    metrics = [
        name
        for name in next(iter(rows.values()), {"metrics": {}})["metrics"]
        if not all(np.isnan(row["metrics"][name].value) for row in rows.values())
    ]
    table.add_column("", min_width=15)
    for name in metrics:
        table.add_column(HEADINGS.get(name, name), justify="right", no_wrap=True)
    for name, row in rows.items():
        count = f"\n[dim]{row['abnormal']}/{row[level]} abnormal[/dim]" if level in row else ""
        cells = (_cell(row["metrics"][metric]) for metric in metrics)
        table.add_row(name.replace("_", " ") + count, *cells)
    return table


def _cell(estimate: Estimate) -> str:
    if np.isnan(estimate.value):
        return "-"
    interval = "" if np.isnan(estimate.low) else f"\n[dim]{_short(estimate.low)}, {_short(estimate.high)}[/dim]"
    return f"{estimate.value:.3f}{interval}"


def _short(value: float) -> str:
    """Two digits without the leading zero; a whole number without digits."""
    text = f"{value:.2f}".rstrip("0").rstrip(".") if round(value, 2) in (-1, 0, 1) else f"{value:.2f}"
    return text.replace("0.", ".", 1)


def reasons(report: Any) -> list[str]:
    """Why values are missing: every reason in the report, once."""
    if isinstance(report, Estimate):
        return [report.reason] if np.isnan(report.value) and report.reason else []
    values = report.values() if isinstance(report, Mapping) else ()
    return list(dict.fromkeys(reason for value in values for reason in reasons(value)))


def as_json(report: Mapping[str, Any]) -> str:
    """The report as JSON; NaN is null."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        return None if isinstance(value, float) and np.isnan(value) else value

    return json.dumps(plain(report), indent=2, allow_nan=False)
