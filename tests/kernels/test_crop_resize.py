import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaphoid.kernels.crop_resize import crop_resize, crop_resize_reference

SIDES = st.integers(1, 37)
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
LAYOUTS = ["contiguous", "channels_last", "transposed"]


def boxes_for(image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return boxes if image.dtype == torch.float64 else boxes.float()


def draw_image(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, shape, generator=generator).to(dtype)
    if layout == "channels_last":
        return image.to(memory_format=torch.channels_last)
    return image.flip(3).transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else image


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 3),
    n=st.integers(0, 4),
    channels=st.integers(0, 3),
    height=SIDES,
    width=SIDES,
    size=SIDES,
    dtype=st.sampled_from([torch.uint8, *FLOATS]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(random_boxes, batch, n, channels, height, width, size, dtype, layout, seed):
    image = draw_image(seed, (batch, channels, height, width), dtype, layout)
    boxes = boxes_for(image, random_boxes(seed, batch, n, height, width))
    crops = crop_resize(image, boxes, size)
    assert crops.dtype == dtype
    assert crops.shape == (batch, n, channels, size, size)
    assert crops.is_contiguous()
    assert torch.equal(crops, crop_resize_reference(image, boxes, size))  # the same arithmetic in the same order
    exact = crop_resize_reference(image.double(), boxes.double(), size)
    # Positions of float32 in up to 60 pixels are off by a few 1e-6 pixels, of 255 grey levels each.
    torch.testing.assert_close(crops.double(), exact, rtol=2 * eps(dtype), atol=0.51 if dtype == torch.uint8 else 1e-2)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2),
    n=st.integers(0, 3),
    channels=st.integers(0, 2),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    size=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_gradients_match_reference(random_boxes, batch, n, channels, height, width, size, layout, seed):
    image = draw_image(seed, (batch, channels, height, width), torch.float64, layout).requires_grad_()
    boxes = random_boxes(seed, batch, n, height, width).requires_grad_()
    weight = torch.rand(batch, n, channels, size, size, dtype=torch.float64)
    grads = [
        torch.autograd.grad((op(image, boxes, size) * weight).sum(), (image, boxes))
        for op in (crop_resize, crop_resize_reference)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck(random_boxes):
    image = torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    boxes = random_boxes(1, 1, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda image, boxes: crop_resize(image, boxes, 3), (image, boxes))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_float32_rounded_once(random_boxes, dtype):
    """Also halves of any size, infinite ones included, and gradients: summed in float32, rounded at the end."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = bits.view(dtype).reshape(1, 1, 256, 256)
    image = torch.where(every.isnan(), 1, every)
    boxes = random_boxes(5, 1, 3, 256, 256).float()
    expected = crop_resize(image.float(), boxes, 93).to(dtype)
    torch.testing.assert_close(crop_resize(image, boxes, 93), expected, rtol=0, atol=0, equal_nan=True)
    image = torch.rand(1, 2, 30, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.rand(1, 3, 2, 17, 17).to(dtype)
    ours = torch.ops.scaphoid.crop_resize_backward(grad, image, boxes / 6)
    exact = torch.ops.scaphoid.crop_resize_backward(grad.float(), image.float(), boxes / 6)
    assert torch.equal(ours[0], exact[0].to(dtype))
    assert torch.equal(ours[1], exact[1])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_comes_back(dtype):
    """Images of one pixel: all finite values, read and written unchanged."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    image = bits.view(dtype)[bits.view(dtype).isfinite()].reshape(-1, 1, 1, 1)
    crops = crop_resize(image, torch.tensor([0.0, 0, 1, 1]).expand(len(image), 1, 4), 1)
    assert torch.equal(crops.flatten(), image.flatten())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [7, 64, 333])
def test_from_strong_enlargement_to_strong_reduction(dtype, layout, size):
    """Outputs that share a pixel, and outputs so far apart that the columns between them are not read."""
    image = draw_image(1, (1, 3, 23, 1001), dtype, layout)
    widths = torch.tensor([0.5, 30, 400, 1000.5, 4000])
    boxes = torch.stack([widths * 0, widths * 0 + 1.5, widths, widths * 0 + 20], 1)[None]
    boxes = torch.cat([boxes, boxes[:, :, [2, 1, 0, 3]]], 1)  # mirrored too
    assert torch.equal(crop_resize(image, boxes, size), crop_resize_reference(image, boxes, size))


