import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaphoid.kernels.crop_resize import crop_resize
from scaphoid.kernels.key_area_box import key_area_box, key_area_box_reference

SIDES = st.integers(1, 15)


def draw_layers(seed: int, h: int, w: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) * scale for n in (w, 1, h, 1)]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 4),
    h=SIDES,
    w=SIDES,
    levels=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_boxes_margins_and_gradients_match_reference(random_maps, batch, h, w, levels, scale, transposed, dtype, seed):
    activation = random_maps(seed, (batch, h, w), levels, transposed).to(dtype)
    layers = [layer.to(dtype).requires_grad_() for layer in draw_layers(seed, h, w, scale)]
    results = [op(activation, *layers, 448, 333) for op in (key_area_box, key_area_box_reference)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)
    boxes = results[0][0].detach()
    limits = torch.tensor([333, 448, 333, 448])
    assert ((boxes >= 0) & (boxes <= limits)).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()

    weight = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours, theirs = (torch.autograd.grad((boxes * weight).sum(), layers) for boxes, _ in results)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("bias", [-2.0, 0.3, 4.0])
def test_gradcheck(bias):
    """Free centres (small boxes), and centres moved to either side (large ones)."""
    activation = torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layers = draw_layers(4, 5, 7, 0.1)
    layers[1] += bias
    layers[3] += bias
    layers = [layer.requires_grad_() for layer in layers]
    assert torch.autograd.gradcheck(lambda *layers: key_area_box(activation, *layers, 56, 40)[0], layers)


def test_centre_is_the_middle_of_the_peak_cell():
    activation = torch.zeros(1, 7, 7)
    activation[0, 3, 2] = 1
    layers = torch.zeros(7), torch.tensor([math.log(0.2 / 0.8)]), torch.zeros(7), torch.tensor([math.log(0.4 / 0.6)])
    boxes, margin = key_area_box(activation, *layers, 448, 448)
    x, y = 2.5 * 64, 3.5 * 64
    torch.testing.assert_close(boxes, torch.tensor([[x - 44.8, y - 89.6, x + 44.8, y + 89.6]]))
    torch.testing.assert_close(margin, torch.tensor([1 / 7]))


def test_margin_is_relative_to_the_maps_maximum_and_the_smaller_of_both_axes():
    """Column sums 4, 9, 5 of 2 cells; row sums 8, 10 of 3 cells: the range of the sums plays no part."""
    activation = torch.tensor([[2.0, 1.0, 5.0], [2.0, 8.0, 0.0]])
    layers = torch.zeros(3), torch.zeros(1), torch.zeros(2), torch.zeros(1)
    expected = torch.tensor([2 / (3 * 8), 2 / (3 * 8), 1 / (3 * 108), 0.0])
    maps = torch.stack((activation, activation * 5, activation / 2 + 104, torch.full((2, 3), 7.0)))
    torch.testing.assert_close(key_area_box(maps, *layers, 20, 30)[1], expected)


def test_ties_go_to_the_first_cell_and_have_margin_zero():
    activation = torch.zeros(1, 4, 8)
    activation[0, 1, [2, 5]] = 1
    layers = torch.zeros(8), torch.tensor([-3.0]), torch.zeros(4), torch.tensor([-3.0])
    boxes, margin = key_area_box(activation, *layers, 80, 80)
    assert boxes[0, [0, 2]].mean().item() == pytest.approx(25)
    assert margin.tolist() == [0]


def test_box_moved_inside_touches_the_border():
    activation = torch.zeros(2, 7, 7)
    activation[0, 0, 0] = activation[1, 6, 6] = 1
    layers = torch.zeros(7), torch.zeros(1), torch.zeros(7), torch.zeros(1)
    boxes, _ = key_area_box(activation, *layers, 448, 448)
    assert boxes.tolist() == [[0, 0, 224, 224], [224, 224, 448, 448]]


