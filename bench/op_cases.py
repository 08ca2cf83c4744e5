"""What `scaphoid-bench ops` measures: every op at the product's sizes, what users have without it, the bar it must
reach and the bound that no implementation passes."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from scaphoid.bench import op_baselines as baselines
from scaphoid.bench.peaks import last_level_cache_mib, read_memory
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.stages.part_crops import IOU_THRESHOLD, KEPT, window_groups

BATCH = 8
MAP = 14
CHANNELS = 2048  # of ResNet-50's last feature map
PRODUCT = MsfmConfig()
IMAGE = PRODUCT.image_size
PART = PRODUCT.part_size
WINDOWS = sum(KEPT)
CACHES = 8  # what is to come from memory is so many times as large as the last-level cache

Run = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One way to do the work. A `run` makes `calls` calls, each on other memory where there are several."""

    name: str
    run: Run
    calls: int = 1


@dataclass(frozen=True)
class Bar:
    """At least so many times as fast as the best baseline, or at most so many times as slow as the bound."""

    times: float
    of_bound: bool = False

    def __str__(self) -> str:
        return f"at most {self.times:g} x the bound" if self.of_bound else f"at least {self.times:g} x the baseline"


@dataclass(frozen=True)
class Op:
    """An op on one kind of input. `difference(result, baseline's result)` must not exceed `tolerance`; `measure` says
    in words what the difference is. `bounds`: the least that any implementation does here; the fastest counts."""

    op: Contender
    difference: Callable[[object, object], float]
    measure: str
    tolerance: float
    bar: Bar | None = None
    bounds: tuple[Contender, ...] = ()


@dataclass(frozen=True)
class Case:
    """Ops that are held against the same baselines, measured together. `kept`: in a process that keeps freed memory
    (memory.py)."""

    name: str
    input: str
    ops: tuple[Op, ...]
    baselines: tuple[Contender, ...]
    kept: bool = False


class Unavailable(Exception):
    """A case that cannot be measured here, and why."""


def blobs(generator: torch.Generator, *shape: int) -> Tensor:
    """Maps as encoders give them: a few smooth hills, and noise so that no two cells are equal. float32 `[*shape]`."""
    hills = torch.rand(*shape[:-2], 4, 4, generator=generator)
    smooth = functional.interpolate(hills.view(-1, 1, 4, 4), shape[-2:], mode="bicubic").view(shape)
    return smooth + 0.02 * torch.rand(shape, generator=generator)


def pictures(generator: torch.Generator) -> Tensor:
    """Grey uint8 images `[BATCH, 1, IMAGE, IMAGE]`, smooth with noise."""
    return (blobs(generator, BATCH, 1, IMAGE, IMAGE) * 200).clamp(0, 255).to(torch.uint8)


def largest(result: object, expected: object) -> float:
    """Largest difference of two tensors' elements; of several tensors, of those that both have."""
    if isinstance(result, Tensor) and isinstance(expected, Tensor):
        if result.shape != expected.shape:
            return math.nan
        return (result.detach().double() - expected.detach().double()).abs().max().item()
    pairs = zip(_listed(result), _listed(expected), strict=False)
    return max(largest(a, b) for a, b in pairs)


def _listed(result: object) -> Sequence:
    return result if isinstance(result, Sequence) else [result]


def relative(result: object, expected: object) -> float:
    """`largest`, as a share of the largest magnitude expected in that tensor."""
    pairs = zip(_listed(result), _listed(expected), strict=False)
    return max(largest(a, b) / b.abs().max().item() for a, b in pairs)


def part_windows_case(device: torch.device, generator: torch.Generator) -> Case:
    from scaphoid.kernels.part_windows import part_windows

    maps = blobs(generator, BATCH, MAP, MAP).to(device)
    groups = window_groups(MAP, MAP)
    shapes = [side for group in groups for shape in group for side in shape]
    arguments = (IMAGE, IMAGE, shapes, [len(group) for group in groups], list(KEPT), IOU_THRESHOLD)
    pooled = baselines.PooledWindows(MAP, MAP, groups, KEPT, IOU_THRESHOLD, IMAGE / MAP)
    op = Op(
        Contender("part_windows", lambda: part_windows(maps, *arguments)),
        largest,
        "corners (pixels) and scores",
        1e-5,
        Bar(20),
        (Contender("the op's call without an image", lambda: part_windows(maps[:0], *arguments)),),
    )
    named = f"{len(shapes) // 2} avg_pool2d over the batch, NumPy NMS an image and group"
    return Case("part_windows", f"{BATCH} maps {MAP} x {MAP}", (op,), (Contender(named, lambda: pooled(maps)),))


