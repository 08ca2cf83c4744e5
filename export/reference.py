"""What a flow answers on the images of the gate, as histograms: the reference that served predictions are held against
to see a drift. Numpy alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaphoid.trainer.contracts import MARGIN, PROBABILITY, WINDOW_SCORES

BINS = 10
ACTIVATION = "activation"  # the highest mean activation inside a window; MSFM alone has windows


def quantities(answers: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """What is watched of a flow's answers (outputs by name, a row for each image): its probability, the activation in
    its best window, and the margin of its decisions on the activation map; a float for each image, [N]."""
    found = {name: np.asarray(answers[name], float).reshape(-1) for name in (PROBABILITY.name, MARGIN.name)}
    if WINDOW_SCORES.name in answers:
        found[ACTIVATION] = np.asarray(answers[WINDOW_SCORES.name], float).max(axis=1)
    return found


def reference(answers: Mapping[str, NDArray]) -> dict[str, dict[str, list]]:
    """Of every quantity its inner deciles, `edges`, and how many values lie between them, `counts`."""
    found = {}
    for name, values in quantities(answers).items():
        values = values[np.isfinite(values)]
        edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS)) if values.size else values
        found[name] = {"edges": edges.tolist(), "counts": histogram(values, edges.tolist())}
    return found


def histogram(values: ArrayLike, edges: Sequence[float]) -> list[int]:
    """How many `values` lie below each edge and, last, above all of them; one on an edge counts below it."""
    places = np.searchsorted(edges, np.asarray(values, float), side="left")
    return np.bincount(places, minlength=len(edges) + 1).tolist()
