import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaphoid.kernels.map_boxes import map_boxes, map_boxes_reference


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    n=st.integers(0, 9),
    gamma=st.sampled_from([1e-3, 0.5, 1.0]),
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(random_maps, random_boxes, batch, n, gamma, height, width, seed):
    boxes, objects = (random_boxes(seed + i, batch, m, height, width, 0.0).float() for i, m in ((0, n), (1, 1)))
    scores = random_maps(seed, (batch, n), 2, transposed=True)  # few levels: ties
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 4000, (batch, 2), generator=generator, dtype=torch.int32)
    arguments = (boxes, scores, gamma, objects[:, 0], height, width, sizes)
    torch.testing.assert_close(map_boxes(*arguments), map_boxes_reference(*arguments))


@pytest.mark.parametrize(("batch", "n", "gamma"), [(1, 7, 0.5), (67, 3, 1e-3), (5, 0, 0.5), (0, 4, 1.0)])
def test_cuda_under_the_simt_executor(simt, random_maps, random_boxes, batch, n, gamma):
    boxes, objects = (
        random_boxes(0, batch, n, 90, 70, 0.0).float(),
        random_boxes(1, batch, 1, 90, 70, 0.0)[:, 0].float(),
    )
    scores = random_maps(0, (batch, n), 2)
    sizes = torch.randint(1, 4000, (batch, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ours = map_boxes(boxes, scores, gamma, objects, 90, 70, sizes)
    for seed in range(2):
        simt.scaphoid_simt_seed(seed)
        mapped = torch.full((batch, 4), math.nan)
        box, score, box_of_object, size, out = (
            ctypes.c_void_p(each.data_ptr()) for each in (boxes, scores, objects, sizes, mapped)
        )
        counts = [ctypes.c_int64(each) for each in (batch, n, 90, 70)]
        error = simt.scaphoid_map_boxes_cuda(
            box, score, ctypes.c_double(gamma), box_of_object, size, *counts, out, None
        )
        assert error == 0, simt.scaphoid_simt_error()
        assert torch.equal(mapped, ours)
        torch.testing.assert_close(mapped, map_boxes_reference(boxes, scores, gamma, objects, 90, 70, sizes))


def test_weights_follow_rank_then_object_box_then_original_size():
    boxes = torch.tensor([[[40.0, 0.0, 80.0, 100.0], [0.0, 0.0, 100.0, 50.0]]])
    scores = torch.tensor([[1.0, 2.0]])  # the second leads: weights 1/3 and 2/3
    objects, sizes = torch.tensor([[20.0, 10.0, 70.0, 60.0]]), torch.tensor([[1000, 3000]], dtype=torch.int32)
    mapped = map_boxes(boxes, scores, 0.5, objects, 100, 100, sizes)
    in_object = torch.tensor([[40 / 3, 0, 280 / 3, 200 / 3]])
    in_image = in_object / 2 + torch.tensor([20, 10, 20, 10])
    torch.testing.assert_close(mapped, in_image * torch.tensor([30, 10, 30, 10]))


def test_equal_scores_keep_their_order_and_nan_ranks_last():
    boxes = torch.eye(4)[None, :3]
    whole, sizes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1, 2, dtype=torch.int32)
    weights = torch.tensor([4.0, 2.0, 1.0]) / 7
    tied = map_boxes(boxes, torch.full((1, 3), 5.0), 0.5, whole, 1, 1, sizes)
    torch.testing.assert_close(tied, torch.cat((weights, torch.zeros(1)))[None])
    with_nan = map_boxes(boxes, torch.tensor([[math.nan, -math.inf, math.inf]]), 0.5, whole, 1, 1, sizes)
    # -inf and NaN rank alike, so they keep their order behind +inf.
    torch.testing.assert_close(with_nan, torch.stack((weights[1], weights[2], weights[0], torch.tensor(0.0)))[None])


def test_without_windows_the_object_box_is_mapped():
    objects, sizes = torch.tensor([[8.0, 4.0, 24.0, 28.0]]), torch.tensor([[64, 320]], dtype=torch.int32)
    mapped = map_boxes(torch.zeros(1, 0, 4), torch.zeros(1, 0), 0.5, objects, 32, 32, sizes)
    assert mapped.tolist() == [[80, 8, 240, 56]]


def test_a_box_that_is_not_finite_spares_its_neighbours():
    boxes, scores = torch.rand(3, 2, 4), torch.rand(3, 2)
    rest = (0.5, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(3, 1), 1, 1, torch.ones(3, 2, dtype=torch.int32))
    clean = map_boxes(boxes, scores, *rest)
    boxes[1, 0, 2] = math.nan
    mapped = map_boxes(boxes, scores, *rest)
    assert torch.isnan(mapped).nonzero().tolist() == [[1, 2]]
    assert torch.equal(mapped[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(2, 3, 5)}, r"map_boxes: boxes must be float32 \[B, n, 4\], .* got float32 \[2, 3, 5\]"),
        ({"scores": torch.zeros(2, 4)}, r"scores must be float32 \[B, n\], here \[2, 3\]; got float32 \[2, 4\]"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\]; got 0"),
        ({"object_boxes": torch.zeros(1, 4)}, r"object_boxes must be .* here \[2, 4\]; got float32 \[1, 4\]"),
        ({"width": 0}, r"width must be at least 1; got 0"),
        ({"original_sizes": torch.ones(2, 2)}, r"original_sizes must be int32 .* got float32 \[2, 2\]"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "boxes": torch.zeros(2, 3, 4),
        "scores": torch.zeros(2, 3),
        "gamma": 0.5,
        "object_boxes": torch.zeros(2, 4),
        "height": 8,
        "width": 8,
        "original_sizes": torch.ones(2, 2, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match=message):
        map_boxes(**(arguments | change))
