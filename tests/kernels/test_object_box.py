import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from scaphoid.kernels.object_box import largest_component, object_box, object_box_reference

SIDES = st.integers(1, 17)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    h=SIDES,
    w=SIDES,
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    levels=st.integers(0, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(random_maps, batch, h, w, height, width, levels, transposed, seed):
    activation = random_maps(seed, (batch, h, w), levels, transposed)
    class_activation = random_maps(seed + 1, (batch, h, w), levels)
    boxes, margin = object_box(activation, class_activation, height, width)
    expected_boxes, expected_margin = object_box_reference(activation, class_activation, height, width)
    torch.testing.assert_close(boxes, expected_boxes, rtol=0, atol=0)
    torch.testing.assert_close(margin, expected_margin)
    x0, y0, x1, y1 = boxes.unbind(1)
    assert ((x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height)).all()


@pytest.mark.parametrize(("h", "w"), [(3, 63), (5, 64), (4, 65), (7, 130), (1, 200)])
@pytest.mark.parametrize("kind", ["noise", "columns", "rows"])
def test_rows_longer_than_a_word_and_winding_components(random_maps, h, w, kind):
    """Corridors between the walls of a maze turn at every end: no single sweep follows them."""
    activation, class_activation = random_maps(h, (2, h, w), 2), random_maps(w, (2, h, w), 1)
    r, c = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    along, across, length = (r, c, h) if kind == "columns" else (c, r, w)
    if kind != "noise":
        turns = ((across % 4 == 1) & (along == length - 1)) | ((across % 4 == 3) & (along == 0))
        activation[:] = ((across % 2 == 0) | turns).float()
    ours = object_box(activation, class_activation, 211, 307)
    torch.testing.assert_close(ours, object_box_reference(activation, class_activation, 211, 307), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (14, 14), (5, 33), (64, 64)])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_cuda_under_the_simt_executor(simt, random_maps, h, w, levels):
    maps = [random_maps(seed, (2, h, w), levels) for seed in (1, 2)]
    maps[0][1, h // 2, w // 2] = math.nan if levels == 2 else 3.0
    expected = object_box_reference(*maps, 211, 307)
    for seed in range(2):
        simt.scaphoid_simt_seed(seed)
        boxes, margin = torch.full((2, 4), math.nan), torch.full((2,), math.nan)
        inputs = [ctypes.c_void_p(each.data_ptr()) for each in maps]
        outputs = [ctypes.c_void_p(each.data_ptr()) for each in (boxes, margin)]
        sizes = [ctypes.c_int64(each) for each in (2, h, w, 211, 307)]
        error = simt.scaphoid_object_box_cuda(*inputs, *sizes, *outputs, None)
        assert error == 0, simt.scaphoid_simt_error()
        assert torch.equal(boxes, expected[0])
        torch.testing.assert_close(margin, expected[1])
        ours = object_box(*maps, 211, 307)
        assert torch.equal(boxes, ours[0])
        assert torch.equal(margin, ours[1])


def test_component_agrees_with_scipy(random_maps):
    for seed in range(40):
        mask = random_maps(seed, (13, 11), 1) > 0
        labels, count = ndimage.label(mask.numpy(), structure=[[1] * 3] * 3)
        sizes = ndimage.sum_labels(mask.numpy(), labels, range(1, count + 1))
        expected = torch.from_numpy(labels == 1 + int(sizes.argmax()))
        assert torch.equal(largest_component(mask), expected)


def test_ties_go_to_the_first_cell_in_row_major_order():
    activation = torch.zeros(1, 5, 6)
    activation[0, 3:, 0] = 1  # two cells, met later in rows although further left
    activation[0, 0, 4:] = 1
    boxes, _ = object_box(activation, torch.zeros(1, 5, 6), 50, 60)
    assert boxes.tolist() == [[40, 0, 60, 10]]


def test_diagonal_cells_connect():
    activation = torch.eye(5)[None]
    activation[0, 0, 4] = 1  # alone, as 8 neighbours do not reach it
    boxes, _ = object_box(activation, torch.ones(1, 5, 5), 5, 5)
    assert boxes.tolist() == [[0, 0, 5, 5]]
    activation[0, 2, 2] = 0  # splits the diagonal: two of two cells and one alone
    assert object_box(activation, torch.ones(1, 5, 5), 5, 5)[0].tolist() == [[0, 0, 2, 2]]


def test_box_follows_the_cells_of_a_map_that_does_not_divide_the_image():
    activation, class_activation = torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)
    activation[0, 1, 2:5] = 1
    class_activation[0, 1, 3:] = 1
    boxes, margin = object_box(activation, class_activation, 100, 45)
    expected = torch.tensor([[3 * 45 / 7, 100 / 3, 5 * 45 / 7, 200 / 3]])
    torch.testing.assert_close(boxes, expected)
    torch.testing.assert_close(margin, torch.tensor([3 / 21]))  # the nearest: cells at 0, mean 3/21


def test_empty_intersection_is_the_whole_image():
    activation, class_activation = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    activation[0, 0, 0] = class_activation[0, 3, 3] = 1
    boxes, margin = object_box(activation, class_activation, 31, 17)
    assert boxes.tolist() == [[0, 0, 17, 31]]
    assert margin.item() == pytest.approx(1 / 16)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30, 0.1])
def test_constant_maps_cover_the_image_with_margin_zero(value):
    boxes, margin = object_box(torch.full((2, 9, 7), value), torch.full((2, 9, 7), value), 90, 70)
    assert boxes.tolist() == [[0, 0, 70, 90]] * 2
    assert margin.tolist() == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_map_that_is_not_finite_gives_the_whole_image_and_spares_its_neighbours(value, which):
    maps = [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    clean_boxes, clean_margin = object_box(*maps, 64, 64)
    maps[which][1, 2, 3] = value
    boxes, margin = object_box(*maps, 64, 64)
    assert boxes[1].tolist() == [0, 0, 64, 64]
    assert margin[1] == 0
    assert torch.equal(boxes[[0, 2]], clean_boxes[[0, 2]])
    assert torch.equal(margin[[0, 2]], clean_margin[[0, 2]])


def test_no_gradient_passes():
    activation = torch.rand(1, 4, 4, requires_grad=True)
    boxes, margin = object_box(activation, activation, 8, 8)
    assert not boxes.requires_grad
    assert not margin.requires_grad


@pytest.mark.parametrize(
    ("shapes", "size", "message"),
    [
        (((2, 3), (2, 3)), (8, 8), r"object_box: activation must be float32 \[B, h, w\], .* got float32 \[2, 3\]"),
        (((2, 3, 4), (2, 4, 3)), (8, 8), r"class_activation must be .* here \[2, 3, 4\]; got float32 \[2, 4, 3\]"),
        (((2, 0, 4), (2, 0, 4)), (8, 8), r"activation must have between 1 .* got float32 \[2, 0, 4\]"),
        (((2, 3, 4), (2, 3, 4)), (0, 8), r"height must be at least 1; got 0"),
        (((2, 3, 4), (2, 3, 4)), (8, -1), r"width must be at least 1; got -1"),
    ],
)
def test_refuses(shapes, size, message):
    with pytest.raises(RuntimeError, match=message):
        object_box(torch.zeros(shapes[0]), torch.zeros(shapes[1]), *size)


def test_refuses_another_dtype():
    with pytest.raises(RuntimeError, match=r"activation must be float32 .* got bfloat16 \[1, 3, 3\]"):
        object_box(torch.zeros(1, 3, 3, dtype=torch.bfloat16), torch.zeros(1, 3, 3), 8, 8)
