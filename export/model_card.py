"""MODEL_CARD.md: what the artefacts are, what the weights' metadata tell, and what the gate measured. Nothing else."""

from collections.abc import Iterator, Mapping

from scaphoid.export.artefacts import CONTAINER, PARITY_REPORT, PHANTOMS
from scaphoid.export.markdown import plain, table
from scaphoid.export.parity_report import SCORE_NAMES, verdict
from scaphoid.trainer.flows import FLOWS

SYSTEMS = {
    "kalm": "KALM (ICIP 2020): a global CNN finds the key area, a local CNN looks at it closely.",
    "msfm": "MSFM (ICCV workshop 2023): one encoder looks at the radiograph, at the object in it and at seven windows.",
}


def model_card(content: Mapping, report: Mapping) -> str:
    """The card of artefacts whose manifest says `content` and whose gate said `report`."""
    lines = [
        "# Model card",
        "",
        "**Research use only. Not a medical device.** Weakly supervised detection of abnormality in bone radiographs:",
        "a probability and a box that points to where to look again. No diagnosis; a normal verdict excludes nothing.",
        "",
        "## What it is",
        "",
        *table(
            ("flow", "steps", "outputs"),
            [(name, " -> ".join(FLOWS[name].stages), ", ".join(FLOWS[name].outputs)) for name in content["flows"]],
        ),
        "",
        f"Input: one radiograph, grey, resized to {content['image_size']} x {content['image_size']} pixels. Engines: "
        f"{content['precision']}, formats {', '.join(content['formats'])}.",
    ]
    for origin in content["weights"]:
        lines += ["", *_weights(origin)]
    lines += ["", "## Measured", "", *_measured(report), "", "## Limits", "", *_limits(content)]
    lines += [
        "",
        "## Licence, versions, integrity",
        "",
        f"Code: {content['licence']}. " + ", ".join(f"{name} {each}" for name, each in content["versions"].items()),
        f"(exported with); for GPUs the repository is made for {CONTAINER['image']} {CONTAINER['release']} or later.",
        "",
        "`scaphoid-export verify DIR` holds every file against the manifest's sha256; the server does so at its start.",
    ]
    return "\n".join(lines) + "\n"


def _weights(origin: Mapping) -> Iterator[str]:
    config = origin["config"]
    yield f"## Weights: {plain(origin['file'])}"
    yield ""
    yield SYSTEMS[origin["system"]]
    yield ""
    yield from table(
        ("", ""),
        [
            ("backbone", config["backbone"]),
            ("image size", f"{config['image_size']} pixels"),
            (
                "options",
                ", ".join(f"{key} {value}" for key, value in config.items() if key not in ("backbone", "image_size")),
            ),
            ("training data", _training_data(origin)),
            ("threshold", f"{origin['threshold']:g} ({origin['threshold_from']})"),
            ("calibration", "none: the probability is the softmax's"),
            ("licence", origin["licence"]),
            ("sha256", origin["sha256"]),
        ],
    )


def _training_data(origin: Mapping) -> str:
    if PHANTOMS in origin:
        return f"drawn phantoms, generator {origin[PHANTOMS]}; no patient's radiograph"
    return "not stated in the weights file"


def _measured(report: Mapping) -> Iterator[str]:
    """Scores of eager and of what is served, on the gate's images."""
    yield f"{verdict(report)}. All figures: {PARITY_REPORT}."
    yield from (f"{note}." for note in report["notes"])
    rows = [
        (
            each["flow"],
            f"{each['engine']} {each['precision']}" + (f", {each['note']}" if each["note"] else ""),
            SCORE_NAMES[name],
            *(f"{score[key]:.3f}" if score[key] is not None else "-" for key in ("eager", "engine")),
        )
        for each in report["flows"]
        for name, score in each["scores"].items()
    ]
    if rows:
        yield ""
        yield from table(("flow", "engine", "score", "eager", "engine's"), rows)
    if "index" not in report["images"]["origin"]:
        yield ""
        yield "These images serve to compare engines; on drawn radiographs no figure says anything about patients."


def _limits(content: Mapping) -> Iterator[str]:
    if any(PHANTOMS in each for each in content["weights"]):
        yield "- Weights that learnt from drawn phantoms show on real radiographs that the software runs, no finding."
    yield "- Boxes come from image-level labels. Each has a margin: below the engine's error it may lie elsewhere."
    if content["parity"].get("accepted"):
        yield f"- These artefacts did not pass their gate; they were accepted: {plain(content['parity']['accepted'])}."
