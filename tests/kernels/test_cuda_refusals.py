"""What CUDA does not take is refused before anything is launched: by the C functions (here under the SIMT executor)
with an error, by the registration with a message that names the argument. No GPU is needed: sizes alone decide."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scaphoid.kernels import library

INT32 = 2**31 - 1
INVALID = 1  # cudaErrorInvalidValue
SHAPES = (ctypes.c_int64 * 66)(*[1] * 66)
F32, F64 = 3, 4  # scaphoid_dtype


class Features(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "channels", "h", "w", "classes")]
    _fields_ += [(name, ctypes.c_int) for name in ("dtype", "weight_dtype", "channels_last")]


class Groups(ctypes.Structure):
    _fields_ = [(name, ctypes.POINTER(ctypes.c_int64)) for name in ("shapes", "sizes", "counts")]
    _fields_ += [("groups", ctypes.c_int64), ("iou_threshold", ctypes.c_double)]


def long(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def features(batch: int, channels: int, h: int, w: int, classes: int = 2):
    of = Features(batch, channels, h, w, classes, F32, F32, 0)
    return "activation_maps", [ctypes.byref(of), *[None] * 5]


def object_box(batch: int, h: int, w: int):
    return "object_box", [None, None, *long(batch, h, w, 8, 8), *[None] * 3]


def key_area_box(batch: int, h: int, w: int, dtype: int = F32):
    return "key_area_box", [ctypes.c_int(dtype), *[None] * 5, *long(batch, h, w, 8, 8), *[None] * 3]


def part_windows(batch: int, h: int, w: int):
    one = (ctypes.c_int64 * 1)(1)
    groups = Groups(SHAPES, one, one, 1, 0.25)
    return "part_windows", [None, ctypes.byref(groups), *long(batch, h, w, 8, 8), *[None] * 4]


def suppress_artifacts(batch: int, h: int, w: int, height: int, width: int):
    sizes = [*long(batch, h, w, height, width), ctypes.c_double(0.6), ctypes.c_double(0.15)]
    return "suppress_artifacts", [None, None, *sizes, None, None]


def map_boxes(batch: int):
    return "map_boxes", [None, None, ctypes.c_double(0.5), None, None, *long(batch, 3, 8, 8), None, None]


@pytest.mark.parametrize(
    "call",
    [
        features(1, 1, 2**16, 2**15),
        features(1, 2**21, 32, 32),
        features(2**21, 1, 32, 32),
        features(1, 1, 4, 4, classes=9),
        object_box(1, 65, 4),
        object_box(1, 4, 65),
        object_box(INT32 + 1, 4, 4),
        key_area_box(1, 65, 4),
        key_area_box(1, 4, 65, F64),
        key_area_box(INT32 + 1, 4, 4),
        part_windows(1, 65, 4),
        part_windows(1, 4, 65),
        part_windows(INT32 + 1, 4, 4),
        suppress_artifacts(1, 65, 4, 8, 8),
        suppress_artifacts(1, 4, 65, 8, 8),
        suppress_artifacts(1, 4, 4, 2**16, 2**15),
        map_boxes(INT32 + 1),
    ],
    ids=lambda call: call[0],
)
def test_c_functions_refuse(simt: ctypes.CDLL, call: tuple[str, list]) -> None:
    name, arguments = call
    assert getattr(simt, f"scaphoid_{name}_cuda")(*arguments) == INVALID


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of any size, without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def windows(h: int = 4, shapes: int = 1, groups: int = 1, count: int = 1) -> tuple:
    return meta(1, h, 4), 8, 8, [1, 1] * shapes, [shapes - groups + 1, *[1] * (groups - 1)], [count] * groups, 0.25


LAYERS = (meta(4), meta(1), meta(65), meta(1))
CASES: dict[str, tuple[str, Callable[[], tuple], str]] = {
    "features of an image": (
        "activation_maps",
        lambda: (meta(1, 2**21, 32, 32), meta(2, 2**21)),
        "an image's features",
    ),
    "cells of all maps": ("activation_maps", lambda: (meta(2**21, 1, 32, 32), meta(2, 1)), "cells of all maps"),
    "object map": (
        "object_box",
        lambda: (meta(1, 65, 4), meta(1, 65, 4), 8, 8),
        "activation must have at most 64 cells",
    ),
    "object images": (
        "object_box",
        lambda: (meta(INT32 + 1, 1, 1), meta(INT32 + 1, 1, 1), 8, 8),
        "at most 2\\^31 - 1 im",
    ),
    "key area map": ("key_area_box", lambda: (meta(1, 65, 4), *LAYERS, 8, 8), "activation must have at most 64 cells"),
    "window map": ("part_windows", lambda: windows(h=65), "activation must have at most 64 cells"),
    "window shapes": (
        "part_windows",
        lambda: windows(shapes=33),
        "window_shapes must be at most 32 shapes on CUDA; got 33",
    ),
    "window groups": ("part_windows", lambda: windows(shapes=17, groups=17), "at most 16 groups on CUDA; got 17"),
    "windows": ("part_windows", lambda: windows(count=65), "at most 64 windows on CUDA; got \\[65\\]"),
    "image": ("crop_resize", lambda: (meta(1, 3, 2**15, 2**15), meta(1, 1, 4), 8), "must each fit 32-bit offsets"),
    "strides": (
        "crop_resize",
        lambda: (meta(1, 1, 8, 2**29)[..., :: 2**27], meta(1, 1, 4), 8),
        "strides \\[4294967296, 4294967296, 536870912, 134217728\\]",
    ),
    "crop": ("crop_resize", lambda: (meta(1, 1, 8, 8), meta(1, 1, 4), 2**16), "fit 32-bit offsets.* size 65536"),
    "crops": ("crop_resize", lambda: (meta(2**16, 1, 1, 1), meta(2**16, 2**15, 4), 1), "the number of crops"),
    "gradient": (
        "crop_resize_backward",
        lambda: (meta(2**11, 1, 1, 2, 2), meta(2**11, 1, 2**10, 2**10), meta(2**11, 1, 4)),
        "image must have at most 2\\^31 - 1 pixels in all",
    ),
    "artefact map": (
        "suppress_artifacts",
        lambda: (meta(1, 1, 8, 8, dtype=torch.uint8), meta(1, 65, 4), 0.6, 0.15),
        "activation must have at most 64 cells",
    ),
    "artefact tiles": (
        "suppress_artifacts",
        lambda: (meta(2**30, 1, 17, 1, dtype=torch.uint8), meta(2**30, 1, 1), 0.6, 0.15),
        "at most 2\\^31 - 1 tiles",
    ),
    "mapped images": (
        "map_boxes",
        lambda: (
            *(meta(INT32 + 1, 1, 4), meta(INT32 + 1, 1), 0.5, meta(INT32 + 1, 4), 8, 8),
            meta(INT32 + 1, 2, dtype=torch.int32),
        ),
        "boxes must have at most 2\\^31 - 1 images on CUDA",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_registration_refuses(case: str) -> None:
    """The CUDA registration is called past the dispatcher, with tensors that have sizes and no memory."""
    if not library.cuda_architectures():
        pytest.skip("the op library was built without CUDA")
    name, arguments, said = CASES[case]
    op = getattr(torch.ops.scaphoid, name).default
    with pytest.raises(RuntimeError, match=f"scaphoid::{name}: .*{said}"):
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments())
