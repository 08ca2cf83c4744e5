"""The gate that every export passes: all exported files, and every flow over them, against eager fp32 on many images.

A stage is judged on eager's own inputs (format_parity.py), a flow on what a client gets (flow_parity.py). Suppression
decides for every pixel by a threshold, so that some pixel always flips under rounding, and what follows moves: its
flows are judged image by image from eager's suppressed image on, the stages before it each by themselves, and the flow
from the radiograph on by its scores, its differences being reported.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from scaphoid.export.edge.openvino_engine import core
from scaphoid.export.flow_parity import Answers, Parity, short
from scaphoid.export.format_parity import Engine, Errors, ExportedStage, OutputError, engines
from scaphoid.export.formats import named
from scaphoid.export.gate_images import GateImages
from scaphoid.export.precision import effective_precision
from scaphoid.export.reference import reference
from scaphoid.export.runner import PREPROCESS_BATCH, load_stage
from scaphoid.export.tolerances import ENOUGH, PIXELWISE, TOLERANCES
from scaphoid.trainer.contracts import IMAGE, ORIGINAL_SIZE, STAGES
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.flows import FLOWS, Flow

Batch = dict[str, Tensor]  # every tensor of a flow, by name, of up to PREPROCESS_BATCH images
Stages = Mapping[str, Callable]


def hold(artefacts: Path, manifest: Mapping, eager: Stages, images: GateImages, threads: int = 0) -> dict:
    """Hold the `artefacts` that `manifest` describes against the `eager` stages of all its flows; returns the report.
    `threads` limits each engine (0: all cores). Raises RejectedImage, naming the image that cannot be decoded."""
    errors, flows, references = Errors(), [], {}
    with torch.inference_mode():
        preprocessed = list(_preprocess(artefacts, manifest, eager, images, errors))
        for name in manifest["flows"]:
            batches = _eager_batches(FLOWS[name], eager, preprocessed)
            references[name] = reference(_answers(FLOWS[name], batches))
            for engine in engines(artefacts, manifest):
                flows += _flow_parities(artefacts, manifest, FLOWS[name], engine, batches, images, errors, threads)
    return report_of(manifest, images, list(errors.rows.values()), flows) | {"reference": references}


def _preprocess(
    artefacts: Path, manifest: Mapping, eager: Stages, images: GateImages, errors: Errors
) -> Iterator[list[Batch]]:
    """Batches of single images, decoded by the eager pipeline; the exported one is held against it."""
    stage = STAGES["preprocess"]
    exported = ExportedStage(stage, "dali", "f32", load_stage(artefacts, stage, manifest, 0))
    for start in range(0, len(images), PREPROCESS_BATCH):
        encoded = images.encoded[start : start + PREPROCESS_BATCH]
        try:
            wanted = eager[stage.name](encoded)
        except RejectedImage:
            _name_the_rejected(eager[stage.name], encoded, images.names[start : start + PREPROCESS_BATCH])
            raise
        errors.add(exported, wanted, exported.run(encoded))
        yield [{IMAGE.name: i[None], ORIGINAL_SIZE.name: size[None]} for i, size in zip(*wanted, strict=True)]


def _name_the_rejected(preprocess: Callable, encoded: Sequence[bytes], names: Sequence[str]) -> None:
    """Raises RejectedImage with the name of the first image that `preprocess`, which counts them, rejects."""
    for name, each in zip(names, encoded, strict=True):
        try:
            preprocess([each])
        except RejectedImage as error:
            reason = error.reason.removeprefix("image 0: ")
            raise RejectedImage(f"{name}: {reason}: mend it, or leave it out of the gate's images") from None


def _eager_batches(flow: Flow, stages: Stages, preprocessed: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Every tensor of the eager flow: single images, a core each, which is faster than all cores on batches; joined, so
    that an engine's batches are held against single images."""

    def single(given: Batch) -> Batch:
        with torch.inference_mode():
            return flow.run(stages, given, flow.outputs)

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            joined = []
            for batch in _tracked(preprocessed, f"{flow.name}: eager"):
                singles = list(pool.map(single, batch))
                joined.append({name: torch.cat([each[name] for each in singles]) for name in singles[0]})
            return joined
    finally:
        torch.set_num_threads(cores)


def _tracked(batches: Sequence, what: str) -> Iterable:
    return track(batches, what, console=Console(stderr=True), transient=True)


