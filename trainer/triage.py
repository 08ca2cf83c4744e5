"""Two-call triage: every radiograph gets the first stage, and only those within an uncertainty band the whole flow.

The band is fitted on whole answers about a validation set and then kept. It belongs to the weights that gave them. A
flow skips the steps whose outputs nobody asked for, so the first call costs its stage alone; the second one repeats it,
which the cost counts.

    scaphoid-predict --index DATA --split valid --out valid
    python -m scaphoid.trainer.triage valid/predictions.jsonl --index DATA --split valid --out band.json
    scaphoid-predict --index DATA --split test --triage band.json --out test
"""

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from scaphoid.trainer.band import EVERYBODY, FIRST, NOBODY, Answerer, Band, Fitted, write_band
from scaphoid.trainer.contracts import WINDOWS
from scaphoid.trainer.data.index import Index, read_index
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.journal import weights_of
from scaphoid.trainer.metrics import Estimate, classification_metrics
from scaphoid.trainer.predictions import Case, Record, join, read_predictions

FULL = ("probability_with_parts", "probability")  # the score of a whole answer: the first of them that it has
STEPS = 20


class Scores(NamedTuple):
    """Per image [N]: label (1 abnormal), probability of the first stage and of the whole flow, patient."""

    labels: NDArray[np.int64]
    first: NDArray[np.float64]
    full: NDArray[np.float64]
    patients: NDArray[np.str_]


@dataclass(frozen=True)
class Point:
    """What a band gives: `share` of the images within it, `cost` relative to a whole answer for every image, AUROC of
    the scores that come out."""

    band: Band
    share: float
    cost: float
    auroc: float


def cases_of(records: Sequence[Record], index: Index) -> list[Case]:
    """The images of the index that were answered. Raises ValueError when there is none."""
    cases = [case for case in join(records, index)[0] if case.record["status"] == "ok"]
    if not cases:
        raise ValueError(f"none of the {len(records)} predicted images is in the index below {index.root}")
    return cases


def answerer_of(cases: Sequence[Case]) -> Answerer:
    """Raises ValueError for answers of several flows or weights, or of weights that are not known."""
    found = {(case.record["flow"], weights_of(case.record.get("model_version") or "")) for case in cases}
    (flow, weights), *others = sorted(found)
    if others:
        raise ValueError(
            f"answers of {flow} {weights} and of {' '.join(others[0])}: a band belongs to one; predict anew"
        )
    if not weights:
        raise ValueError("the predictions do not name the weights that gave them: assemble the repository anew")
    return Answerer(flow, weights, cases[0].record.get(FULL[0]) is not None)


def scores_of(cases: Sequence[Case]) -> Scores:
    """Raises ValueError when the flow has no first stage, an image was answered by that alone, or lacks a score."""
    flow = cases[0].record["flow"]
    if flow not in FIRST:
        raise ValueError(f"{flow} has no first stage of its own to ask: expected one of {', '.join(FIRST)}")
    if any(case.record.get("whole") is False for case in cases):
        raise ValueError("these are answers of a triage, which is fitted on whole ones: predict without --triage")
    full = next(name for name in FULL if cases[0].record.get(name) is not None)
    columns = []
    for name in (FIRST[flow], full):
        values = [case.record.get(name) for case in cases]
        if None in values:
            raise ValueError(f"a prediction of {flow} lacks {name}: triage is fitted on whole answers")
        columns.append(np.array(values, np.float64))
    labels = np.array([case.radiograph.label for case in cases], np.int64)
    return Scores(labels, *columns, np.array([case.radiograph.patient for case in cases]))


def estimated_cost(flow: str, parts: bool) -> float:
    """Of a first call relative to a whole answer, by the pixels that the encoders see, a window having a quarter of the
    image's (the default sizes). Decoding is left out."""

    def images(output: str) -> float:
        encoders = [step.stage.name for step in FLOWS[flow].steps_for([output]) if step.stage.kind == "encoder"]
        return sum(WINDOWS / 4 if name == "parts_encoder" else 1 for name in encoders)

    return images(FIRST[flow]) / images(FULL[0] if parts else FULL[1])


def cascade(scores: Scores, band: Band) -> NDArray[np.float64]:
    """The score of every image [N]: the whole flow's within the band, the first stage's outside."""
    return np.where(band.holds(scores.first), scores.full, scores.first)


def point(scores: Scores, band: Band, first_cost: float) -> Point:
    """`first_cost` is that of a first call relative to a whole answer; an image within the band pays for both."""
    share = float(band.holds(scores.first).mean())
    metrics = classification_metrics(scores.labels, cascade(scores, band), resamples=0)
    return Point(band, share, first_cost + share if band != EVERYBODY else 1.0, metrics["auroc"].value)


