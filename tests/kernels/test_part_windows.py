import ctypes
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from scaphoid.kernels.part_windows import list_windows, part_windows, part_windows_reference

MSFM_SHAPES = [6, 6, 7, 5, 8, 8, 6, 10, 7, 9, 10, 10, 9, 11, 8, 12]
MSFM = (MSFM_SHAPES, [2, 3, 3], [2, 2, 3], 0.25)


@st.composite
def cases(draw):
    """A map's size and groups of window shapes that fit it."""
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    counts = [draw(st.integers(0, 4)) for _ in sizes]
    shapes = [draw(st.integers(1, side)) for _ in range(sum(sizes)) for side in (h, w)]
    return h, w, shapes, sizes, counts, draw(st.sampled_from([0.0, 0.2, 0.25, 1 / 3, 1.0]))


@settings(max_examples=80, deadline=None)
@given(
    case=cases(),
    batch=st.integers(0, 3),
    levels=st.integers(0, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(random_maps, case, batch, levels, transposed, seed):
    h, w, *groups = case
    activation = random_maps(seed, (batch, h, w), levels, transposed)
    ours = part_windows(activation, 101, 77, *groups)
    theirs = part_windows_reference(activation, 101, 77, *groups)
    assert ours[0].shape == (batch, sum(groups[2]), 4)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)
    torch.testing.assert_close(ours[2], theirs[2])


class WindowGroups(ctypes.Structure):
    """scaphoid_window_groups."""

    _fields_ = (
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("shapes", "sizes", "counts")),
        ("groups", ctypes.c_int64),
        ("iou_threshold", ctypes.c_double),
    )


