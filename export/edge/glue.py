"""The glue stages without torch: the stages of trainer/stages over the ops' C interface, one function each.

A function binds its stage to arrays of the contract's shapes, inputs in the contract's order and then outputs, and
gives the calls that fill the outputs. `settings` are what the trained stage was built with and has learnt, from the
manifest. What yields boxes and pixels works on a GPU's buffers too; what yields results is arithmetic on some numbers
an image and works on numpy arrays alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaphoid.export.edge.ops import Array, Call, Ops

Settings = Mapping[str, Any]


def suppress(ops: Ops, settings: Settings, image: Array, activation: Array, suppressed: Array) -> list[Call]:
    return [ops.suppress_artifacts(image, activation, settings["theta"], settings["r"], suppressed)]


def object_crop(
    ops: Ops,
    settings: Settings,
    image: Array,
    activation: Array,
    class_activation: Array,
    object_box: Array,
    object_image: Array,
    object_margin: Array,
) -> list[Call]:
    return [
        ops.object_box(activation, class_activation, image.shape[2:], object_box, object_margin),
        ops.crop_resize(image, object_box, object_image),
    ]


def part_crops(
    ops: Ops,
    settings: Settings,
    object_image: Array,
    activation: Array,
    part_boxes: Array,
    part_scores: Array,
    part_images: Array,
    part_margin: Array,
) -> list[Call]:
    return [
        ops.part_windows(activation, settings, object_image.shape[2:], part_boxes, part_scores, part_margin),
        ops.crop_resize(object_image, part_boxes, part_images),
    ]


def key_area_crop(
    ops: Ops,
    settings: Settings,
    image: Array,
    activation: Array,
    key_box: Array,
    key_image: Array,
    key_margin: Array,
) -> list[Call]:
    return [
        ops.key_area_box(activation, settings, image.shape[2:], key_box, key_margin),
        ops.crop_resize(image, key_box, key_image),
    ]


def abnormal_probability(logits: np.ndarray, out: np.ndarray) -> None:
    """Softmax of logits [..., 2] to the probability of abnormal, `out` [..., 1]."""
    np.subtract(logits[..., :1], logits[..., 1:], out=out)
    with np.errstate(over="ignore"):  # to infinity: the probability is 0
        np.exp(out, out=out)
    out += 1
    np.reciprocal(out, out=out)


def main_result(ops: Ops, settings: Settings, main_logits: np.ndarray, main_probability: np.ndarray) -> list[Call]:
    return [lambda: abnormal_probability(main_logits, main_probability)]


def to_original(ops: Ops, boxes: np.ndarray, side: int, original_size: np.ndarray, mapped: np.ndarray) -> Call:
    """boxes [B, 4] of the image to those of the original radiograph."""
    whole = np.tile(np.float32([0, 0, side, side]), (len(boxes), 1))
    scores = np.ones((len(boxes), 1), np.float32)
    return ops.map_boxes(boxes[:, None], scores, 1.0, whole, original_size, (side, side), mapped)


def result(
    ops: Ops,
    settings: Settings,
    main_logits: np.ndarray,
    object_logits: np.ndarray,
    object_box: np.ndarray,
    object_margin: np.ndarray,
    part_boxes: np.ndarray,
    part_scores: np.ndarray,
    part_margin: np.ndarray,
    original_size: np.ndarray,
    probability: np.ndarray,
    object_probability: np.ndarray,
    box: np.ndarray,
    main_box: np.ndarray,
    window_boxes: np.ndarray,
    window_scores: np.ndarray,
    margin: np.ndarray,
) -> list[Call]:
    side, gamma = settings["image_size"], settings["gamma"]
    batch, windows = part_scores.shape
    boxes, sizes = np.empty((batch * windows, 4), np.float32), np.empty((batch * windows, 2), np.int32)

    def prepare() -> None:
        abnormal_probability(main_logits, probability)
        abnormal_probability(object_logits, object_probability)
        np.add(probability, object_probability, out=probability)
        np.divide(probability, 2, out=probability)
        np.minimum(object_margin, part_margin, out=margin)
        window_scores[:] = part_scores
        boxes.reshape(batch, windows, 4)[:] = object_box[:, None]
        sizes.reshape(batch, windows, 2)[:] = original_size[:, None]

    apart = (part_boxes.reshape(-1, 1, 4), part_scores.reshape(-1, 1))
    return [
        prepare,
        ops.map_boxes(part_boxes, part_scores, gamma, object_box, original_size, (side, side), box),
        ops.map_boxes(*apart, gamma, boxes, sizes, (side, side), window_boxes),
        to_original(ops, object_box, side, original_size, main_box),
    ]


def parts_result(
    ops: Ops,
    settings: Settings,
    main_logits: np.ndarray,
    object_logits: np.ndarray,
    parts_logits: np.ndarray,
    parts_probability: np.ndarray,
    probability_with_parts: np.ndarray,
) -> list[Call]:
    of_object = np.empty_like(probability_with_parts)
    of_parts = np.empty((*parts_logits.shape[:2], 1), np.float32)

    def call() -> None:
        abnormal_probability(parts_logits, of_parts)
        np.mean(of_parts, axis=1, out=parts_probability)
        abnormal_probability(main_logits, probability_with_parts)
        abnormal_probability(object_logits, of_object)
        np.add(probability_with_parts, of_object, out=probability_with_parts)
        np.add(probability_with_parts, parts_probability, out=probability_with_parts)
        np.divide(probability_with_parts, 3, out=probability_with_parts)

    return [call]


def key_area_result(
    ops: Ops,
    settings: Settings,
    global_logits: np.ndarray,
    local_logits: np.ndarray,
    key_box: np.ndarray,
    key_margin: np.ndarray,
    original_size: np.ndarray,
    probability: np.ndarray,
    global_probability: np.ndarray,
    local_probability: np.ndarray,
    box: np.ndarray,
    margin: np.ndarray,
) -> list[Call]:
    def call() -> None:
        abnormal_probability(global_logits, global_probability)
        abnormal_probability(local_logits, local_probability)
        np.add(global_probability, local_probability, out=probability)
        np.divide(probability, 2, out=probability)
        margin[:] = key_margin

    return [call, to_original(ops, key_box, settings["image_size"], original_size, box)]


GLUE: dict[str, Callable[..., list[Call]]] = {
    each.__name__: each
    for each in (suppress, object_crop, part_crops, key_area_crop, main_result, result, parts_result, key_area_result)
}