def bands(scores: Scores, boxes: bool = False, steps: int = STEPS) -> list[Band]:
    """Nested bands around the probability at which the first stage tells the two classes apart best (the largest
    sensitivity + specificity), each with another 1 / `steps` of the images, as many on either side: one number to fit,
    for a free choice of both ends follows the validation set's noise. With `boxes` every band reaches up to 1: whatever
    is more suspicious than its low end has a box. From nobody (not with `boxes`) to everybody."""
    order = np.sort(scores.first)
    negatives, positives = (np.sort(scores.first[scores.labels == label]) for label in (0, 1))
    youden = np.searchsorted(negatives, order) / len(negatives) - np.searchsorted(positives, order) / len(positives)
    centre, last = int(np.argmax(youden)), len(order) - 1
    found = [] if boxes else [NOBODY]
    for step in range(1, steps):
        half = step * len(order) / (2 * steps)
        low, high = centre - half, centre + half
        shift = max(0.0, -low) - max(0.0, high - last)  # at an end of the scale the other side has the rest
        low, high = (int(np.clip(round(edge + shift), 0, last)) for edge in (low, high))
        found.append(Band(float(order[low]), 1.0 if boxes else float(order[high])))
    return [*dict.fromkeys(found), EVERYBODY]


def curve(scores: Scores, first_cost: float, boxes: bool = False, steps: int = STEPS) -> list[Point]:
    """What each of the nested bands gives that costs less than a whole answer, and everybody. Raises ValueError for a
    cost outside (0, 1], or one class alone."""
    if not 0 < first_cost <= 1:
        raise ValueError(f"first_cost: expected more than 0 and at most 1, got {first_cost}")
    if len(np.unique(scores.labels)) < 2:
        raise ValueError("triage is fitted on normal and abnormal images, and one of them is absent")
    points = [point(scores, band, first_cost) for band in bands(scores, boxes, steps)]
    return [each for each in points if each.cost < 1 or each.band == EVERYBODY]


def fit(
    scores: Scores, first_cost: float, max_loss: float = 0.0, budget: float | None = None, boxes: bool = False
) -> Point:
    """The cheapest band whose AUROC is at most `max_loss` below that of a whole answer for every image; or, with a
    `budget`, the best AUROC at a cost of at most that. Raises ValueError for a budget below the first call's cost, or a
    negative loss."""
    if not max_loss >= 0:
        raise ValueError(f"max_loss: expected an AUROC of 0 or more, got {max_loss}")
    points = sorted(curve(scores, first_cost, boxes), key=lambda each: each.cost)
    if budget is not None:
        affordable = [each for each in points if each.cost <= budget]
        if not affordable:
            raise ValueError(f"budget: nothing costs {budget} or less; the cheapest band costs {points[0].cost:.3f}")
        return max(affordable, key=lambda each: (each.auroc, -each.cost))
    whole = next(each for each in points if each.band == EVERYBODY)
    return next(each for each in points if each.auroc >= whole.auroc - max_loss)


@dataclass(frozen=True)
class Arguments:
    """Fit a triage band on the whole answers about a validation set, for `scaphoid-predict --triage`.

    Outside the band an image gets the first stage alone: a probability and no box. Of all bands tried, the cheapest is
    taken whose AUROC on these images is as good as that of whole answers for every image (--max-loss: almost as good;
    --budget: the best for a mean cost). Judge it on other images: predict those with --triage, then scaphoid-evaluate.
    """

    predictions: tyro.conf.Positional[Path]
    """predictions.jsonl of scaphoid-predict without --triage."""
    index: Path
    """index.csv of the validation set, or its folder."""
    split: str | None = None
    """Only the images of this split."""
    out: Path = Path("band.json")
    """The band; a picture of cost against AUROC goes beside it (band.png)."""
    max_loss: float = 0.0
    """AUROC that may be lost."""
    budget: float | None = None
    """In place of --max-loss: the mean cost of an image, relative to a whole answer."""
    boxes: bool = False
    """Everything above the band gets the whole answer too, for its box."""
    first_cost: float | None = None
    """Of the first stage alone, relative to a whole answer, as scaphoid-bench triage measures it. Estimated from the
    pixels that the encoders see when not given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr when nothing can be fitted."""
    description = f"{inspect.cleandoc(Arguments.__doc__ or '')}\n\n{inspect.cleandoc(__doc__ or '')}"
    arguments = tyro.cli(Arguments, args=argv, prog="python -m scaphoid.trainer.triage", description=description)
    try:
        _fit(arguments)
    except (ValueError, OSError) as error:
        print(f"triage: {error}", file=sys.stderr)
        return 2
    return 0


