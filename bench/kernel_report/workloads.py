"""What the kernels do for one image at the product's sizes: who calls them, the bytes that must move, the arithmetic.

The minimum of bytes is every input and every output once, by the shapes of the contract; of an image that is cropped,
the pixels that the boxes cover. Arithmetic is of the definition (spec and op documentation), by the formulas below:
additions, multiplications and comparisons of decided values, divisions as one; the kernels do not fuse multiply-adds.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaphoid.bench.kernel_report.trace import Launch, Tracer, array
from scaphoid.trainer.contracts import CLASSES
from scaphoid.trainer.models.kalm import KalmConfig
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.stages.part_crops import IOU_THRESHOLD, KEPT, window_groups

SEED = 448
MAP, CHANNELS = 14, 2048  # ResNet-50's at 448
CELLS = MAP * MAP
IMAGE, PART, KEY = MsfmConfig().image_size, MsfmConfig().part_size, KalmConfig().key_size
WINDOWS = sum(KEPT)
U8, F16, BF16, F32 = range(4)  # scaphoid_dtype
MSFM = {"msfm": 1, "msfm_fma": 1}
LERP = 3  # a + weight * (b - a)
POSITION = 8  # of a sample on one axis: formula, clamp, weight


class Features(ctypes.Structure):
    """scaphoid_features."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "h", "w", "classes")),
        *((name, ctypes.c_int) for name in ("dtype", "weight_dtype", "channels_last")),
    )


class Groups(ctypes.Structure):
    """scaphoid_window_groups."""

    _fields_ = (
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("shapes", "sizes", "counts")),
        ("groups", ctypes.c_int64),
        ("iou_threshold", ctypes.c_double),
    )


class Crops(ctypes.Structure):
    """scaphoid_crops."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width"),
            *("batch_stride", "channel_stride", "row_stride", "column_stride"),
            *("count", "size"),
        )
    )


@dataclass(frozen=True)
class Workload:
    """`flows`: how often a flow runs it for an image; none: training alone. `fp32`, `fp64` in operations."""

    name: str
    minimum_bytes: int
    fp32: int
    fp64: int
    trace: Callable[[Tracer], list[Launch]]
    flows: dict[str, int] = field(default_factory=dict)


def hills(generator: np.random.Generator, side: int) -> np.ndarray:
    """A map with a few hills and no two equal cells: float32 `[side, side]`."""
    y, x = np.mgrid[:side, :side] / side
    waves = sum(np.cos(6 * (a * x + b * y) + c) for a, b, c in generator.random((4, 3)))
    return (waves + 5 + 0.01 * generator.random((side, side))).astype(np.float32)


def groups() -> tuple[Groups, int]:
    """The product's window groups, and how many windows stand on the map."""
    found = window_groups(MAP, MAP)
    shapes = [side for group in found for shape in group for side in shape]
    made = Groups(_int64(shapes), _int64([len(group) for group in found]), _int64(KEPT), len(found), IOU_THRESHOLD)
    return made, sum((MAP - h + 1) * (MAP - w + 1) for h, w in zip(shapes[::2], shapes[1::2], strict=True))


def _int64(values: Sequence[int]) -> "ctypes.Array":
    return (ctypes.c_int64 * len(values))(*values)


def windows(generator: np.random.Generator) -> np.ndarray:
    """Boxes as part_windows gives them: float32 `[WINDOWS, 4]` in pixels."""
    shapes = [shape for group, kept in zip(window_groups(MAP, MAP), KEPT, strict=True) for shape in group[:kept]]
    corners = [(generator.integers(MAP - h + 1), generator.integers(MAP - w + 1), h, w) for h, w in shapes[:WINDOWS]]
    boxes = [(left, top, left + w, top + h) for top, left, h, w in corners]
    return np.array(boxes, np.float32) * (IMAGE / MAP)


def covered(boxes: np.ndarray) -> int:
    """Pixels of an image that some box covers."""
    mask = np.zeros((IMAGE, IMAGE), bool)
    for x0, y0, x1, y1 in boxes:
        mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
    return int(mask.sum())


