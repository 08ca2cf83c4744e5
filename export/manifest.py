"""What a manifest must hold, checked where one is read: an edited one is refused in a line, before anything is computed
with it.

Whatever is there must be as RULES say; whatever is not is missed by whoever asks for it, since artefacts, repositories
and those of earlier releases hold different parts. Imports nothing heavy.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import le, lt
from pathlib import Path
from typing import Any

from scaphoid.export.precision import HINTS
from scaphoid.trainer.contracts import STAGES, Stage, Tensor
from scaphoid.trainer.flows import FLOWS

REMEDY = "it was edited, or is of another version: export the weights, or assemble the repository, again"
NOTHING = "nothing"
Problem = tuple[str, str, str]  # a key, what was expected of it, what came


class ManifestError(Exception):
    """A folder does not hold what its manifest says. One line: which file, and what to do."""


class Manifest(dict):
    """The parts of the manifest at `path`, by name. One that is asked for and is not there raises ManifestError."""

    def __init__(self, path: Path, parts: Mapping[str, Any]) -> None:
        super().__init__(parts)
        self.path = path

    def __missing__(self, part: str) -> Any:
        raise _error(self.path, (part, _words(RULES[part]) if part in RULES else "a part", NOTHING))


def check(path: Path, parts: Mapping[str, Any]) -> Manifest:
    """The `parts` that were read at `path`. Raises ManifestError, naming the first that is not as it must be."""
    rules = {name: rule for name, rule in _rules(parts).items() if name in parts}
    for problem in _problems(parts, rules, ""):
        raise _error(path, problem)
    more = (_whole(parts), _wiring(parts), _tables(parts), _histograms(parts))
    for problem in chain.from_iterable(more):  # these take for granted what is above
        raise _error(path, problem)
    return Manifest(path, parts)


def _error(path: Path, problem: Problem) -> ManifestError:
    key, expected, got = problem
    return ManifestError(f"{path}: {key}: expected {expected}, got {got}: {REMEDY}")


# A rule is a Value; {key: rule}, an object with at least these keys, but for those of a Maybe (ANY is each that is
# there); [rule], a list of any length; (rule, rule), a list of that length.


@dataclass(frozen=True)
class Value:
    """`words`: what it must be, for an error."""

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """Of a key that may be missing."""

    rule: Any


ANY = "*"
LARGEST = 1e9  # of a number: far above any weight
MOST = 2**16  # of a count: far above any image's side


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST


def _one_of(*known: str) -> Value:
    return Value(f"one of {', '.join(known)}" if len(known) > 1 else known[0], lambda value: value in known)


TEXT = Value("text", lambda value: isinstance(value, str))
BOOLEAN = Value("true or false", lambda value: type(value) is bool)
NUMBER = Value("a number", _is_number)
COUNT = Value("a number from 0", lambda value: type(value) is int and 0 <= value < LARGEST)
SIZE = Value(f"a number from 1 to {MOST}", _is_size)
PROBABILITY = Value("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
SHARE = Value("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
SOME_FLOWS = Value(
    f"some of {', '.join(FLOWS)}, each once",
    lambda value: (
        isinstance(value, list)
        and len(value) > 0
        and all(each in list(FLOWS) for each in value)
        and len(set(value)) == len(value)
    ),
)
UNKNOWN = Value(f"no stage but {', '.join(STAGES)}", lambda value: False)

SETTINGS = {  # of glue stages, which compute without torch with these numbers (edge/glue.py)
    "suppress": {"theta": NUMBER, "r": NUMBER},
    "part_crops": {"shapes": [SIZE], "group_sizes": [SIZE], "kept": [SIZE], "iou_threshold": PROBABILITY},
    "result": {"image_size": SIZE, "gamma": SHARE},
    "key_area_crop": {f"{side}_{what}": [NUMBER] for side in ("height", "width") for what in ("weight", "bias")},
    "key_area_result": {"image_size": SIZE},
}


def _tensor(tensor: Tensor) -> dict:
    """Its contract in numbers: what the contract counts is as many, an image is a square."""

    def fits(dims: Any) -> bool:
        if not isinstance(dims, list) or len(dims) != len(tensor.dims) or not all(map(_is_size, dims)):
            return False
        square = len(dims) < 3 or dims[-1] == dims[-2]
        return square and all(isinstance(dim, str) or dim == real for dim, real in zip(tensor.dims, dims, strict=True))

    words = f"[{', '.join(map(str, tensor.dims))}] in numbers" + (", a square" if len(tensor.dims) > 2 else "")
    return {"name": _one_of(tensor.name), "dtype": _one_of(tensor.dtype), "dims": Value(words, fits)}


def _stage(stage: Stage) -> dict:
    sides = {"inputs": tuple(map(_tensor, stage.inputs)), "outputs": tuple(map(_tensor, stage.outputs))}
    return {"kind": _one_of(stage.kind), **sides, "settings": Maybe(SETTINGS.get(stage.name, {}))}


FIGURES = ("auroc", "kappa", "probability", "iou_median", "iou_p5")  # of each round of quantising (calibration.py)
RULES: dict[str, Any] = {
    "files": {ANY: TEXT},
    "flows": SOME_FLOWS,
    "precision": _one_of(*HINTS),
    "image_size": SIZE,
    "weights": [{"sha256": TEXT, "flows": Maybe([TEXT]), "phantoms": Maybe(TEXT)}],
    "thresholds": {ANY: PROBABILITY},
    "versions": {ANY: TEXT},
    "formats": [TEXT],
    "stages": {name: _stage(stage) for name, stage in STAGES.items()},
    "quantization": [
        {
            **{"flow": TEXT, "calibration_images": SIZE, "validation_images": SIZE, "layers": {ANY: SIZE}},
            "rounds": [{**dict.fromkeys(FIGURES, NUMBER), "fp32_layers": {ANY: [TEXT]}}],
            **dict.fromkeys(("notes", "failures"), Maybe([TEXT])),
        }
    ],
    "parity": {
        **{"passed": BOOLEAN, "failures": [TEXT], "accepted": Maybe(TEXT)},
        "images": Maybe({"origin": Maybe(TEXT)}),
    },
    "reference": {ANY: {ANY: {"edges": [NUMBER], "counts": [COUNT]}}},  # of flows, of quantities (reference.py)
}
OF_REPOSITORIES: dict[str, Any] = {  # what they add, or have otherwise
    "target": _one_of("cpu", "gpu"),
    "precision": _one_of(*HINTS, "f16"),
    "version": SIZE,
    "versions": [SIZE],
    "previous": Value("the number of a version, or null", lambda value: value is None or _is_size(value)),
}


def _rules(parts: Mapping[str, Any]) -> dict[str, Any]:
    """RULES for these `parts`, whose stages must be those of the flows at least."""
    flows, stages = parts.get("flows"), parts.get("stages")
    names = [name for flow in FLOWS if isinstance(flows, list) and flow in flows for name in FLOWS[flow].stages]
    names += stages if isinstance(stages, dict) else ()
    return {
        **RULES,
        **(OF_REPOSITORIES if "version" in parts else {}),
        "stages": {name: RULES["stages"].get(name, UNKNOWN) for name in names},
    }


def _words(rule: Any) -> str:
    if isinstance(rule, Value):
        return rule.words
    if isinstance(rule, tuple):
        return f"a list of {len(rule)}"
    return "an object" if isinstance(rule, dict) else "a list"


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _problems(value: Any, rule: Any, key: str) -> Iterator[Problem]:
    """Every part of `value`, whose place is `key`, that is not as `rule` says."""
    if isinstance(rule, Value):
        fits = rule.fits(value)
    elif isinstance(rule, dict):
        fits = isinstance(value, dict)
    else:
        fits = isinstance(value, list) and (isinstance(rule, list) or len(value) == len(rule))
    if not fits:
        yield key, _words(rule), reprlib.repr(value)
    elif isinstance(rule, dict):
        for name, part in (dict.fromkeys(value, rule[ANY]) if ANY in rule else rule).items():
            place = (f"{key}." if key else "") + _shown(name)
            if name in value:
                yield from _problems(value[name], part.rule if isinstance(part, Maybe) else part, place)
            elif not isinstance(part, Maybe):
                yield place, _words(part), NOTHING
    elif not isinstance(rule, Value):
        for index, each in enumerate(value):
            yield from _problems(each, rule[index if isinstance(rule, tuple) else 0], f"{key}[{index}]")


def _whole(parts: Mapping[str, Any]) -> Iterator[Problem]:
    """What belongs to a part as a whole."""
    for name in parts.get("files", ()):
        if not name.isprintable():
            yield f"files.{_shown(name)}", "a name that can be printed", repr(name)
    if parts.get("weights") == []:
        yield "weights", "one at least", "[]"
    parity = parts.get("parity", {})
    if parity.get("passed") is False and "accepted" not in parity:
        yield "parity.accepted", f"{TEXT.words}, for it did not pass", NOTHING


def _wiring(parts: Mapping[str, Any]) -> Iterator[Problem]:
    """Where a stage's input has other dims than the output that it is: buffers are as large as the one says and are
    read as the other does."""
    for flow in parts.get("flows", ()) if "stages" in parts else ():
        made: dict[str, Any] = {}
        for step in FLOWS[flow].steps:
            stage = parts["stages"][step.stage.name]
            for index, tensor in enumerate(stage["inputs"]):
                dims = made.get(step.inputs[tensor["name"]], tensor["dims"])
                if tensor["dims"] != dims:
                    yield f"stages.{step.stage.name}.inputs[{index}].dims", f"{dims}, as made", str(tensor["dims"])
            made |= {step.outputs[tensor["name"]]: tensor["dims"] for tensor in stage["outputs"]}


def _tables(parts: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings and sizes that do not fit the image, or the map, that they are for."""
    stages, side = parts.get("stages", {}), parts.get("image_size")
    if side and "preprocess" in stages and stages["preprocess"]["outputs"][0]["dims"][-1] != side:
        yield "image_size", str(stages["preprocess"]["outputs"][0]["dims"][-1]), str(side)
    for name, stage in stages.items():
        settings = stage.get("settings", {})
        if side and settings.get("image_size", side) != side:
            yield f"stages.{name}.settings.image_size", str(side), str(settings["image_size"])
        for setting, fits, expected in _lengths(name, stage, settings) if settings else ():
            if not fits:
                yield f"stages.{name}.settings.{setting}", expected, reprlib.repr(settings[setting])