def object_box_case(device: torch.device, generator: torch.Generator) -> Case:
    from scaphoid.kernels.object_box import object_box

    if find_spec("skimage") is None:
        raise Unavailable("its baseline needs scikit-image: pip install 'scaphoid[dev]'")
    maps = blobs(generator, BATCH, MAP, MAP).to(device)
    class_maps = (0.7 * maps + 0.3 * blobs(generator, BATCH, MAP, MAP).to(device)).abs()
    op = Op(
        Contender("object_box", lambda: object_box(maps, class_maps, IMAGE, IMAGE)),
        largest,
        "corners (pixels)",
        1e-4,
        Bar(20),
        (Contender("the op's call without an image", lambda: object_box(maps[:0], class_maps[:0], IMAGE, IMAGE)),),
    )
    named = "skimage.measure.label an image, bincount, bounding box in NumPy"
    baseline = Contender(named, lambda: baselines.labelled_box(maps, class_maps, IMAGE / MAP))
    return Case("object_box", f"{BATCH} pairs of maps {MAP} x {MAP}", (op,), (baseline,))


def windows_of(generator: torch.Generator) -> Tensor:
    """Boxes `[BATCH, WINDOWS, 4]` as `part_windows` gives them: placements of its shapes, in pixels."""
    shapes = [shape for group in window_groups(MAP, MAP) for shape in group]
    boxes = []
    for number in range(BATCH * WINDOWS):
        h, w = shapes[number % len(shapes)]
        top = torch.randint(MAP - h + 1, (), generator=generator).item()
        left = torch.randint(MAP - w + 1, (), generator=generator).item()
        boxes.append([left, top, left + w, top + h])
    return (torch.tensor(boxes) * (IMAGE / MAP)).view(BATCH, WINDOWS, 4)


def crop_resize_case(device: torch.device, generator: torch.Generator, kept: bool) -> Case:
    """`kept`: as in a server or a training run, which soon take freed memory again. Otherwise the float crops lie in
    fresh pages in every call, as glibc's default has it for blocks above 32 MiB."""
    from scaphoid.kernels.crop_resize import crop_resize

    if not kept and device.type != "cpu":
        raise Unavailable("on a GPU torch keeps freed memory by itself")

    grey = pictures(generator).to(device)
    colour = grey.float().repeat(1, 3, 1, 1)
    last = colour.contiguous(memory_format=torch.channels_last)
    boxes = windows_of(generator).to(device)
    pages = "" if kept else ", fresh pages"

    def writing(image: Tensor) -> Contender:
        shape = (BATCH, WINDOWS, image.shape[1], PART, PART)
        name = f"writing the crops' {math.prod(shape) * image.element_size() / 1e6:.1f} MB to a new tensor{pages}"
        return Contender(name, lambda: torch.empty(shape, dtype=image.dtype, device=device).fill_(1))

    def together(crops: object) -> Tensor:
        return torch.cat(crops) if isinstance(crops, list) else crops

    float_op = Op(
        Contender(f"crop_resize, 3 channels float32{pages}", lambda: crop_resize(colour, boxes, PART)),
        lambda result, expected: largest(result, together(expected)),
        "pixels (grey levels of 255)",
        0.02,  # of float32 positions: some 1e-5 of a pixel at 448, times slopes of up to 255
        Bar(2.5) if kept else None,
        (writing(colour),),
    )
    byte_op = Op(
        Contender("crop_resize, 1 channel uint8", lambda: crop_resize(grey, boxes, PART)),
        lambda result, expected: largest(result, together(expected)[:, :, :1]),
        "pixels (grey levels of 255, one being rounded)",
        0.52,
        Bar(8),
        (writing(grey),),
    )
    forms = (
        Contender("grid_sample, one call", lambda: baselines.grid_sample_batch(colour, boxes, PART)),
        Contender("grid_sample, one call, channels last", lambda: baselines.grid_sample_batch(last, boxes, PART)),
        Contender("grid_sample, a call an image", lambda: baselines.grid_sample_list(colour, boxes, PART)),
        Contender("grid_sample, a call an image, channels last", lambda: baselines.grid_sample_list(last, boxes, PART)),
    )
    size = f"{BATCH} images x {WINDOWS} windows, {IMAGE} -> {PART}; grids stack an image's windows, 3 channels float32"
    if kept:
        return Case("crop_resize", f"{size}; freed memory kept", (float_op, byte_op), forms, kept=True)
    return Case("crop_resize_fresh_pages", size, (float_op,), forms)


