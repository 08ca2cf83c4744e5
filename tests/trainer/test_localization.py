import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaphoid.trainer.localization import (
    best_iou,
    cam_boxes,
    centre_boxes,
    choose_threshold,
    final_sizes,
    inside,
    iou,
    key_area_oracle,
    lesion_size,
    localization_metrics,
    map_peaks,
    msfm_oracle,
    random_boxes,
)

GROUPS = (((6, 6), (7, 5)), ((8, 8), (6, 10), (7, 9)), ((10, 10), (9, 11), (8, 12)))
KEPT = (2, 2, 3)
MISSING = (np.nan,) * 4

sides = st.floats(0.25, 300)
boxes = st.builds(lambda x, y, w, h: np.array([x, y, x + w, y + h]), sides, sides, sides, sides)


@given(boxes, boxes, sides)
def test_iou_is_a_symmetric_share_that_shifts_do_not_change(a: np.ndarray, b: np.ndarray, shift: float) -> None:
    assert iou(a, a) == pytest.approx(1)
    assert 0 <= iou(a, b) <= 1
    assert iou(a, b) == pytest.approx(iou(b, a))
    assert iou(a + shift, b + shift) == pytest.approx(iou(a, b), abs=1e-9)


def test_iou_by_hand() -> None:
    assert iou([0, 0, 10, 10], [[5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 7]]) == pytest.approx([1 / 3, 0, 0.1])
    assert iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0
    assert iou(MISSING, [0, 0, 1, 1]) == 0


def test_points_on_the_far_edge_are_outside() -> None:
    lesions = [[[2, 2, 5, 5], [10, 10, 12, 12]]] * 4
    assert inside([[2, 2], [5, 4], [11, 11], [7, 7]], lesions).tolist() == [True, False, True, False]


def test_metrics_by_hand() -> None:
    lesions = [[[0, 0, 10, 10]], [[50, 50, 60, 60], [0, 0, 10, 10]], [[0, 0, 10, 10]], [[0, 0, 10, 10]]]
    found = [[0, 0, 10, 6], [0, 0, 10, 9], [5, 0, 25, 10], MISSING]  # IoU 0.6, 0.9, 0.2, none
    metrics = localization_metrics(found, lesions, peaks=[[1, 1], [55, 51], [10, 1], [np.nan, np.nan]])
    expected = {
        "pcl_0.3": 0.5,
        "pcl_0.5": 0.5,
        "pcl_0.7": 0.25,
        "mean_iou": 1.7 / 4,
        "max_box_acc_v2": (0.5 + 0.5 + 0.25) / 3,
        "centre_hit": 0.5,
        "pointing": 0.5,
    }
    assert {name: one.value for name, one in metrics.items()} == pytest.approx(expected)
    assert 0 <= metrics["pcl_0.5"].low < 0.5 < metrics["pcl_0.5"].high <= 1


def test_without_peaks_or_radiographs_there_is_a_reason() -> None:
    assert (
        localization_metrics([[0, 0, 1, 1]], [[[0, 0, 1, 1]]])["pointing"].reason == "pointing: no map peaks were given"
    )
    nothing = localization_metrics([], [])
    assert np.isnan(nothing["pcl_0.5"].value)
    assert nothing["pcl_0.5"].reason == "no images"
    with pytest.raises(ValueError, match="lesion box per radiograph"):
        best_iou([[0, 0, 1, 1]], [[]])


@pytest.mark.parametrize(
    ("lesions", "size"),
    [
        ([[0, 0, 9, 21]], "small"),
        ([[0, 0, 10, 20]], "medium"),
        ([[0, 0, 30, 60]], "medium"),
        ([[0, 0, 31, 60]], "large"),
        ([[0, 0, 1, 1], [0, 0, 99, 99]], "large"),
    ],
)
def test_lesion_size_is_the_largest_lesions_share(lesions: list, size: str) -> None:
    assert lesion_size(lesions, (200, 100)) == size


def test_map_peaks_are_cell_centres() -> None:
    maps = np.zeros((2, 3, 5))
    maps[0, 2, 1] = maps[1, 0, 4] = 1
    assert map_peaks(maps, [[30, 100], [90, 50]]) == pytest.approx(np.array([[30, 25], [45, 15]]))


def test_centre_and_random_boxes_keep_the_size() -> None:
    found = np.array([[3, 4, 23, 64], MISSING] * 50)
    sizes = np.tile([[100, 70]], (100, 1))
    assert centre_boxes(found, sizes)[0].tolist() == [25, 20, 45, 80]
    anywhere = random_boxes(found, sizes)[::2]
    assert anywhere[:, 2:] - anywhere[:, :2] == pytest.approx(np.tile([20, 60], (50, 1)))
    assert (anywhere >= 0).all()
    assert (anywhere[:, 2:] <= [70, 100]).all()
    assert anywhere[:, 0].std() > 5
    assert np.isnan(random_boxes(found, sizes)[1]).all()