def test_no_gradient_through_uint8():
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]).requires_grad_()
    assert not crop_resize(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), boxes, 3).requires_grad


def test_gradient_in_float32_follows_float64(random_boxes):
    generator = torch.Generator().manual_seed(0)
    image, boxes = torch.rand(2, 1, 33, 29, generator=generator), random_boxes(2, 2, 2, 33, 29).float()
    grads = []
    for dtype in (torch.float32, torch.float64):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (image, boxes)]
        grads.append(torch.autograd.grad(crop_resize(*inputs, 17).square().sum(), inputs))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)


def test_gradient_of_the_whole_image_at_its_size():
    """Every position sits on a pixel, the outermost on the border of what clamping allows."""
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[0, 0, 6, 6]]], dtype=torch.float64).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(op(image, boxes, 6).square().sum(), boxes)[0] for op in (crop_resize, crop_resize_reference)
    )
    torch.testing.assert_close(ours, theirs)


def test_agrees_with_grid_sample(random_boxes):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 2, 31, 45, dtype=torch.float64, generator=generator)
    boxes = random_boxes(3, 3, 1, 31, 45)
    x0, y0, x1, y1 = (boxes[:, 0] / torch.tensor([45, 31, 45, 31]) * 2 - 1).unbind(1)
    zero = torch.zeros_like(x0)
    rows = ((x1 - x0) / 2, zero, (x0 + x1) / 2, zero, (y1 - y0) / 2, (y0 + y1) / 2)
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1).view(3, 2, 3), [3, 2, 19, 19], align_corners=False)
    expected = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(crop_resize(image, boxes, 19)[:, 0], expected)


def test_whole_image_at_its_size_is_the_image():
    image = draw_image(0, (2, 1, 448, 448), torch.uint8, "contiguous")
    boxes = torch.tensor([0.0, 0.0, 448.0, 448.0]).expand(2, 1, 4)
    assert torch.equal(crop_resize(image, boxes, 448)[:, 0], image)


def test_uint8_rounds_half_to_even():
    image = torch.tensor([[[[0, 1, 2, 3, 254, 255]]]], dtype=torch.uint8)
    boxes = torch.tensor([[[x + 0.5, 0, x + 1.5, 1] for x in range(5)]])
    assert crop_resize(image, boxes, 1).flatten().tolist() == [0, 2, 2, 128, 254]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 1, 1, 1), [[2.5, 2.5], [2.5, 2.5]]),  # empty: the point between four pixels
        ((2, 0, 0, 2), [[2, 1], [4, 3]]),  # reversed: mirrored
        ((-9, -9, -5, -5), [[1, 1], [1, 1]]),  # past a corner: its pixel
        ((5, 0, 9, 2), [[2, 2], [4, 4]]),  # past the right border: its column
        ((math.nan, 0, 2, 2), [[1, 1], [3, 3]]),  # not a number: pixel 0
        ((-math.inf, 0, math.inf, 2), [[1, 1], [3, 3]]),  # infinity less infinity: pixel 0
        ((math.inf, 0, math.inf, 2), [[1, 1], [3, 3]]),
        ((1e30, 0, 2e30, 2), [[2, 2], [4, 4]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_that_are_degenerate_or_outside(box, expected, dtype):
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=dtype)
    boxes = torch.tensor([[box]], dtype=dtype)
    assert crop_resize(image, boxes, 2)[0, 0, 0].tolist() == expected
    assert crop_resize_reference(image, boxes, 2)[0, 0, 0].tolist() == expected


def test_gradients_of_degenerate_boxes_are_finite():
    image = torch.rand(1, 1, 4, 4, requires_grad=True)
    boxes = torch.tensor([[[1, 1, 1, 1], [math.nan, 0, 2, 2], [-9, -9, -5, -5]]]).float().requires_grad_()
    crop_resize(image, boxes, 3).sum().backward()
    assert torch.isfinite(image.grad).all()
    assert torch.isfinite(boxes.grad).all()
    assert boxes.grad[0, 2].tolist() == [0] * 4


def test_pixels_that_are_not_finite_spread_to_their_readers_only():
    image = torch.zeros(2, 1, 8, 8)
    image[0, 0, 0, 0] = math.nan
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 8.0, 8.0]]).expand(2, 2, 4)
    crops = crop_resize(image, boxes, 4)
    assert torch.isnan(crops[0, 0, 0]).nonzero().tolist() == [[0, 0]]
    assert torch.isfinite(crops[0, 1]).all()
    assert torch.isfinite(crops[1]).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_threads_do_not_change_the_result(random_boxes, dtype):
    """Large enough to be split, at rows inside a crop."""
    image = draw_image(0, (2, 2, 211, 197), dtype, "contiguous")
    boxes = random_boxes(4, 2, 3, 211, 197).float()
    threads = torch.get_num_threads()
    try:
        crops = []
        for count in (1, 3):
            torch.set_num_threads(count)
            crops.append(crop_resize(image, boxes, 227))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*crops)