def _fit(arguments: Arguments) -> None:
    picture = arguments.out.with_suffix(".png")
    if picture == arguments.out:
        raise ValueError(f"--out {arguments.out}: expected a name for the band's JSON; its picture takes {picture}")
    index = read_index(arguments.index)
    if arguments.split is not None:
        index = index.where(split=arguments.split)
    cases = cases_of(read_predictions(arguments.predictions), index)
    answerer, scores = answerer_of(cases), scores_of(cases)
    cost = estimated_cost(answerer.flow, answerer.parts) if arguments.first_cost is None else arguments.first_cost
    points = curve(scores, cost, arguments.boxes)
    found = fit(scores, cost, arguments.max_loss, arguments.budget, arguments.boxes)
    if found.band == EVERYBODY:  # who uses it would ask twice about every image
        raise ValueError(_no_band(arguments, points, cost))
    fitted = Fitted(found.band, answerer, validation_of(scores, found, cost))
    write_band(arguments.out, fitted)
    draw({"validation": scores}, points, found.band, cost, picture)
    _tell(arguments, fitted, scores, cases[0].record.get("threshold", 0.5))
    print(f"{arguments.out} and {picture}: scaphoid-predict --triage {arguments.out} uses the band")


def _no_band(arguments: Arguments, points: Sequence[Point], first_cost: float) -> str:
    """Why whole answers for every image were the choice among `points`, and what to do."""
    if len(points) == 1:
        reason = f"no band costs less than whole answers: a first call is {first_cost:.2f} of one"
        reason += ", and with --boxes all above a band are asked twice" if arguments.boxes else ""
        instead = ", or fit without --boxes" if arguments.boxes else ""
    elif arguments.budget is not None:
        reason = f"whole answers are within --budget {arguments.budget:g}, and no band is better than they are"
        instead = ", or give a budget below 1"
    else:
        reason = f"no band that costs less than whole answers loses {arguments.max_loss:g} of AUROC or less"
        instead = ", or allow more with --max-loss"
    return f"{reason}; predict without --triage{instead}"


def draw(sets: Mapping[str, Scores], points: Sequence[Point], fitted: Band, first_cost: float, path: Path) -> None:
    """A picture of cost against AUROC: the bands of `points` on each of the named `sets`."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, scores in sets.items():
        found = [point(scores, each.band, first_cost) for each in points if each.band != EVERYBODY]
        (line,) = axes.plot([each.cost for each in found], [each.auroc for each in found], ".-", label=name)
        whole, mark = point(scores, EVERYBODY, first_cost), point(scores, fitted, first_cost)
        axes.plot(whole.cost, whole.auroc, "s", color=line.get_color(), label=f"whole answers, {name.split(',')[0]}")
        axes.plot(mark.cost, mark.auroc, "o", color=line.get_color(), fillstyle="none", markersize=11)
    axes.axvline(1, color="0.8", zorder=0)
    axes.set(xlabel="cost of an image, relative to a whole answer", ylabel="AUROC")
    axes.legend(fontsize="small", frameon=False, title="ring: the fitted band", title_fontsize="small")
    axes.grid(color="0.92")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def validation_of(scores: Scores, found: Point, first_cost: float) -> dict[str, Any]:
    """How a band did on the images that it was fitted on."""
    whole = point(scores, EVERYBODY, first_cost).auroc
    about = {"share": found.share, "cost": found.cost, "auroc": found.auroc, "auroc_of_whole_answers": whole}
    return {"images": len(scores.labels), "first_cost": first_cost, **about}


def _tell(arguments: Arguments, fitted: Fitted, scores: Scores, threshold: float) -> None:
    """The band between its alternatives, as a table."""
    cost = fitted.validation["first_cost"]
    names = ("AUROC", "sensitivity", "specificity")
    table = Table("", "asked twice", "cost", *names, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title = f"{fitted.answerer.flow} {fitted.answerer.weights}, {len(scores.labels)} images it was fitted on"
    for name, band in {
        "first stage alone": NOBODY,
        f"band {fitted.band}": fitted.band,
        "whole answers": EVERYBODY,
    }.items():
        each = point(scores, band, cost)
        metrics = classification_metrics(scores.labels, cascade(scores, band), scores.patients, threshold)
        twice = "-" if band == EVERYBODY else f"{100 * each.share:.0f} %"
        table.add_row(name, twice, f"{each.cost:.2f}", *(_shown(metrics[metric.lower()]) for metric in names))
    Console().print(table)
    origin = "estimated from the encoders' pixels" if arguments.first_cost is None else "as given"
    print(f"cost: of an image, relative to a whole answer for every image; a first call is {cost:.2f} ({origin})")
    called = cascade(scores, fitted.band) >= threshold
    boxless = int((called & ~fitted.band.holds(scores.first)).sum())
    hint = "" if arguments.boxes else "; with --boxes all above the band do"
    print(f"{boxless} of the {int(called.sum())} images called abnormal with the band get no box{hint}")
    print(f"sensitivity and specificity at the threshold {threshold:g}; below, 95 % intervals, patients resampled")


def _shown(estimate: Estimate) -> str:
    interval = "" if math.isnan(estimate.low) else f"\n[dim]{estimate.low:.3f}-{estimate.high:.3f}[/dim]"
    return f"{estimate.value:.3f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
