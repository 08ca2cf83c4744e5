"""Every tensor that crosses a stage boundary: its name, dtype, dims and meaning, and the name of the record that a
prediction is written as. Imports nothing heavy.

A *stage* is a function with named, typed tensors at its door; this file is the only place that knows the names.
Dims leave out the batch: a stage takes any number of images, one row each. A dim that depends on the trained run
(image size, map size) is a word; it is the same number wherever the same word stands within one run, and `-1` in a
Triton `config.pbtxt`. Boxes are `(x0, y0, x1, y1)`, half-open, float32, never rounded, in pixels of the image they
belong to.
"""

from dataclasses import dataclass

WINDOWS = 7  # part windows kept per image (MSFM, sections 2.2 and 2.4)
CLASSES = 2  # normal, abnormal
PREDICTION_SCHEMA = "scaphoid.prediction/1"  # in every line that scaphoid-predict writes and scaphoid-evaluate reads

Dim = int | str


@dataclass(frozen=True)
class Tensor:
    """A named tensor without its batch dimension; `dtype` is Triton's name without `TYPE_`."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    meaning: str

    @property
    def triton_dims(self) -> list[int]:
        return [dim if isinstance(dim, int) else -1 for dim in self.dims]


@dataclass(frozen=True)
class Stage:
    """What one model computes. `kind` says what carries it: `preprocess` (DALI), `encoder` (an engine) or `glue`
    (TorchScript)."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


ENCODED = Tensor("encoded", "UINT8", ("bytes",), "the bytes of one PNG, JPEG, BMP, TIFF or PGM file")
ORIGINAL_SIZE = Tensor(
    "original_size", "INT32", (2,), "height, width of the decoded radiograph, EXIF orientation applied"
)
IMAGE = Tensor("image", "UINT8", (1, "height", "width"), "grey radiograph, resized without keeping its aspect ratio")

LOGITS = Tensor("logits", "FP32", (CLASSES,), "FC(GAP(F)): normal, abnormal")
ACTIVATION = Tensor("activation", "FP32", ("map_height", "map_width"), "A = sum over channels of F (KALM eq. 4)")
CLASS_ACTIVATION = Tensor(
    "class_activation", "FP32", ("map_height", "map_width"), "L2 norm over classes of W . F (MSFM eq. 3, 10)"
)

OBJECT_BOX = Tensor("object_box", "FP32", (4,), "main-stage box, in pixels of `image`")
OBJECT_IMAGE = Tensor("object_image", "UINT8", (1, "height", "width"), "the object box, resized to the size of `image`")
OBJECT_MARGIN = Tensor("object_margin", "FP32", (1,), "relative distance of the object box's decisions from flipping")
PART_BOXES = Tensor("part_boxes", "FP32", (WINDOWS, 4), "kept windows, in pixels of `object_image`")
PART_SCORES = Tensor("part_scores", "FP32", (WINDOWS,), "mean activation inside each kept window")
PART_IMAGES = Tensor(
    "part_images", "UINT8", (WINDOWS, 1, "part_height", "part_width"), "the windows, cropped from `object_image`"
)
PART_MARGIN = Tensor(
    "part_margin", "FP32", (1,), "relative distance of the window choices and their ranking from flipping"
)
PARTS_LOGITS = Tensor("parts_logits", "FP32", (WINDOWS, CLASSES), "logits of every window")

KEY_BOX = Tensor("key_box", "FP32", (4,), "key area, in pixels of `image`")
KEY_IMAGE = Tensor("key_image", "UINT8", (1, "key_height", "key_width"), "the key area, cropped from `image`")
KEY_MARGIN = Tensor("key_margin", "FP32", (1,), "relative distance of the key area's argmax decisions from flipping")

MAIN_LOGITS = Tensor("main_logits", "FP32", (CLASSES,), "logits of the main stage")
OBJECT_LOGITS = Tensor("object_logits", "FP32", (CLASSES,), "logits of the object stage")
GLOBAL_LOGITS = Tensor("global_logits", "FP32", (CLASSES,), "logits of the global CNN")
LOCAL_LOGITS = Tensor("local_logits", "FP32", (CLASSES,), "logits of the local CNN")