def test_strides_beyond_32_bits():
    storage = torch.empty(2**32 + 8, dtype=torch.uint8)  # untouched pages cost nothing
    image = storage.as_strided((1, 1, 2, 3), (1, 1, 2**32 - 5, 2))
    image[:] = torch.tensor([[10, 20, 30], [40, 50, 60]])
    boxes = torch.tensor([[[0.0, 0.0, 3.0, 2.0]]])
    expected = crop_resize(image.contiguous(), boxes, 5)
    assert torch.equal(crop_resize(image, boxes, 5), expected)
    assert expected.max() == 60


def test_no_channels_take_no_time():
    crops = crop_resize(torch.rand(1, 0, 4, 4), torch.rand(1, 1, 4), 1 << 24)
    assert crops.shape == (1, 1, 0, 1 << 24, 1 << 24)


@pytest.mark.parametrize(
    ("image", "boxes", "size", "message"),
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), torch.zeros(1, 2, 4), 3, r"image must be uint8, .* got int32"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 2, 4), 3, r"image must be float32 \[B, C, H, W\], .* \[1, 4, 4\]"),
        (torch.zeros(1, 1, 0, 4), torch.zeros(1, 2, 4), 3, r"image must have at least one pixel; got .*\[1, 1, 0, 4\]"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 2, 4), 3, r"boxes must be .* here \[2, \*, 4\]; got .* \[1, 2, 4\]"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 4), 3, r"boxes must be float32 \[B, n, 4\], .* got float32 \[1, 4\]"),
        (torch.zeros(1, 1, 4, 4).double(), torch.zeros(1, 1, 4), 3, r"boxes must be float64 .* got float32"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), 0, r"crop_resize: size must be at least 1; got 0"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), 2**24 + 1, r"size must be at most 16777216; got 16777217"),
        (torch.zeros(1).expand(1, 1, 1, 2**25), torch.zeros(1, 1, 4), 1, r"image sides must be at most 16777216; got"),
    ],
)
def test_refuses(image, boxes, size, message):
    with pytest.raises(RuntimeError, match=message):
        crop_resize(image, boxes, size)


def test_backward_refuses():
    backward = torch.ops.scaphoid.crop_resize_backward
    image, boxes = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError, match=r"grad must be \[B, n, C, size, size\]; got float32 \[1, 3, 3\]"):
        backward(torch.zeros(1, 3, 3), image, boxes)
    with pytest.raises(RuntimeError, match=r"grad must be .* here \[1, 2, 1, 3, 3\]; got float32 \[1, 2, 1, 2, 3\]"):
        backward(torch.zeros(1, 2, 1, 2, 3), image, boxes)
    with pytest.raises(RuntimeError, match=r"image must be float16, .* or float64; got uint8"):
        backward(torch.zeros(1, 2, 1, 3, 3), image.byte(), boxes)