def crop_resize_backward_case(device: torch.device, generator: torch.Generator) -> Case:
    from scaphoid.kernels.crop_resize import crop_resize

    image = pictures(generator)[:2].float().repeat(1, 3, 1, 1).to(device)
    boxes = (0.91 * windows_of(generator)[:2] + 13.7).to(device)  # on pixel centres bilinear slopes are ambiguous
    op = Op(
        Contender("crop_resize_backward", baselines.gradients(crop_resize, image, boxes, PART)),
        relative,
        "gradients (share of the largest)",
        1e-3,
        bounds=(
            Contender("a copy of the incoming gradient", torch.ones(2, WINDOWS, 3, PART, PART, device=device).clone),
        ),
    )
    baseline = Contender(
        "grid_sample, one call, backward", baselines.gradients(baselines.grid_sample_batch, image, boxes, PART)
    )
    size = f"2 images x {WINDOWS} windows, {IMAGE} -> {PART}, 3 channels float32; gradient to image and boxes"
    return Case("crop_resize_backward", size, (op,), (baseline,))


def key_area_box_case(device: torch.device, generator: torch.Generator) -> Case:
    from scaphoid.kernels.key_area_box import key_area_box

    maps = blobs(generator, BATCH, MAP, MAP).to(device)
    layers = tuple(0.1 * torch.randn(n, generator=generator).to(device) for n in (MAP, 1, MAP, 1))
    op = Op(
        Contender("key_area_box", lambda: key_area_box(maps, *layers, IMAGE, IMAGE)),
        largest,
        "corners (pixels)",
        1e-3,
        Bar(3),
        (Contender("the op's call without an image", lambda: key_area_box(maps[:0], *layers, IMAGE, IMAGE)),),
    )
    baseline = Contender(
        "eager torch over the batch", lambda: baselines.eager_key_area_box(maps, *layers, IMAGE, IMAGE)
    )
    return Case("key_area_box", f"{BATCH} maps {MAP} x {MAP}", (op,), (baseline,))


def suppress_artifacts_case(device: torch.device, generator: torch.Generator) -> Case:
    from scaphoid.kernels.suppress_artifacts import suppress_artifacts

    image, maps = pictures(generator).to(device), blobs(generator, BATCH, MAP, MAP).to(device)
    arguments = (image, maps, PRODUCT.theta, PRODUCT.r)

    def share_of_pixels(result: object, expected: object) -> float:
        return ((result.int() - expected.int()).abs() > 1).double().mean().item()  # 30 * 0.15 rounds either way

    op = Op(
        Contender("suppress_artifacts", lambda: suppress_artifacts(*arguments)),
        share_of_pixels,
        "share of the pixels that differ by more than 1",
        1e-4,  # those on the contour, where float32 and float64 may fall apart
        Bar(3),
        (Contender("a copy of the images", image.clone),),
    )
    forms = (
        Contender("interpolate, where", lambda: baselines.eager_suppress_where(*arguments)),
        Contender("interpolate, multiply by a mask", lambda: baselines.eager_suppress_mask(*arguments)),
    )
    return Case("suppress_artifacts", f"{BATCH} images {IMAGE} x {IMAGE}, maps {MAP} x {MAP}", (op,), forms)