def test_cam_boxes() -> None:
    cam = np.zeros((7, 9))
    cam[1, 1] = 1.0
    cam[4:6, 5:8] = 0.6
    loose, tight, whole = cam_boxes(cam, (70, 90), (0.3, 0.9, 0.0))
    assert iou(loose, [50, 40, 80, 60]) > 0.8
    assert iou(tight, [10, 10, 20, 20]) > 0
    assert whole.tolist() == [0, 0, 90, 70]
    assert cam_boxes(np.full((4, 4), 2.0), (13, 11)).tolist() == [[0, 0, 11, 13]] * 19
    with pytest.raises(ValueError, match="finite"):
        cam_boxes([[np.nan, 1.0]], (8, 8))


def test_threshold_choice() -> None:
    lesions = [[[0, 0, 10, 10]]] * 2
    found = [[[0, 0, 10, 4], [0, 0, 10, 4]], [[0, 0, 10, 6], [0, 0, 10, 2]], [[0, 0, 10, 8], [50, 0, 60, 1]]]
    assert choose_threshold(found, lesions) == 1
    assert choose_threshold(found, lesions, at=0.7) == 2


def formed_box(
    rng: np.random.Generator, size: np.ndarray, cells: tuple[int, int], object_box: np.ndarray
) -> np.ndarray:
    """A final box of eq. 11 from any picks in any order: what MSFM forms, without its suppression."""
    picks = []
    for shapes, count in zip(GROUPS, KEPT, strict=True):
        for shape in rng.choice(shapes, count):
            corner = rng.integers(0, np.array(cells) - shape + 1)
            picks.append([*corner[::-1], *(corner + shape)[::-1]])
    weights = 0.5 ** np.arange(1, 8)
    share = (weights / weights.sum()) @ rng.permutation(picks) / np.tile(cells[::-1], 2)
    corner, extent = np.tile(object_box[:2], 2), np.tile(object_box[2:] - object_box[:2], 2)
    return corner + share * extent


@pytest.mark.parametrize("given_object_box", [False, True])
def test_no_formed_box_beats_the_msfm_oracle(given_object_box: bool) -> None:
    rng = np.random.default_rng(5)
    size, cells = np.array([317, 450]), (14, 14)
    lesions, formed, objects = [], [], []
    for _ in range(60):
        rows, columns = (np.sort(rng.choice(15, 2, replace=False)) for _ in range(2))
        objects.append(np.array([columns[0], rows[0], columns[1], rows[1]]) / 14 * np.tile(size[::-1], 2))
        formed.append(formed_box(rng, size, cells, objects[-1]))
        lesions.append([formed[-1] + rng.normal(size=4) * rng.choice([0, 5])])
    lesions = [np.concatenate((np.minimum(a[:, :2], a[:, 2:] - 1), a[:, 2:]), axis=1) for a in map(np.array, lesions)]
    sizes = np.tile(size, (60, 1))
    oracle = msfm_oracle(lesions, sizes, cells, GROUPS, KEPT, object_boxes=objects if given_object_box else None)
    assert (best_iou(oracle, lesions) >= best_iou(formed, lesions) - 0.02).all()
    assert (oracle[:, :2] >= 0).all()
    assert (oracle[:, 2:] <= size[::-1] + 1e-9).all()
    if given_object_box:
        assert (oracle[:, :2] >= np.array(objects)[:, :2] - 1e-9).all()
        assert (oracle[:, 2:] <= np.array(objects)[:, 2:] + 1e-9).all()


def test_small_lesions_are_out_of_reach_of_a_large_object_box() -> None:
    whole, lesion = [[0, 0, 448, 448]], [[[200, 200, 245, 245]]]
    oracle = msfm_oracle(lesion, [[448, 448]], (14, 14), GROUPS, KEPT, object_boxes=whole)
    width, height = oracle[0, 2:] - oracle[0, :2]
    assert width * height >= (6.1 * 32) * (5.8 * 32)
    assert best_iou(oracle, lesion) == pytest.approx(45**2 / (width * height))
    assert best_iou(msfm_oracle(lesion, [[448, 448]], (14, 14), GROUPS, KEPT), lesion) > 0.7
    assert np.isnan(msfm_oracle(lesion, [[448, 448]], (14, 14), GROUPS, KEPT, object_boxes=[MISSING])).all()


def test_final_sizes_by_hand() -> None:
    sizes = final_sizes((14, 14), GROUPS, KEPT, 0.5)
    lowest = (120 * 6 + 7 * 8) / 127  # rows: 6, 6, 6, 6 (of 6 x 6 and 6 x 10), then 8, 8, 8
    widest = (112 * 12 + 12 * 10 + 3 * 6) / 127  # columns: 12, 12, 12, then 10, 10, then 6, 6
    assert sizes[:, 0].min() == pytest.approx(lowest)
    assert sizes[:, 1].max() == pytest.approx(widest)
    assert final_sizes((4, 4), [[(2, 3)]], [3], 0.5) == pytest.approx(np.tile([2, 3], (64, 1)))


def test_key_area_oracle() -> None:
    size, extent = [[100, 200]], [[80, 40]]
    corner = key_area_oracle([[[0, 0, 30, 30]]], size, (5, 5), extent)
    assert corner.tolist() == [[0, 0, 80, 40]]  # the centre moved inside
    middle = key_area_oracle([[[70, 28, 135, 75], [0, 0, 1, 1]]], size, (5, 5), extent)
    assert middle.tolist() == [[60, 30, 140, 70]]
