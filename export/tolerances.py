"""The one table of how close exported artefacts must come to eager fp32. Imports nothing heavy.

An encoder is judged by its outputs, given eager's own inputs; a flow by what a client gets: probabilities, boxes and
scores. A hard decision (a threshold, an argmax) whose margin is below the engine's error may fall on the other side,
and everything after it then differs by far: in full precision such images must be few, and each must be explained by
its margin; in reduced precision the share of images, the boxes' IoU and the scores are held.
"""

from dataclasses import dataclass

from scaphoid.trainer.contracts import ACTIVATION, CLASS_ACTIVATION, LOGITS, PARTS_LOGITS, Stage
from scaphoid.trainer.flows import FLOWS

MAPS = {ACTIVATION.name, CLASS_ACTIVATION.name}
# What errors are relative to, at least: rounding grows with the values, and the demo's parts have logits up to 12.
SMALLEST_SCALE = {**dict.fromkeys(MAPS, 1e-30), LOGITS.name: 1.0, PARTS_LOGITS.name: 1.0}
EXACT = 1e-4  # of glue and preprocessing, whatever the precision: they are the same code on the same inputs
PIXELWISE = {"suppress"}  # stages with a hard decision for every pixel: one of them is always within rounding
# Encoders whose map such a stage decides by: they stay in fp32 where the others are fp16 or int8.
DECIDING_PIXELS = {
    producer.stage.name
    for flow in FLOWS.values()
    for step in flow.steps
    if step.stage.name in PIXELWISE
    for producer in flow.steps
    if producer.stage.kind == "encoder" and {*producer.outputs.values()} & {*step.inputs.values()}
}
ENOUGH = 100  # images from which differences of scores are judged: below, one verdict is more than the tolerance


@dataclass(frozen=True)
class Tolerance:
    """None: not judged.

    An encoder's output: `largest` error of any element and `mean` over all elements, maps relative to the image's
    largest value, logits too where that is above 1, below absolute. In reduced precision single elements round far
    without moving a score, a wrong weight or a swapped map moves the mean.
    A flow: in the `share` of images every probability stays within `probability` and every box coordinate within
    `pixels` of the original radiograph; where `explained`, an image beyond must have a margin within the engine's map
    error. `auroc`, `kappa`: largest difference. `median_iou`, `low_iou`: median and 5th percentile of the IoU of each
    single box with eager's.
    """

    largest: float | None
    mean: float | None
    probability: float | None
    pixels: float | None
    share: float
    explained: bool
    auroc: float = 0.01
    kappa: float = 0.02
    median_iou: float = 0.95
    low_iou: float = 0.5


TOLERANCES = {
    "f32": Tolerance(largest=1e-4, mean=None, probability=1e-3, pixels=1.0, share=0.995, explained=True),
    # In units of what one rounding to the precision may change: any element a hundred, the mean ten.
    "f16": Tolerance(largest=100 / 2**11, mean=10 / 2**11, probability=0.02, pixels=None, share=0.95, explained=False),
    "bf16": Tolerance(largest=100 / 2**8, mean=10 / 2**8, probability=0.02, pixels=None, share=0.95, explained=False),
    "int8": Tolerance(largest=None, mean=None, probability=None, pixels=None, share=0.0, explained=False, kappa=0.03),
}


def precision_of(stage: Stage, precision: str) -> str:
    """What is in the file of the encoder `stage` among files of a `precision`."""
    return "f32" if precision in ("f16", "int8") and stage.name in DECIDING_PIXELS else precision


def at_most(stage: Stage, precision: str) -> tuple[float | None, float | None]:
    """The largest and the mean error that an output of `stage` may have in `precision`; None: not judged."""
    if stage.kind != "encoder":
        return EXACT, None
    return TOLERANCES[precision].largest, TOLERANCES[precision].mean
