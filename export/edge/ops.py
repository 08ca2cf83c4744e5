"""The ops through their plain C interface (kernels/csrc/scaphoid_ops.h), without torch: on arrays in host memory, or on
buffers of a GPU.

A method binds one op to the arrays that it reads and fills, and gives the call back: `call()` runs the op on whatever
they hold then, and allocates nothing. Shapes are those of the contracts; every array is dense.
"""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import scaphoid.kernels

U8, F32 = ctypes.c_int(0), ctypes.c_int(3)  # scaphoid_dtype
DTYPES = {"UINT8": np.dtype(np.uint8), "INT32": np.dtype(np.int32), "FP32": np.dtype(np.float32)}

Call = Callable[[], object]


class Array(Protocol):
    """What an op reads or fills: a numpy array, or a buffer on a GPU that says where it lies in `address`."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class OpError(Exception):
    """The op library is missing, cannot be loaded, or refuses a launch. One line that says what to do."""


class _Crops(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch_stride", "channel_stride", "row_stride", "column_stride")]
    _fields_ += [(name, ctypes.c_int64) for name in ("count", "size")]


class _WindowGroups(ctypes.Structure):
    _fields_ = [(name, ctypes.POINTER(ctypes.c_int64)) for name in ("shapes", "sizes", "counts")]
    _fields_ += [("groups", ctypes.c_int64), ("iou_threshold", ctypes.c_double)]


def library_path() -> Path:
    """Where `make edge` puts the library: build/edge beside the kernels' folder."""
    return Path(scaphoid.kernels.__file__).resolve().parent.parent / "build" / "edge" / "libscaphoid_ops_c.so"


def load_library(path: Path | None = None) -> ctypes.CDLL:
    """The op library at `path` (None: where the build puts it). Raises OpError."""
    path = path or library_path()
    if not path.is_file():
        raise OpError(f"the op library {path} is missing: build it with `make edge` (needs g++ and ninja)")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise OpError(
            f"the op library {path} cannot be loaded ({error}): build it on this machine, `make edge`"
        ) from None


class Ops:
    """The ops of `library` on the CPU, one thread; on a GPU, in order, when a CUDA `stream` is given. `upload` puts
    float32 numbers that never change where the ops read them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        stream: int | None = None,
        upload: Callable[[np.ndarray], Array] = np.ascontiguousarray,
    ) -> None:
        self._library, self._stream, self._upload = library, stream, upload

    def object_box(self, activation: Array, class_activation: Array, size: tuple, boxes: Array, margin: Array) -> Call:
        """`size`: height and width in pixels of the image that the maps [B, h, w] belong to."""
        arguments = (activation, class_activation, *activation.shape, *size, boxes, margin)
        return self._bind("object_box", arguments, activation.shape[1:])

    def key_area_box(
        self, activation: Array, settings: Mapping[str, Any], size: tuple, boxes: Array, margin: Array
    ) -> Call:
        """`settings`: width_weight [w], width_bias [1], height_weight [h], height_bias [1], as the stage has them."""
        names = ("width_weight", "width_bias", "height_weight", "height_bias")
        layers = (self._upload(np.float32(settings[name])) for name in names)
        arguments = (F32, activation, *layers, *activation.shape, *size, boxes, margin)
        return self._bind("key_area_box", arguments, activation.shape[1:])

    def part_windows(
        self, activation: Array, settings: Mapping[str, Any], size: tuple, boxes: Array, scores: Array, margin: Array
    ) -> Call:
        """`settings`: shapes, group_sizes, kept (flat lists) and iou_threshold, as the stage has them."""
        tables = [(ctypes.c_int64 * len(settings[name]))(*settings[name]) for name in ("shapes", "group_sizes", "kept")]
        groups = _WindowGroups(*tables, len(settings["group_sizes"]), settings["iou_threshold"])
        arguments = (activation, ctypes.byref(groups), *activation.shape, *size, boxes, scores, margin)
        return self._bind("part_windows", arguments, (*activation.shape[1:], ctypes.byref(groups)))

    def crop_resize(self, image: Array, boxes: Array, crops: Array) -> Call:
        """uint8 [B, 1, H, W] and n boxes an image to n * B crops of one size."""
        batch, _, height, width = image.shape
        size = crops.shape[-1]
        count = int(np.prod(crops.shape[1:-3]))
        of = _Crops(batch, 1, height, width, height * width, height * width, width, 1, count, size)
        rows = () if self._on_gpu else (0, batch * count * size)
        return self._bind("crop_resize", (ctypes.byref(of), U8, image, boxes, *rows, crops), (ctypes.byref(of),))

    def suppress_artifacts(self, image: Array, activation: Array, theta: float, r: float, suppressed: Array) -> Call:
        batch, _, height, width = image.shape
        sizes = (*activation.shape[1:], height, width, float(theta), float(r))
        sizes = (batch, *sizes) if self._on_gpu else (*sizes, 0, batch * height)
        return self._bind("suppress_artifacts", (image, activation, *sizes, suppressed), (width,))

    def map_boxes(
        self, boxes: Array, scores: Array, gamma: float, objects: Array, sizes: Array, size: tuple, mapped: Array
    ) -> Call:
        """boxes [B, n, 4] of the object image, `objects` [B, 4] of the image, `sizes` [B, 2] of the originals."""
        arguments = (boxes, scores, float(gamma), objects, sizes, *boxes.shape[:2], *size, mapped)
        return self._bind("map_boxes", arguments)

    @property
    def _on_gpu(self) -> bool:
        return self._stream is not None

    def _bind(self, op: str, arguments: tuple, workspace: tuple | None = None) -> Call:
        """`workspace`: what its size depends on, for an op that needs one on the CPU."""
        name = f"scaphoid_{op}_{'cuda' if self._on_gpu else 'cpu'}"
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise OpError(f"the op library has no {name}: build it where nvcc is found, `make edge`") from None
        if self._on_gpu:
            return self._launch(op, function, arguments)
        function.restype = None
        if workspace is not None:
            size = getattr(self._library, f"scaphoid_{op}_workspace")
            size.restype = ctypes.c_size_t
            arguments = (*arguments, np.empty(size(*map(_c, workspace)) // 8 + 1, np.float64))
        values = tuple(map(_c, arguments))

        def call(arrays: tuple = arguments) -> None:  # keeps the arrays alive
            function(*values)

        return call

    def _launch(self, op: str, function: Any, arguments: tuple) -> Call:
        function.restype = ctypes.c_int
        values = (*map(_c, arguments), ctypes.c_void_p(self._stream))

        def call(arrays: tuple = arguments) -> None:
            if status := function(*values):
                raise OpError(f"{op}: its launch failed with CUDA error {status}")

        return call


def _c(value: Any) -> Any:
    """An argument as C takes it: sizes are int64_t, arrays go by address."""
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(value.address) if hasattr(value, "address") else value