def _flow_parities(
    artefacts: Path,
    manifest: Mapping,
    flow: Flow,
    engine: Engine,
    batches: Sequence[Batch],
    images: GateImages,
    errors: Errors,
    threads: int,
) -> list[Parity]:
    """One flow over one engine: from its stages, and from the one file of the whole flow where there is one."""
    stages = engine.stages(artefacts, flow, manifest, threads)
    whole = engine.whole(artefacts, flow, threads)
    pinned = [name for step in flow.steps if step.stage.name in PIXELWISE for name in step.outputs.values()]
    answers: dict[str, list[Batch]] = {"judged": [], "free": [], "whole": []}
    for eager in _tracked(batches, f"{flow.name}: {engine.format.name} {engine.precision}"):
        _hold_stages(flow, stages, eager, errors)
        given = {name: eager[name] for name in (IMAGE.name, ORIGINAL_SIZE.name)}
        answers["judged"].append(flow.run(stages, given | {name: eager[name] for name in pinned}, flow.outputs))
        if pinned:
            answers["free"].append(flow.run(stages, given, flow.outputs))
        if whole:
            answers["whole"].append(dict(zip(flow.outputs, whole(*given.values()), strict=True)))
        for stage in stages.values():
            stage.forget()
    map_error = errors.map_error(engine.format.name, engine.precision)
    expected, threshold = _answers(flow, batches), manifest.get("thresholds", {}).get(flow.name, 0.5)

    def parity(name: str, kind: str, each_image: bool, note: str) -> Parity:
        found, precision = _answers(flow, answers[kind]), engine.precision
        known = {"radiographs": images.radiographs, "places": images.places, "threshold": threshold}
        return Parity(flow, name, precision, expected, found, map_error, each_image=each_image, note=note, **known)

    after = "from eager's suppressed image on" if pinned else ""
    found = [parity(engine.format.name, "judged", True, after)]
    if pinned:
        found.append(parity(engine.format.name, "free", False, "from the radiograph on: judged by its scores"))
    if whole:
        note = "one file, from the radiograph on" + (": judged by its scores" if pinned else "")
        found.append(parity(engine.format.name, "whole", not pinned, note))
    return found


def _hold_stages(flow: Flow, stages: Mapping[str, ExportedStage], eager: Batch, errors: Errors) -> None:
    """Every step on eager's own inputs."""
    for step in flow.steps:
        if stage := stages.get(step.stage.name):
            outputs = stage(*(eager[step.inputs[tensor.name]] for tensor in step.stage.inputs))
            errors.add(stage, [eager[step.outputs[tensor.name]] for tensor in step.stage.outputs], outputs)


def _answers(flow: Flow, batches: Sequence[Batch]) -> Answers:
    return {name: np.concatenate([each[name].numpy() for each in batches]) for name in flow.outputs}


def report_of(manifest: Mapping, images: GateImages, stages: Sequence[OutputError], flows: Sequence[Parity]) -> dict:
    """What the gate found, and what quantising did before, as `parity.json` holds it."""
    quantization = manifest.get("quantization", [])
    failures = [line for each in quantization for line in each.get("failures", ())]
    failures += [row.failure for row in stages if row.failure]
    failures += [line for each in flows for line in each.failures]
    notes = [line for each in quantization for line in each.get("notes", ())]
    if (real := effective_precision(manifest["precision"])) != manifest["precision"]:
        notes.append(f"this CPU has no {manifest['precision']}: what is served ran, and was judged, in {real}")
    absent = [each.name for each in named(manifest["formats"]) if each.missing()]
    notes += [f"not held, its packages are not here: {name}" for name in absent]
    if len(images) < ENOUGH:
        notes.append(f"differences of scores are judged from {ENOUGH} images on, here were {len(images)}")
    undefined = [score[-1] for each in flows for score in each.scores.values() if np.isnan(score[-1].value)]
    notes += dict.fromkeys(each.reason for each in undefined)
    if not images.radiographs:
        notes.append("the images have no labels: no scores")
    return {
        "passed": not failures,
        "failures": failures,
        "notes": notes,
        "images": {
            "count": len(images),
            "abnormal": sum(each.label for each in images.radiographs),
            "patients": len({each.patient for each in images.radiographs}),
            "origin": images.origin,
        },
        "cpu": core().get_property("CPU", "FULL_DEVICE_NAME"),
        "quantization": quantization,
        "stages": [
            {
                "format": row.format,
                "precision": row.precision,
                "stage": row.stage.name,
                "output": row.output,
                "largest": short(row.largest),
                "mean": short(row.mean),
                "at_most": dict(zip(("largest", "mean"), row.at_most, strict=True)),
                "passed": not row.failure,
            }
            for row in stages
        ],
        "flows": [each.summary() for each in flows],
        "tolerances": {name: asdict(each) for name, each in TOLERANCES.items()},
    }
