"""Figures of an evaluation, as PNG files: ROC, calibration, learning curves, PCL by lesion size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from scaphoid.trainer.localization import IOU_THRESHOLDS
from scaphoid.trainer.metrics import Estimate

Scores = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""Per score: labels [N] and probabilities [N]."""

BINS = 10


def roc(scores: Scores, path: Path) -> None:
    """ROC curve of every score; scores that have one class only are left out."""
    figure, axes = _square("1 - specificity", "sensitivity")
    for name, (labels, probabilities) in scores.items():
        if len(np.unique(labels)) == 2:
            false_positive, true_positive, _ = roc_curve(labels, probabilities)
            auroc = roc_auc_score(labels, probabilities)
            axes.plot(false_positive, true_positive, label=f"{_words(name)} ({auroc:.3f})", clip_on=False)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", zorder=0)
    _finish(figure, axes, path, "lower right", "AUROC")


def calibration(scores: Scores, path: Path) -> None:
    """Share of abnormal images against the mean probability, in up to ten equally filled bins of every score."""
    figure, axes = _square("mean predicted probability", "share of abnormal images")
    for name, (labels, probabilities) in scores.items():
        if len(np.unique(labels)) == 2:
            share, mean = calibration_curve(labels, probabilities, n_bins=BINS, strategy="quantile")
            brier = brier_score_loss(labels, probabilities)
            axes.plot(mean, share, marker="o", markersize=3, label=f"{_words(name)} ({brier:.3f})", clip_on=False)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", zorder=0)
    _finish(figure, axes, path, "upper left", "Brier score")


def learning_curves(curves: Mapping[str, Sequence[tuple[int, Estimate]]], path: Path, metric: str = "AUROC") -> None:
    """A metric and its interval against the number of training images, a curve for each method."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({images for points in curves.values() for images, _ in points})
    for shift, (name, points) in enumerate(curves.items()):
        images = np.array([images for images, _ in points]) * 1.02**shift  # so that intervals do not hide each other
        estimates = [estimate for _, estimate in points]
        axes.errorbar(
            images,
            [one.value for one in estimates],
            yerr=_error_bars(estimates),
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.set(xscale="log", xlabel="training images", ylabel=f"{metric}, 95 % interval")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.grid(axis="y", color="0.9")
    _finish(figure, axes, path, "lower right")


def pcl_by_size(localization: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """PCL of every method at each IoU threshold, by lesion size: `localization` as `scaphoid.trainer.evaluate`
    reports it."""
    groups = {name: group for name, group in localization.items() if group["image"]}
    methods = list(next(iter(groups.values()))["methods"]) if groups else []
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    width = 0.85 / max(len(methods), 1)
    for axes, threshold in zip(figure.subplots(1, len(IOU_THRESHOLDS), sharey=True), IOU_THRESHOLDS, strict=True):
        for i, method in enumerate(methods):
            estimates = [group["methods"][method][f"pcl_{threshold}"] for group in groups.values()]
            at = np.arange(len(groups)) + (i - (len(methods) - 1) / 2) * width
            axes.bar(
                at,
                [one.value for one in estimates],
                width,
                yerr=_error_bars(estimates),
                label=method,
                error_kw={"elinewidth": 0.8, "ecolor": "0.25"},
            )
        axes.set_xticks(range(len(groups)), [f"{name}\n({group['image']})" for name, group in groups.items()])
        axes.set(title=f"IoU >= {threshold}", ylim=(0, 1.02))
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("PCL, 95 % interval")
    if methods:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _square(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return figure, axes


def _finish(
    figure: Figure, axes: Axes, path: Path, corner: Literal["lower right", "upper left"], title: str = ""
) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=corner, title=title, fontsize="small", title_fontsize="small", frameon=False)
    else:
        axes.text(0.5, 0.5, "needs normal and abnormal images", ha="center", transform=axes.transAxes)
    figure.savefig(path, dpi=150)


def _error_bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """Distances [2, n] below and above the values; 0 where there is no interval."""
    bars = [(one.value - one.low, one.high - one.value) for one in estimates]
    return np.maximum(np.nan_to_num(np.array(bars).T.reshape(2, -1)), 0)


def _words(name: str) -> str:
    return name.replace("_", " ")