@pytest.mark.parametrize(("to_image", "to_boxes"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_only_wanted_gradients_are_computed(random_boxes, dtype, to_image, to_boxes):
    image = draw_image(3, (2, 2, 11, 9), dtype, "contiguous")
    boxes = boxes_for(image, random_boxes(3, 2, 3, 11, 9))
    grad = torch.rand(2, 3, 2, 5, 5, dtype=dtype)
    backward = torch.ops.scaphoid.crop_resize_backward
    both = backward(grad, image, boxes)
    found = backward(grad, image, boxes, to_image=to_image, to_boxes=to_boxes)
    for wanted, whole, one in zip((to_image, to_boxes), both, found, strict=True):
        assert torch.equal(one, whole) if wanted else one.numel() == 0
    torch.library.opcheck(backward.default, (grad, image, boxes, True, to_image, to_boxes))


@pytest.mark.parametrize("leaf", ["image", "boxes"])
def test_autograd_asks_for_the_leaf_alone(random_boxes, leaf):
    tensors = {"image": torch.rand(1, 1, 7, 6), "boxes": random_boxes(4, 1, 2, 7, 6).float()}
    expected = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    crop_resize(expected["image"], expected["boxes"], 4).square().sum().backward()
    tensors[leaf].requires_grad_()
    crop_resize(tensors["image"], tensors["boxes"], 4).square().sum().backward()
    assert torch.equal(tensors[leaf].grad, expected[leaf].grad)


def test_deterministic_algorithms_are_asked_for():
    """The autograd formula hands torch's setting to the op, whose CUDA kernels it picks."""
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.scaphoid.crop_resize_backward.default:
                asked.append(len(args) > 3 and args[3])
            return func(*args, **(kwargs or {}))

    for deterministic in (False, True):
        image = torch.rand(1, 1, 5, 5, requires_grad=True)
        torch.use_deterministic_algorithms(deterministic)
        try:
            with Watch():
                crop_resize(image, torch.tensor([[[0.0, 0, 5, 5]]]), 3).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


class Crops(ctypes.Structure):
    """scaphoid_crops of scaphoid_ops.h."""

    _fields_ = [(f"size_{k}", ctypes.c_int64) for k in range(10)]

    @classmethod
    def of(cls, image: torch.Tensor, count: int, size: int) -> "Crops":
        return cls(*image.shape, *image.stride(), count, size)


DTYPES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}


def pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "size"), [("contiguous", 36), ("channels_last", 33), ("transposed", 5)])
def test_cuda_under_the_simt_executor(simt, random_boxes, dtype, layout, size):
    image = draw_image(3, (2, 2, 41, 30), dtype, layout)
    boxes = boxes_for(image, random_boxes(4, 2, 2, 41, 30))
    exact = crop_resize_reference(image.double(), boxes.double(), size)
    for seed in range(3):
        simt.scaphoid_simt_seed(seed)
        crops = torch.empty(2, 2, 2, size, size, dtype=dtype)
        of = Crops.of(image, 2, size)
        error = simt.scaphoid_crop_resize_cuda(ctypes.byref(of), DTYPES[dtype], *pointers(image, boxes, crops), None)
        assert error == 0, simt.scaphoid_simt_error()
        assert torch.equal(crops, crop_resize(image, boxes, size))
        torch.testing.assert_close(crops.double(), exact, rtol=2 * eps(dtype), atol=0.51 if not eps(dtype) else 1e-2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_gradients_under_the_simt_executor(simt, random_boxes, dtype, layout):
    """Deterministic: the CPU's bits whatever the schedule; atomic: near them. Both near autograd in float64."""
    image = (draw_image(3, (2, 2, 19, 37), torch.uint8, layout) / 255).to(dtype)
    boxes = boxes_for(image, random_boxes(4, 2, 7, 19, 37))
    grad = torch.rand(2, 7, 2, 18, 18, generator=torch.Generator().manual_seed(0)).to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (image, boxes)]
    exact = torch.autograd.grad(crop_resize_reference(*leaves, 18), leaves, grad.double())
    on_cpu = torch.ops.scaphoid.crop_resize_backward(grad, image, boxes)
    of = Crops.of(image, 7, 18)
    simt.scaphoid_crop_resize_backward_cuda_workspace.restype = ctypes.c_size_t
    workspace = torch.empty(simt.scaphoid_crop_resize_backward_cuda_workspace(ctypes.byref(of)), dtype=torch.uint8)
    for seed in range(3):
        simt.scaphoid_simt_seed(seed)
        for deterministic in (True, False):
            ours = boxes.new_full(image.shape, math.nan), torch.full_like(boxes, math.nan)
            arguments = [*pointers(grad, image, boxes), int(deterministic), *pointers(*ours, workspace), None]
            error = simt.scaphoid_crop_resize_backward_cuda(ctypes.byref(of), DTYPES[dtype], *arguments)
            assert error == 0, simt.scaphoid_simt_error()
            if deterministic:
                assert torch.equal(ours[0].to(dtype), on_cpu[0])
            for gradient, reference in zip(ours, exact, strict=True):
                torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours[1], on_cpu[1])