def activation_maps_case(device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> Case:
    """Rotates through more feature maps than the last-level cache holds: in the product other work lies between two
    calls. One call of a bound reads as many bytes."""
    if find_spec("scaphoid.kernels.activation_maps") is None:
        raise Unavailable("the op is not in this op library")
    from scaphoid.kernels.activation_maps import activation_maps

    shape = (BATCH, CHANNELS, MAP, MAP)
    count = max(2, math.ceil(CACHES * last_level_cache_mib() * 2**20 / (math.prod(shape) * dtype.itemsize)))
    features = [torch.rand(shape, generator=generator).to(device, dtype) for _ in range(count)]
    for each in features:
        each.view(torch.int32).bitwise_or_(0x02020202)  # no byte is 1, so that `read_memory` reads them all
    weight = torch.randn(2, CHANNELS, generator=generator).to(device)
    maps = (
        lambda each: activation_maps(each, weight),
        baselines.eager_activation_maps,
        baselines.product_activation_maps,
    )

    def over_all(work: Callable[[Tensor], object]) -> Run:
        """Results of the last one."""
        return lambda: [work(each) for each in features][-1]

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    bounds = [Contender("torch.amax of as many bytes", over_all(lambda each: each.view(torch.int32).amax()), count)]
    if device.type == "cpu":
        bounds.append(
            Contender("memchr over as many bytes", over_all(lambda each: read_memory(each, pool, threads)), count)
        )
    name = f"activation_maps, {str(dtype).removeprefix('torch.')}"
    op = Op(
        Contender(name, over_all(maps[0]), count),
        relative,
        "maps (share of the largest)",
        1e-4,
        Bar(1.3, of_bound=True),
        tuple(bounds),
    )
    forms = (
        Contender("eager: sum, products, norm", over_all(lambda each: maps[1](each, weight)), count),
        Contender("eager: one matrix product", over_all(lambda each: maps[2](each, weight)), count),
    )
    mib = count * features[0].nbytes / 2**20
    return Case(name, f"F {list(shape)}, 2 classes; {count} of them in turn, {mib:.0f} MiB", (op,), forms)


def map_boxes_case(device: torch.device, generator: torch.Generator) -> Case:
    from scaphoid.kernels.map_boxes import map_boxes

    boxes = windows_of(generator).to(device)
    scores = torch.rand(BATCH, WINDOWS, generator=generator).to(device)
    objects = torch.tensor([[32.0, 64.0, 384.0, 416.0]], device=device).repeat(BATCH, 1)
    sizes = torch.tensor([[2000, 1500]], dtype=torch.int32, device=device).repeat(BATCH, 1)
    arguments = (PRODUCT.gamma, objects, IMAGE, IMAGE, sizes)
    nothing = (boxes[:0], scores[:0], PRODUCT.gamma, objects[:0], IMAGE, IMAGE, sizes[:0])
    op = Op(
        Contender("map_boxes", lambda: map_boxes(boxes, scores, *arguments)),
        largest,
        "corners (original pixels)",
        1e-2,
        bounds=(Contender("the op's call without an image", lambda: map_boxes(*nothing)),),
    )
    baseline = Contender("eager torch over the batch", lambda: baselines.eager_map_boxes(boxes, scores, *arguments))
    return Case("map_boxes", f"{BATCH} images x {WINDOWS} windows", (op,), (baseline,))


CASES: dict[str, Callable[[torch.device, torch.Generator], Case]] = {
    "activation_maps_float32": lambda device, generator: activation_maps_case(device, generator, torch.float32),
    "activation_maps_bfloat16": lambda device, generator: activation_maps_case(device, generator, torch.bfloat16),
    "object_box": object_box_case,
    "key_area_box": key_area_box_case,
    "part_windows": part_windows_case,
    # Before the case that keeps memory: blocks that it left behind would be taken again.
    "crop_resize_fresh_pages": lambda device, generator: crop_resize_case(device, generator, kept=False),
    "crop_resize": lambda device, generator: crop_resize_case(device, generator, kept=True),
    "crop_resize_backward": crop_resize_backward_case,
    "suppress_artifacts": suppress_artifacts_case,
    "map_boxes": map_boxes_case,
}