def activation_maps(dtype: int, flows: dict[str, int]) -> Workload:
    """Sum and `CLASSES` products over the channels of a cell; of the norm a square and an addition a class, a root."""
    width, name = {F16: (2, "float16"), BF16: (2, "bfloat16"), F32: (4, "float32")}[dtype]
    of = Features(1, CHANNELS, MAP, MAP, CLASSES, dtype, F32, 0)

    def trace(tracer: Tracer) -> list[Launch]:
        features = array((CHANNELS * CELLS * width,), np.uint8)
        weight, maps = array((CLASSES, CHANNELS), np.float32, 1), [array((CELLS,), np.float32) for _ in range(2)]
        return tracer("activation_maps", ctypes.byref(of), features, weight, *maps)

    minimum = CHANNELS * CELLS * width + CLASSES * CHANNELS * 4 + 2 * CELLS * 4
    return Workload(
        f"activation_maps {name}", minimum, CELLS * (CHANNELS + CLASSES * (2 * CHANNELS + 2)), 0, trace, flows
    )


def object_box() -> Workload:
    """Two maps: a sum in double; in float magnitude, mask, nearest cell; components are integer work."""
    generator = np.random.default_rng(SEED)
    maps = [array((CELLS,), np.float32, hills(generator, MAP).ravel()) for _ in range(2)]

    def trace(tracer: Tracer) -> list[Launch]:
        outputs = array((4,), np.float32), array((1,), np.float32)
        return tracer("object_box", *maps, 1, MAP, MAP, IMAGE, IMAGE, *outputs)

    return Workload("object_box", (2 * CELLS + 5) * 4, 2 * 3 * CELLS, 2 * CELLS, trace, MSFM)


def part_windows() -> Workload:
    """In double: the integral (two additions a cell), a window's mean (three additions, a product); in float a
    comparison a window and pick of its group, which is less than the windows times the most picks."""
    table, count = groups()
    activation = array((CELLS,), np.float32, hills(np.random.default_rng(SEED), MAP).ravel())

    def trace(tracer: Tracer) -> list[Launch]:
        outputs = [array((n,), np.float32) for n in (WINDOWS * 4, WINDOWS, 1)]
        return tracer("part_windows", activation, ctypes.byref(table), 1, MAP, MAP, IMAGE, IMAGE, *outputs)

    fp32, fp64 = count * max(KEPT), 2 * CELLS + 4 * count
    return Workload("part_windows", (CELLS + 5 * WINDOWS + 1) * 4, fp32, fp64, trace, MSFM)


def crop(name: str, boxes: np.ndarray, size: int, dtype: int, flows: dict[str, int]) -> Workload:
    """Three interpolations an output; positions once a row and a column of a crop."""
    count, width = len(boxes), 1 if dtype == U8 else 4
    of = Crops(1, 1, IMAGE, IMAGE, IMAGE * IMAGE, IMAGE * IMAGE, IMAGE, 1, count, size)

    def trace(tracer: Tracer) -> list[Launch]:
        image, crops = array((IMAGE * IMAGE * width,), np.uint8), array((count * size * size * width,), np.uint8)
        passed = array(boxes.shape, np.float32, boxes)
        return tracer("crop_resize", ctypes.byref(of), ctypes.c_int(dtype), image, passed, crops)

    minimum = width * (covered(boxes) + count * size * size) + 16 * count
    return Workload(name, minimum, count * (3 * LERP * size * size + 2 * POSITION * size), 0, trace, flows)


def crop_backward(name: str, deterministic: bool) -> Workload:
    """The key area's crop while KALM trains: float32, gradient to image and box. An output: four weights and products,
    four additions, the slopes' three interpolations and four sums."""
    boxes = np.array([[101, 74, 325, 298]], np.float32) + np.float32(0.3)
    of = Crops(1, 1, IMAGE, IMAGE, IMAGE * IMAGE, IMAGE * IMAGE, IMAGE, 1, 1, KEY)

    def trace(tracer: Tracer) -> list[Launch]:
        grad, image = array((KEY * KEY,), np.float32, 1), array((IMAGE * IMAGE,), np.float32, 1)
        passed, grad_image, grad_boxes = (
            array(boxes.shape, np.float32, boxes),
            array(image.shape, np.float32),
            array((4,), np.float32),
        )
        size_of = tracer.library.scaphoid_crop_resize_backward_cuda_workspace
        size_of.restype = ctypes.c_size_t
        workspace = array((max(1, size_of(ctypes.byref(of))),), np.uint8)
        arguments = (ctypes.byref(of), ctypes.c_int(F32), grad, image, passed, ctypes.c_int(deterministic))
        return tracer("crop_resize_backward", *arguments, grad_image, grad_boxes, workspace)

    minimum = 4 * (KEY * KEY + covered(boxes) + IMAGE * IMAGE + 2 * 4)
    return Workload(name, minimum, (16 + 3 * LERP) * KEY * KEY, 4 * KEY * KEY, trace)