def _histograms(parts: Mapping[str, Any]) -> Iterator[Problem]:
    """References that no histogram of predictions can be held against."""
    for flow, quantities in parts.get("reference", {}).items():
        for name, each in quantities.items():
            place, edges = f"reference.{_shown(flow)}.{_shown(name)}", each["edges"]
            if not all(map(lt, edges, edges[1:])):
                yield f"{place}.edges", "each above the one before", reprlib.repr(edges)
            if len(each["counts"]) != len(edges) + 1:
                yield f"{place}.counts", f"{len(edges) + 1} of them", reprlib.repr(each["counts"])


def _lengths(name: str, stage: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Of the settings that the ops read as tables: name, whether its length fits, what would."""
    if name == "part_crops":
        shapes, groups, kept = (settings[each] for each in ("shapes", "group_sizes", "kept"))
        cells, windows = stage["inputs"][1]["dims"], stage["outputs"][1]["dims"][0]
        yield "shapes", len(shapes) == 2 * sum(groups), "a height and a width for each of group_sizes"
        yield "shapes", all(map(le, shapes, cells * len(shapes))), f"none larger than {cells}"
        yield "kept", len(kept) == len(groups) and sum(kept) == windows, f"one for each group, {windows} in all"
    if name == "key_area_crop":
        height, width = stage["inputs"][1]["dims"]
        for each, many in (("height_weight", height), ("width_weight", width), ("height_bias", 1), ("width_bias", 1)):
            yield each, len(settings[each]) == many, f"{many} of them"
