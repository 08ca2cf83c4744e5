import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaphoid.kernels.suppress_artifacts import suppress_artifacts, suppress_artifacts_reference

SIDES = st.integers(1, 41)


def draw_image(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=SIDES,
    width=SIDES,
    h=st.integers(1, 15),
    w=st.integers(1, 15),
    theta=st.sampled_from([0.0, 0.37, 0.6, 1.0]),
    r=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(batch, height, width, h, w, theta, r, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    step = 2 if strided else 1
    image = draw_image(seed, batch, 1, height * step, width)[:, :, ::step]
    activation = torch.rand(batch, w, h, generator=generator).transpose(1, 2) - 0.2
    suppressed = suppress_artifacts(image, activation, theta, r)
    assert suppressed.shape == (batch, 1, height, width)
    assert torch.equal(suppressed, suppress_artifacts_reference(image, activation, theta, r))


def test_enlarges_as_interpolate_does():
    image, activation = draw_image(0, 2, 1, 113, 97), torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(0))
    maps = activation.double()[:, None]
    enlarged = torch.nn.functional.interpolate(maps, (113, 97), mode="bilinear", align_corners=False)
    expected = torch.where(enlarged < 0.6 * maps.amax((2, 3), keepdim=True), image, 0)
    assert torch.equal(suppress_artifacts(image, activation, 0.6, 0.0), expected)


def test_dims_what_is_not_below_the_threshold():
    """A map of the image's size is not interpolated."""
    activation = torch.tensor([[[1.0, 5.9, 6.0, 10.0]]])
    image = torch.full((1, 1, 1, 4), 200, dtype=torch.uint8)
    assert suppress_artifacts(image, activation, 0.6, 0.15).flatten().tolist() == [200, 200, 30, 30]


def test_rounds_half_to_even():
    image = torch.tensor([1, 3, 5, 7, 255], dtype=torch.uint8).reshape(1, 1, 1, 5)
    assert suppress_artifacts(image, torch.ones(1, 2, 2), 0.6, 0.5).flatten().tolist() == [0, 2, 2, 4, 128]


@pytest.mark.parametrize(("value", "dimmed"), [(2.5, True), (0.0, True), (-1.0, False)])
def test_constant_maps_follow_the_formula(value, dimmed):
    image = draw_image(0, 1, 1, 9, 7)
    suppressed = suppress_artifacts(image, torch.full((1, 3, 4), value), 0.6, 0.0)
    assert torch.equal(suppressed, torch.zeros_like(image) if dimmed else image)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_map_that_is_not_finite_leaves_its_image_alone(value):
    image, activation = draw_image(0, 3, 1, 23, 19), torch.rand(3, 5, 5)
    clean = suppress_artifacts(image, activation, 0.6, 0.15)
    activation[1, 2, 2] = value
    suppressed = suppress_artifacts(image, activation, 0.6, 0.15)
    assert torch.equal(suppressed[1], image[1])
    assert torch.equal(suppressed[[0, 2]], clean[[0, 2]])


def test_huge_strides():
    """Every image is the same memory; a map's cells lie far apart."""
    image, activation = draw_image(1, 1, 1, 11, 13), torch.rand(1, 3, 3)
    wide = torch.zeros(1, 3, 1 << 17)
    wide[..., ::60000] = activation
    suppressed = suppress_artifacts(image.expand(50, 1, 11, 13), wide[..., ::60000].expand(50, 3, 3), 0.6, 0.15)
    assert torch.equal(suppressed, suppress_artifacts(image, activation, 0.6, 0.15).expand(50, 1, 11, 13))


@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 3e38])
def test_extreme_magnitudes(magnitude):
    image, maps = draw_image(0, 2, 1, 23, 19), torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0))
    activation = maps * magnitude
    expected = suppress_artifacts_reference(image, activation, 0.6, 0.15)
    assert torch.equal(suppress_artifacts(image, activation, 0.6, 0.15), expected)


def test_threads_do_not_change_the_result():
    image, activation = draw_image(0, 2, 1, 301, 307), torch.rand(2, 14, 14)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(suppress_artifacts(image, activation, 0.6, 0.15))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("shapes", "theta", "r", "message"),
    [
        (((1, 3, 4, 4), (1, 2, 2)), 0.6, 0.15, r"image must be uint8 \[B, 1, H, W\], .* got uint8 \[1, 3, 4, 4\]"),
        (((1, 1, 0, 4), (1, 2, 2)), 0.6, 0.15, r"image must have at least one pixel; got uint8 \[1, 1, 0, 4\]"),
        (((2, 1, 4, 4), (1, 2, 2)), 0.6, 0.15, r"activation must be .* here \[2, 2, 2\]; got float32 \[1, 2, 2\]"),
        (((1, 1, 4, 4), (1, 2, 2)), math.inf, 0.15, r"suppress_artifacts: theta must be finite; got inf"),
        (((1, 1, 4, 4), (1, 2, 2)), 0.6, 1.5, r"r must be in \[0, 1\]; got 1.5"),
    ],
)
def test_refuses(shapes, theta, r, message):
    with pytest.raises(RuntimeError, match=message):
        suppress_artifacts(torch.zeros(shapes[0], dtype=torch.uint8), torch.zeros(shapes[1]), theta, r)


@pytest.mark.parametrize("theta", [0.6, 1.0, 0.0])
@pytest.mark.parametrize(
    ("sizes", "map_size", "levels"),
    [
        ((0, 1, 4, 4), (2, 2), 0),
        ((1, 1, 1, 1), (1, 1), 0),
        ((2, 1, 37, 45), (14, 14), 0),
        ((2, 1, 33, 48), (5, 7), 3),
        ((1, 1, 9, 544), (64, 64), 0),
    ],
)
def test_cuda_source_matches_reference(simt, sizes, map_size, levels, theta):
    """Under the SIMT executor, over schedules. `levels`: whole numbers, many of which lie on the threshold."""
    generator = torch.Generator().manual_seed(4)
    image, activation = draw_image(4, *sizes), torch.rand(sizes[0], *map_size, generator=generator)
    if levels:
        activation = (activation * levels).round()
    activation[1:2, 0, 0] = math.nan
    expected = suppress_artifacts_reference(image, activation, theta, 0.15)
    dimensions = [ctypes.c_int64(size) for size in (sizes[0], *map_size, *sizes[2:])]
    for seed in range(3):
        simt.scaphoid_simt_seed(seed)
        suppressed = torch.full_like(image, 7)
        image_at, map_at, out_at = (ctypes.c_void_p(each.data_ptr()) for each in (image, activation, suppressed))
        numbers = ctypes.c_double(theta), ctypes.c_double(0.15)
        error = simt.scaphoid_suppress_artifacts_cuda(image_at, map_at, *dimensions, *numbers, out_at, None)
        assert error == 0, simt.scaphoid_simt_error()
        assert torch.equal(suppressed, expected)
