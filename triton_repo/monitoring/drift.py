"""Have the radiographs changed? Served predictions beside the model's own on the images of its gate.

    scaphoid-serve drift repository predictions/*/predictions.jsonl

The population stability index of a quantity is the sum over bins of (found - expected) * ln(found / expected), of the
shares of predictions in the bins of the reference (export/reference.py, in the manifest). Predictions come from the
journals that scaphoid-predict, scaphoid-edge and the client write: the only place that exists with every server, the
vendor's native backends included, into which nothing of ours can be hooked, and that names the weights.
"""

import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaphoid.export.reference import ACTIVATION, histogram
from scaphoid.trainer.contracts import MARGIN, PREDICTION_SCHEMA, PROBABILITY
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.journal import weights_of
from scaphoid.triton_repo.versioning.versions import weights_hash

WINDOW = 1000  # the latest predictions, of a flow and its weights, that are judged
MODERATE, LARGE = 0.1, 0.25  # the usual bounds of the index
ONE_IN_100 = 2.3263  # standard deviations: exceeded by chance in one case of a hundred
STATUSES = ("ok", "rejected", "failed")
VERSION = re.compile(r"[A-Za-z0-9_.@-]{0,64}")  # empty: no server saw the image
MOST_WATCHED = 32  # flows and weights at once: each is some twenty series in Prometheus
STEPS = tuple(step / 10 for step in range(1, 11))  # upper bounds of the histogram of probabilities


@dataclass(frozen=True)
class Drift:
    """One quantity of one flow and its weights. `chance`: what the index exceeds in one case of a hundred although
    nothing changed, for so few predictions and so small a reference."""

    flow: str
    version: str
    quantity: str
    predictions: int
    index: float
    chance: float

    @property
    def verdict(self) -> str:
        if self.index <= max(self.chance, MODERATE):
            return "stable"
        return "drift" if self.index > LARGE else "watch"


def stability(expected: Sequence[int], found: Sequence[int]) -> float:
    """The population stability index of two histograms over the same bins; half a count is added to each bin, so that
    an empty one gives a number. Raises ValueError for different bins."""
    shares = []
    for counts in (expected, found):
        total = sum(counts) + 0.5 * len(counts)
        shares.append([(count + 0.5) / total for count in counts])
    return sum((after - before) * math.log(after / before) for before, after in zip(*shares, strict=True))


def chance(bins: int, expected: int, found: int) -> float:
    """The index that is exceeded in one case of a hundred without any change: about chi-square with `bins` - 1 degrees
    of freedom times (1/expected + 1/found), its quantile by Wilson and Hilferty."""
    if bins < 2 or not expected or not found:
        return math.inf
    freedom = bins - 1
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + ONE_IN_100 * math.sqrt(spread)) ** 3 * (1 / expected + 1 / found)


@dataclass
class Watched:
    """What the journals tell of one flow and its weights."""

    recent: dict[str, deque[float]] = field(default_factory=dict)  # the latest values of every quantity
    probabilities: Counter[float] = field(default_factory=Counter)  # of all so far, by upper bound
    total: float = 0.0


@dataclass
class JournalReader:
    """Follows growing journals: `read` takes what came since the last time. `paths` need not exist yet. `counts` holds
    lines by flow and status, `watched` the flows and weights that were seen last, `MOST_WATCHED` of them."""

    paths: Sequence[Path]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    watched: dict[tuple[str, str], Watched] = field(default_factory=dict)
    _offsets: dict[Path, int] = field(default_factory=dict)

    def read(self) -> None:
        for path in self.paths:
            for line in self._new_lines(path):
                self._count(line)
                self._offsets[path] += len(line)

    def _new_lines(self, path: Path) -> Iterator[bytes]:
        """Those that are complete, from the offset on, which is left where it is."""
        try:
            with path.open("rb") as file:
                offset = self._offsets.get(path, 0)
                file.seek(offset if offset <= path.stat().st_size else 0)  # it was begun anew
                offset, content = file.tell(), file.read()
        except OSError:
            return
        self._offsets[path] = offset
        yield from content[: content.rfind(b"\n") + 1].splitlines(keepends=True)

    def _count(self, line: bytes) -> None:
        """A line that is no prediction is left out: the journal is another program's."""
        try:
            record = json.loads(line)
            flow, status, version = record["flow"], record["status"], str(record["model_version"])
            known = record["schema"] == PREDICTION_SCHEMA and flow in FLOWS and status in STATUSES
            if not known or not VERSION.fullmatch(version):
                return
            triaged = record.get("band") is not None  # its whole answers are the uncertain ones: no sample of all
            values = _quantities(record) if status == "ok" and not triaged else {}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return
        self.counts[flow, status] += 1
        if not values:
            return
        watched = self.watched.pop((flow, version), None) or Watched()
        self.watched[flow, version] = watched  # the last one now
        if len(self.watched) > MOST_WATCHED:
            del self.watched[next(iter(self.watched))]
        for name, value in values.items():
            watched.recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
        probability = values[PROBABILITY.name]
        watched.total += probability
        watched.probabilities[next((step for step in STEPS if probability <= step), STEPS[-1])] += 1

    def drifts(self, references: Mapping[tuple[str, str], Mapping]) -> list[Drift]:
        """Of every flow and version that has a reference (`references_of`)."""
        found = []
        for (flow, version), watched in sorted(self.watched.items()):
            for name, expected in sorted(references.get((flow, weights_of(version)), {}).items()):
                if values := watched.recent.get(name):
                    counts = histogram(values, expected["edges"])
                    total = sum(expected["counts"])
                    limit = chance(len(counts), total, len(values))
                    index = stability(expected["counts"], counts)
                    found.append(Drift(flow, version, name, len(values), index, limit))
        return found


def _quantities(record: Mapping) -> dict[str, float]:
    """What reference.py watches, of one line of a journal. Raises ValueError for a probability or another number that
    cannot be one."""
    found = {PROBABILITY.name: float(record[PROBABILITY.name]), MARGIN.name: float(record[MARGIN.name])}
    if record.get("windows"):
        found[ACTIVATION] = max(float(window["score"]) for window in record["windows"])
    if not 0 <= found[PROBABILITY.name] <= 1 or not all(map(math.isfinite, found.values())):
        raise ValueError("not a prediction's numbers")
    return found


def references_of(contents: Iterable[Mapping]) -> dict[tuple[str, str], Mapping]:
    """The references of several versions' manifests, by flow and hash of the weights."""
    return {
        (flow, weights_hash(content)): reference
        for content in contents
        for flow, reference in content.get("reference", {}).items()
    }