PROBABILITY = Tensor(
    "probability", "FP32", (1,), "probability of abnormal: mean of main and object (MSFM), of global and local (KALM)"
)
MAIN_PROBABILITY = Tensor("main_probability", "FP32", (1,), "probability of abnormal by the main stage")
OBJECT_PROBABILITY = Tensor("object_probability", "FP32", (1,), "probability of abnormal by the object stage")
PARTS_PROBABILITY = Tensor("parts_probability", "FP32", (1,), "probability of abnormal, mean over the windows")
PROBABILITY_WITH_PARTS = Tensor(
    "probability_with_parts", "FP32", (1,), "probability of abnormal: mean of main, object and parts"
)
GLOBAL_PROBABILITY = Tensor("global_probability", "FP32", (1,), "probability of abnormal by the global CNN")
LOCAL_PROBABILITY = Tensor("local_probability", "FP32", (1,), "probability of abnormal by the local CNN")
BOX = Tensor("box", "FP32", (4,), "abnormal box (MSFM eq. 11) or key area (KALM), in pixels of the original radiograph")
MAIN_BOX = Tensor("main_box", "FP32", (4,), "main-stage box, in pixels of the original radiograph")
WINDOW_BOXES = Tensor(
    "window_boxes", "FP32", (WINDOWS, 4), "every window, in pixels of the original radiograph, in order of choice"
)
WINDOW_SCORES = Tensor("window_scores", "FP32", (WINDOWS,), "mean activation of every window")
MARGIN = Tensor(
    "margin",
    "FP32",
    (1,),
    "smallest relative distance of any hard decision from flipping, except FMA's pixel threshold",
)

MAPS = (LOGITS, ACTIVATION, CLASS_ACTIVATION)

STAGES = {
    stage.name: stage
    for stage in (
        Stage("preprocess", "preprocess", (ENCODED,), (IMAGE, ORIGINAL_SIZE)),
        Stage("fma_encoder", "encoder", (IMAGE,), (ACTIVATION,)),
        Stage("suppress", "glue", (IMAGE, ACTIVATION), (IMAGE,)),
        Stage("encoder", "encoder", (IMAGE,), MAPS),
        Stage("object_crop", "glue", (IMAGE, ACTIVATION, CLASS_ACTIVATION), (OBJECT_BOX, OBJECT_IMAGE, OBJECT_MARGIN)),
        Stage("part_crops", "glue", (OBJECT_IMAGE, ACTIVATION), (PART_BOXES, PART_SCORES, PART_IMAGES, PART_MARGIN)),
        Stage("parts_encoder", "encoder", (PART_IMAGES,), (PARTS_LOGITS,)),
        Stage("main_result", "glue", (MAIN_LOGITS,), (MAIN_PROBABILITY,)),
        Stage(
            "result",
            "glue",
            (
                MAIN_LOGITS,
                OBJECT_LOGITS,
                OBJECT_BOX,
                OBJECT_MARGIN,
                PART_BOXES,
                PART_SCORES,
                PART_MARGIN,
                ORIGINAL_SIZE,
            ),
            (PROBABILITY, OBJECT_PROBABILITY, BOX, MAIN_BOX, WINDOW_BOXES, WINDOW_SCORES, MARGIN),
        ),
        Stage(
            "parts_result",
            "glue",
            (MAIN_LOGITS, OBJECT_LOGITS, PARTS_LOGITS),
            (PARTS_PROBABILITY, PROBABILITY_WITH_PARTS),
        ),
        Stage("global_encoder", "encoder", (IMAGE,), MAPS),
        Stage("key_area_crop", "glue", (IMAGE, ACTIVATION), (KEY_BOX, KEY_IMAGE, KEY_MARGIN)),
        Stage("local_encoder", "encoder", (KEY_IMAGE,), (LOGITS,)),
        Stage(
            "key_area_result",
            "glue",
            (GLOBAL_LOGITS, LOCAL_LOGITS, KEY_BOX, KEY_MARGIN, ORIGINAL_SIZE),
            (PROBABILITY, GLOBAL_PROBABILITY, LOCAL_PROBABILITY, BOX, MARGIN),
        ),
    )
}