@pytest.mark.parametrize(
    ("h", "w", "groups"),
    [
        (14, 14, MSFM),
        (1, 1, ([1, 1], [1], [3], 0.25)),
        (5, 9, ([2, 3, 2, 3, 1, 1], [2, 1], [4, 9], 1.0)),
        (33, 64, ([16, 20, 9, 31], [2], [3], 1 / 3)),
        (4, 3, ([], [], [], 0.25)),
    ],
)
@pytest.mark.parametrize("levels", [0, 1, 9])
def test_cuda_under_the_simt_executor(simt, random_maps, h, w, groups, levels):
    activation = random_maps(h, (2, h, w), levels)
    activation[1, h // 2, w // 2] = math.inf if levels == 9 else 0.5
    expected, ours = part_windows_reference(activation, 211, 307, *groups), part_windows(activation, 211, 307, *groups)
    arrays = [(ctypes.c_int64 * len(numbers))(*numbers) for numbers in groups[:3]]
    pointers = [ctypes.cast(array, ctypes.POINTER(ctypes.c_int64)) for array in arrays]
    c_groups = WindowGroups(*pointers, len(groups[1]), groups[3])
    for seed in range(2):
        simt.scaphoid_simt_seed(seed)
        found = tuple(torch.full_like(each, math.nan) for each in ours)
        sizes = [ctypes.c_int64(each) for each in (2, h, w, 211, 307)]
        outputs = [ctypes.c_void_p(each.data_ptr()) for each in found]
        error = simt.scaphoid_part_windows_cuda(
            ctypes.c_void_p(activation.data_ptr()), ctypes.byref(c_groups), *sizes, *outputs, None
        )
        assert error == 0, simt.scaphoid_simt_error()
        torch.testing.assert_close(found, ours, rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("h", "w"), [(28, 31), (64, 64), (70, 65)])
def test_maps_longer_than_a_vector(random_maps, h, w):
    activation = random_maps(h, (1, h, w), 3)
    groups = ([h // 2, w // 3, h // 3, w // 2], [2], [4], 0.25)
    ours, theirs = part_windows(activation, 448, 448, *groups), part_windows_reference(activation, 448, 448, *groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_agrees_with_average_pooling_and_torchvision_nms():
    maps = torch.rand(6, 14, 14, generator=torch.Generator().manual_seed(0))
    boxes, scores, _ = part_windows(maps, 448, 448, *MSFM)
    shapes = list(zip(MSFM_SHAPES[::2], MSFM_SHAPES[1::2], strict=True))
    for b in range(len(maps)):
        kept, first = 0, 0
        for size, count in zip([2, 3, 3], [2, 2, 3], strict=True):
            group = shapes[first : first + size]
            pooled = [torch.nn.functional.avg_pool2d(maps[b][None], shape, 1).flatten() for shape in group]
            windows = list_windows(14, 14, group)[:, [1, 0, 3, 2]] * 32.0
            survivors = torchvision.ops.nms(windows, torch.cat(pooled), 0.25)[:count]
            survivors = torch.cat((survivors, survivors[-1:].repeat(count - len(survivors))))
            torch.testing.assert_close(boxes[b, kept : kept + count], windows[survivors])
            torch.testing.assert_close(scores[b, kept : kept + count], torch.cat(pooled)[survivors])
            kept, first = kept + count, first + size


def test_ties_follow_shape_order_then_row_major():
    boxes, scores, margin = part_windows(torch.full((1, 4, 5), 0.1), 40, 50, [2, 3, 3, 2], [2], [3], 0.0)
    assert boxes[0].tolist() == [[0, 0, 30, 20], [0, 20, 30, 40], [30, 0, 50, 30]]
    torch.testing.assert_close(scores, torch.full((1, 3), 0.1), rtol=0, atol=0)
    assert margin.tolist() == [0]


def test_overlap_equal_to_the_threshold_survives():
    """Windows of two cells that share one have IoU 1/3."""
    activation = torch.tensor([[[0.0, 3.0, 2.0, 0.0]]])
    kept = part_windows(activation, 1, 4, [1, 2], [1], [2], 1 / 3)[0]
    assert kept[0].tolist() == [[1, 0, 3, 1], [0, 0, 2, 1]]
    dropped = part_windows(activation, 1, 4, [1, 2], [1], [2], 0.33)[0]
    assert dropped[0].tolist() == [[1, 0, 3, 1]] * 2


def test_margin_is_the_smallest_gap_to_a_rival():
    activation = torch.tensor([[[8.0, 5.0, 4.0, -10.0]]])
    _, scores, margin = part_windows(activation, 4, 4, [1, 1], [1], [3], 0.5)
    assert scores.tolist() == [[8, 5, 4]]
    torch.testing.assert_close(margin, torch.tensor([0.1]))


@pytest.mark.parametrize(
    ("second_shape", "expected"),
    [
        pytest.param([1, 2], 2 / 8, id="scores 8 and 6 are nearer than either to its rival"),
        pytest.param([1, 1], 4 / 8, id="the same window in both groups: no rank to decide"),
    ],
)
def test_margin_covers_the_ranking_across_groups(second_shape, expected):
    activation = torch.tensor([[[8.0, 4.0, 0.0, 0.0]]])
    _, _, margin = part_windows(activation, 4, 4, [1, 1, *second_shape], [1, 1], [1, 1], 0.25)
    torch.testing.assert_close(margin, torch.tensor([expected]))


def test_a_pick_without_a_rival_decides_nothing():
    boxes, scores, margin = part_windows(torch.tensor([[[1.0, 2.0]]]), 10, 10, [1, 2], [1], [3], 0.25)
    assert boxes[0].tolist() == [[0, 0, 10, 10]] * 3
    assert scores.tolist() == [[1.5] * 3]
    assert margin.tolist() == [1]


def test_window_of_one_cell_on_a_map_of_one_cell():
    boxes, scores, margin = part_windows(torch.full((1, 1, 1), 7.0), 33, 21, [1, 1], [1], [2], 0.25)
    assert boxes[0].tolist() == [[0, 0, 21, 33]] * 2
    assert scores.tolist() == [[7, 7]]
    assert margin.tolist() == [0]


def test_no_windows():
    boxes, scores, margin = part_windows(torch.rand(3, 4, 4), 8, 8, [], [], [], 0.25)
    assert boxes.shape == (3, 0, 4)
    assert scores.shape == (3, 0)
    assert margin.shape == (3,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", [0, 77])
def test_a_map_that_is_not_finite_gives_whole_images_and_spares_its_neighbours(value, cell):
    maps = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    clean = part_windows(maps, 448, 440, *MSFM)
    maps[1].view(-1)[cell] = value
    boxes, scores, margin = part_windows(maps, 448, 440, *MSFM)
    assert boxes[1].tolist() == [[0, 0, 440, 448]] * 7
    assert scores[1].tolist() == [0] * 7
    assert margin[1] == 0
    for ours, theirs in zip((boxes, scores, margin), clean, strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (([4, 4, 3], [1], [1], 0.25), r"part_windows: window_shapes must be pairs of height and width; got 3 numbers"),
        (([4, 6], [1], [1], 0.25), r"between \[1, 1\] and the map's \[4, 5\] cells; got \[4, 6\]"),
        (([0, 1], [1], [1], 0.25), r"window_shapes must be between .* got \[0, 1\]"),
        (([1, 1], [1], [1, 1], 0.25), r"group_sizes and group_counts must be equally long; got \[1\] and \[1, 1\]"),
        (([1, 1], [2], [1], 0.25), r"group_sizes must add up to the 1 shapes of window_shapes; got \[2\]"),
        (([1, 1], [1, 0], [1, 1], 0.25), r"group_sizes must be at least 1 each; got \[1, 0\]"),
        (([1, 1], [1], [-1], 0.25), r"group_counts must not be negative; got \[-1\]"),
        (([1, 1], [2**62, 2**62, 1], [1, 1, 1], 0.25), r"group_sizes must add up to the 1 shapes of window_shapes"),
        (([1, 1] * 4, [1] * 4, [2**62] * 4, 0.25), r"group_counts must add up to at most 1048576 windows; got"),
        (([1, 1], [1], [1], 1.5), r"iou_threshold must be in \[0, 1\]; got 1.5"),
        (([1, 1], [1], [1], math.nan), r"iou_threshold must be in \[0, 1\]; got nan"),
    ],
)
def test_refuses(groups, message):
    with pytest.raises(RuntimeError, match=message):
        part_windows(torch.zeros(1, 4, 5), 8, 8, *groups)