def suppress_artifacts() -> Workload:
    """A pixel of the enlarged map: positions on both axes, three interpolations, two comparisons. In float: the kernel
    falls back to double only for pixels within float's error of the limit, whose share is not counted."""
    generator = np.random.default_rng(SEED)
    activation = array((CELLS,), np.float32, hills(generator, MAP).ravel())
    image = array((IMAGE * IMAGE,), np.uint8, generator.integers(256, size=IMAGE * IMAGE))
    config = MsfmConfig()

    def trace(tracer: Tracer) -> list[Launch]:
        out = array(image.shape, np.uint8)
        sizes = (1, MAP, MAP, IMAGE, IMAGE)
        return tracer("suppress_artifacts", image, activation, *sizes, config.theta, config.r, out)

    minimum = 2 * IMAGE * IMAGE + 4 * CELLS
    fp32 = IMAGE * IMAGE * (3 * LERP + 2 * POSITION + 2)
    return Workload("suppress_artifacts", minimum, fp32, 0, trace, {"msfm_fma": 1})


def key_area_box() -> Workload:
    """In double: two marginals, scaled, times weights; a sigmoid an axis counts as 20."""
    activation = array((CELLS,), np.float32, hills(np.random.default_rng(SEED), MAP).ravel())
    layers = [array((n,), np.float32, 0.1) for n in (MAP, 1, MAP, 1)]

    def trace(tracer: Tracer) -> list[Launch]:
        outputs = array((4,), np.float32), array((1,), np.float32)
        sizes = (1, MAP, MAP, IMAGE, IMAGE)
        return tracer("key_area_box", ctypes.c_int(F32), activation, *layers, *sizes, *outputs)

    minimum = 4 * (CELLS + 2 * MAP + 2 + 5)
    return Workload("key_area_box", minimum, 2 * CELLS, 2 * (CELLS + 6 * MAP + 20), trace, {"kalm": 1})


def map_boxes() -> Workload:
    """Four coordinates: a weighted mean of the windows and the way back, in double."""
    boxes = windows(np.random.default_rng(SEED))

    def trace(tracer: Tracer) -> list[Launch]:
        passed, scores = array(boxes.shape, np.float32, boxes), array((WINDOWS,), np.float32, np.arange(WINDOWS))
        objects, sizes = array((4,), np.float32, [0, 0, IMAGE, IMAGE]), array((2,), np.int32, 2000)
        mapped = array((4,), np.float32)
        return tracer("map_boxes", passed, scores, 0.5, objects, sizes, 1, WINDOWS, IMAGE, IMAGE, mapped)

    minimum = 4 * (5 * WINDOWS + 4 + 2 + 4)
    return Workload(
        "map_boxes", minimum, WINDOWS * WINDOWS, 4 * (3 * WINDOWS + 6), trace, {"msfm": 3, "msfm_fma": 3, "kalm": 1}
    )


def workloads() -> list[Workload]:
    box = np.array([[64, 32, 416, 384]], np.float32)
    key = np.array([[112, 80, 336, 304]], np.float32)
    return [
        activation_maps(F16, {"msfm": 2, "msfm_fma": 3, "kalm": 1}),
        activation_maps(F32, {}),
        object_box(),
        crop("crop_resize object", box, IMAGE, U8, MSFM),
        part_windows(),
        crop("crop_resize parts", windows(np.random.default_rng(SEED)), PART, U8, MSFM),
        crop("crop_resize key area", key, KEY, U8, {"kalm": 1}),
        crop("crop_resize parts float32", windows(np.random.default_rng(SEED)), PART, F32, {}),
        suppress_artifacts(),
        key_area_box(),
        map_boxes(),
        crop_backward("crop_resize_backward", False),
        crop_backward("crop_resize_backward deterministic", True),
    ]