def test_crop_of_the_box_is_the_papers_sampling_grid():
    """KALM's grid [[w, 0, x], [0, h, y]] under affine_grid and grid_sample, the centre away from the border."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 64, 48, dtype=torch.float64, generator=generator)
    activation = torch.zeros(1, 8, 6, dtype=torch.float64)
    activation[0, 3, 2] = 1
    layers = draw_layers(1, 8, 6, 0.1)
    layers[1] -= 1
    layers[3] -= 1
    boxes, _ = key_area_box(activation, *layers, 64, 48)
    w, h = torch.sigmoid(layers[0][2] + layers[1]), torch.sigmoid(layers[2][3] + layers[3])
    x, y = torch.tensor([5 / 6 - 1]), torch.tensor([7 / 8 - 1])
    zero = torch.zeros(1)
    theta = torch.stack((torch.cat((w, zero, x)), torch.cat((zero, h, y))))[None]
    grid = torch.nn.functional.affine_grid(theta, [1, 1, 20, 20], align_corners=False)
    expected = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(crop_resize(image, boxes[:, None], 20)[:, 0], expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_map_that_is_not_finite_gives_the_whole_image_and_no_gradient(value):
    activation = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    layers = [layer.float().requires_grad_() for layer in draw_layers(0, 6, 5)]
    clean, _ = key_area_box(activation[[0, 2]], *layers, 60, 50)
    expected = torch.autograd.grad(clean.square().sum(), layers)
    activation[1, 3, 3] = value
    boxes, margin = key_area_box(activation, *layers, 60, 50)
    assert boxes[1].tolist() == [0, 0, 50, 60]
    assert margin[1] == 0
    assert torch.equal(boxes[[0, 2]], clean)
    for ours, theirs in zip(torch.autograd.grad(boxes.square().sum(), layers), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_huge_strides():
    """Every map is the same memory; its cells and the weights lie far apart."""
    layers = [layer.float() for layer in draw_layers(0, 3, 3)]
    activation = torch.rand(1, 3, 3)
    wide = torch.zeros(1, 3, 1 << 17)
    wide[..., ::60000] = activation
    far = torch.zeros(1 << 17)
    far[::60000] = layers[0]
    boxes, margin = key_area_box(wide[..., ::60000].expand(40, 3, 3), far[::60000], *layers[1:], 30, 20)
    expected = key_area_box(activation, *layers, 30, 20)
    assert torch.equal(boxes, expected[0].expand(40, 4))
    assert torch.equal(margin, expected[1].expand(40))


def test_layers_that_are_not_finite_or_saturate():
    activation = torch.rand(1, 4, 4)
    zeros, nan = torch.zeros(4), torch.tensor([math.nan])
    boxes, margin = key_area_box(activation, zeros, nan, zeros, torch.zeros(1), 40, 40)
    assert boxes.tolist() == [[0, 0, 40, 40]]
    assert margin.tolist() == [0]
    boxes, _ = key_area_box(activation, zeros, torch.tensor([1e4]), zeros, torch.tensor([-1e4]), 40, 40)
    assert boxes[0, [0, 2]].tolist() == [0, 40]
    assert boxes[0, 1] == boxes[0, 3]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 1, 5, 1), r"key_area_box: width_weight must be float32 \[w\], here \[5\]; got float32 \[6\]"),
        ((5, 2, 6, 1), r"width_bias must be float32 \[1\], here \[1\]; got float32 \[2\]"),
        ((5, 1, 5, 1), r"height_weight must be float32 \[h\], here \[6\]; got float32 \[5\]"),
        ((5, 1, 6, 0), r"height_bias must be float32 \[1\], here \[1\]; got float32 \[0\]"),
    ],
)
def test_refuses(sizes, message):
    with pytest.raises(RuntimeError, match=message):
        key_area_box(torch.zeros(1, 6, 5), *(torch.zeros(size) for size in sizes), 8, 8)


def test_refuses_mixed_precision():
    zeros = [torch.zeros(n, dtype=torch.float64) for n in (3, 1, 3, 1)]
    with pytest.raises(RuntimeError, match=r"width_weight must be float32 .* got float64"):
        key_area_box(torch.zeros(1, 3, 3), *zeros, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 1, 1), (3, 14, 14), (2, 33, 7), (2, 5, 64), (1, 64, 64)])
def test_cuda_source_matches_reference(simt, random_maps, shape, dtype):
    """Under the SIMT executor, over schedules; map 0 has ties, map 1 a cell that is not finite."""
    activation = random_maps(1, shape, 2).to(dtype)
    activation[1:2, -1, 0] = math.inf
    layers = [layer.to(dtype) for layer in draw_layers(2, *shape[1:])]
    expected = key_area_box_reference(activation, *layers, 448, 333)
    sizes = [ctypes.c_int64(size) for size in (*shape, 448, 333)]
    for seed in range(3):
        simt.scaphoid_simt_seed(seed)
        results = torch.full((shape[0], 4), math.nan, dtype=dtype), torch.full(shape[:1], math.nan, dtype=dtype)
        inputs = [ctypes.c_void_p(each.data_ptr()) for each in (activation, *layers)]
        outputs = [ctypes.c_void_p(each.data_ptr()) for each in results]
        number = 4 if dtype == torch.float64 else 3  # scaphoid_dtype
        error = simt.scaphoid_key_area_box_cuda(number, *inputs, *sizes, *outputs, None)
        assert error == 0, simt.scaphoid_simt_error()
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-4)
