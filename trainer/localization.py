"""How well boxes found without box labels lie on lesions, and what to compare them with.

Boxes are `(x0, y0, x1, y1)`, half-open, floats, in pixels of the original radiograph. Everything is over the abnormal
radiographs with a visible lesion, whatever the verdict; with several lesions a hit on any counts; a missing box (NaN: a
radiograph that could not be predicted) is a miss. Sizes are (height, width).

An oracle is the perfect choice among the boxes that a method can form at all: the box of highest IoU with any lesion.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaphoid.trainer.metrics import RESAMPLES, Estimate, mean_estimate

IOU_THRESHOLDS = (0.3, 0.5, 0.7)
CAM_THRESHOLDS = tuple(np.round(np.arange(0.05, 0.951, 0.05), 2).tolist())
SMALL, MEDIUM = 0.01, 0.09  # share of the image's area: below 1 %, 1 to 9 %, above (sides of 10 % and 30 % of a square)
SIZES = ("small", "medium", "large")

Lesions = Sequence[ArrayLike]  # per radiograph [k, 4], k >= 1


def iou(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """IoU of boxes [..., 4] and others [..., 4], broadcast against each other; 0 for a NaN box or two empty ones."""
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    shared = np.maximum(sides, 0).prod(axis=-1)
    union = _area(boxes) + _area(others) - shared
    return np.nan_to_num(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def best_iou(boxes: ArrayLike, lesions: Lesions) -> NDArray[np.float64]:
    """Highest IoU of each box [N, 4] with any of its radiograph's lesions: [N]."""
    return np.array([iou(box, _lesions(own)).max() for box, own in zip(_boxes(boxes), lesions, strict=True)])


def inside(points: ArrayLike, lesions: Lesions) -> NDArray[np.bool_]:
    """Whether each point (x, y) [N, 2] lies in any of its radiograph's lesions: [N]."""
    hits = []
    for point, own in zip(np.asarray(points, np.float64).reshape(-1, 2), lesions, strict=True):
        own = _lesions(own)
        hits.append(bool(((own[:, :2] <= point) & (point < own[:, 2:])).all(axis=1).any()))
    return np.array(hits, dtype=bool)


def localization_metrics(
    boxes: ArrayLike,
    lesions: Lesions,
    peaks: ArrayLike | None = None,
    patients: Sequence[object] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    """PCL at IoU 0.3, 0.5 and 0.7, mean IoU, MaxBoxAccV2, box-centre hit and pointing of boxes [N, 4].

    PCL t is the share of radiographs whose box has IoU >= t with a lesion; MaxBoxAccV2, for a method without a
    threshold to choose (or one chosen beforehand, as a CAM's is), is the mean of the three. `peaks` [N, 2] are the
    (x, y) of the map's peak (`map_peaks`); without them pointing is NaN. Intervals resample patients. Raises ValueError
    when lengths differ.
    """
    boxes = _boxes(boxes)
    overlap = best_iou(boxes, lesions)

    def estimate(values: NDArray) -> Estimate:
        return mean_estimate(values, patients, resamples)

    metrics = {f"pcl_{threshold}": estimate(overlap >= threshold) for threshold in IOU_THRESHOLDS}
    metrics["mean_iou"] = estimate(overlap)
    metrics["max_box_acc_v2"] = estimate((overlap[:, None] >= IOU_THRESHOLDS).mean(axis=1))
    metrics["centre_hit"] = estimate(inside((boxes[:, :2] + boxes[:, 2:]) / 2, lesions))
    metrics["pointing"] = Estimate(np.nan, reason="pointing: no map peaks were given")
    if peaks is not None:
        metrics["pointing"] = estimate(inside(peaks, lesions))
    return metrics


def lesion_size(lesions: ArrayLike, size: tuple[float, float]) -> str:
    """`small`, `medium` or `large`: the largest lesion's share of the image is below 1 %, up to 9 %, above."""
    share = _area(_lesions(lesions)).max() / (size[0] * size[1])
    return SIZES[int(share >= SMALL) + int(share > MEDIUM)]


def map_peaks(maps: ArrayLike, sizes: ArrayLike) -> NDArray[np.float64]:
    """Centre (x, y) [N, 2] of the cell where each map [N, h, w] peaks, in an image of its size [N, 2]."""
    maps, sizes = np.asarray(maps), np.asarray(sizes, np.float64)
    rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), maps.shape[1:])
    return np.stack(((columns + 0.5) * sizes[:, 1] / maps.shape[2], (rows + 0.5) * sizes[:, 0] / maps.shape[1]), axis=1)


# Boxes to compare with


def centre_boxes(boxes: ArrayLike, sizes: ArrayLike) -> NDArray[np.float64]:
    """Boxes as large as `boxes` [N, 4], in the middle of images of `sizes` [N, 2]."""
    return _placed(boxes, sizes, 0.5)


def random_boxes(boxes: ArrayLike, sizes: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Boxes as large as `boxes` [N, 4], anywhere inside images of `sizes` [N, 2] with equal chance."""
    return _placed(boxes, sizes, np.random.default_rng(seed).random((len(_boxes(boxes)), 2)))


def cam_boxes(
    cam: ArrayLike, size: tuple[int, int], thresholds: Sequence[float] = CAM_THRESHOLDS
) -> NDArray[np.float64]:
    """Boxes of a class activation map [h, w] in an image of (height, width), one per threshold: [T, 4].

    The map is enlarged bilinearly, scaled to [0, 1], and cut at `>= threshold`; the box is that of the largest
    8-connected component. A constant map gives the whole image. Raises ValueError on a map that is not finite.
    """
    cam = np.asarray(cam, np.float32)
    if cam.ndim != 2 or not np.isfinite(cam).all():
        raise ValueError(f"cam must be a finite [h, w] map, got shape {cam.shape}; drop images whose map is NaN")
    enlarged = cv2.resize(cam, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    low, high = enlarged.min(), enlarged.max()
    scaled = (enlarged - low) / (high - low) if high > low else np.ones_like(enlarged)
    return np.array([_largest_component(scaled >= threshold) for threshold in thresholds])


def choose_threshold(boxes: ArrayLike, lesions: Lesions, at: float = 0.5) -> int:
    """Which threshold to use: the index t of the highest PCL at IoU `at`, for boxes [T, N, 4] of the *validation*
    images."""
    return int(np.argmax([(best_iou(row, lesions) >= at).mean() for row in np.asarray(boxes)]))


# Oracles


def msfm_oracle(
    lesions: Lesions,
    sizes: ArrayLike,
    map_size: tuple[int, int],
    groups: Sequence[Sequence[tuple[int, int]]],
    kept: Sequence[int],
    gamma: float = 0.5,
    object_boxes: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """The best boxes [N, 4] that MSFM could have formed on images of `sizes` [N, 2].

    The object box may be any rectangle of the map's cells, or is given (`object_boxes` [N, 4], NaN for none);
    `groups` are the window shapes (rows, columns) in cells, `kept` the windows picked per group. The final box is the
    gamma-weighted mean of all picks (eq. 11), in whatever order their scores may have: `final_sizes` gives the sizes
    that it can take. It may lie anywhere in the object box: that picks sit on whole cells and that suppression keeps
    a group's picks apart is left out, so this is an upper bound (and the sizes are sampled, every tenth of a cell).
    """
    shares = final_sizes(map_size, groups, kept, gamma) / np.asarray(map_size, np.float64)
    sizes, found = np.asarray(sizes, np.float64), []
    for i, own in enumerate(lesions):
        steps = [np.linspace(0, sizes[i, axis], map_size[axis] + 1) for axis in (0, 1)]
        spans = [_cell_spans(step) for step in steps]
        if object_boxes is not None:
            x0, y0, x1, y1 = np.asarray(object_boxes, np.float64)[i]
            spans = [np.array([[y0, y1]]), np.array([[x0, x1]])]
        candidates = np.array([_best_in_spans(lesion, spans, shares) for lesion in _lesions(own)])
        found.append(candidates[iou(candidates, _lesions(own)).argmax()])
    return _boxes(found)


def final_sizes(
    map_size: tuple[int, int],
    groups: Sequence[Sequence[tuple[int, int]]],
    kept: Sequence[int],
    gamma: float,
    step: float = 0.1,
) -> NDArray[np.float64]:
    """Sizes (rows, columns) [S, 2], in cells of the object's map, that MSFM's final box can take (eq. 11).

    It is a weighted mean of the picks' shapes; each direction's extreme takes the best shape of every group and gives
    the largest weights to the best of those. The extremes in 64 directions and a grid inside their hull are returned.
    """
    weights = gamma ** np.arange(1, sum(kept) + 1)
    weights /= weights.sum()
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    directions, extremes = np.stack((np.cos(angles), np.sin(angles)), axis=1), []
    for direction in directions:
        best = [max(shapes, key=lambda shape: float(direction @ shape)) for shapes in groups]
        picks = np.repeat(np.array(best, np.float64), kept, axis=0)
        picks = picks[np.argsort(-(picks @ direction), kind="stable")]
        extremes.append(weights @ picks)
    corners = np.array(extremes)
    rows, columns = (np.arange(corners[:, i].min(), corners[:, i].max(), step) for i in (0, 1))
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    reach = (directions * corners).sum(axis=1)
    within = (grid @ directions.T <= reach + 1e-9).all(axis=1)
    return np.minimum(np.concatenate((corners, grid[within])), map_size)


def key_area_oracle(
    lesions: Lesions, sizes: ArrayLike, map_size: tuple[int, int], extents: ArrayLike
) -> NDArray[np.float64]:
    """The best boxes [N, 4] that KALM could have formed: of its own width and height, `extents` [N, 2] (x, y) in
    pixels, centred on any cell of the map and moved inside the image."""
    found = []
    for own, (height, width), extent in zip(lesions, np.asarray(sizes, np.float64), np.asarray(extents), strict=True):
        y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(map_size, (height, width), strict=True))
        centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        centres = np.clip(centres, extent / 2, np.maximum(np.array([width, height]) - extent / 2, extent / 2))
        candidates = np.concatenate((centres - extent / 2, centres + extent / 2), axis=1)
        found.append(candidates[iou(candidates[:, None], _lesions(own)).max(axis=1).argmax()])
    return _boxes(found)


def _best_in_spans(lesion: NDArray, spans: list[NDArray], shares: NDArray) -> NDArray:
    """The best final box for one lesion: `spans` are the object box's possible (start, end) per axis (y, x), [k, 2]
    each of another length, `shares` [S, 2] the final box's possible sizes as shares of the object box.

    A box of length b inside a span covers at most min(b, what the span covers) of the lesion, and does so centred on
    it as far as the span lets it: so the axes separate and no position need be searched.
    """
    edges = (lesion[[1, 3]], lesion[[0, 2]])
    chosen = [_nearest_span(span, edge) for span, edge in zip(spans, edges, strict=True)]
    lengths, covered = [], []
    for axis, (span, edge) in enumerate(zip(chosen, edges, strict=True)):
        length = (span[:, 1] - span[:, 0])[:, None] * shares[:, axis]
        reach = np.minimum(span[:, 1], edge[1]) - np.maximum(span[:, 0], edge[0])
        lengths.append(length)
        covered.append(np.minimum(length, np.maximum(reach, 0)[:, None]))
    shared = covered[0][:, None] * covered[1][None]
    union = lengths[0][:, None] * lengths[1][None] + _area(lesion) - shared
    quality = shared / union
    row, column, size = np.unravel_index(quality.argmax(), quality.shape)
    sides = []
    for axis, pick in ((1, column), (0, row)):
        (start, end), length = chosen[axis][pick], lengths[axis][pick, size]
        sides.append((np.clip(edges[axis].mean() - length / 2, start, end - length), length))
    (x, width), (y, height) = sides
    return np.array([x, y, x + width, y + height])


def _cell_spans(steps: NDArray) -> NDArray:
    """All (start, end) between two of the cell edges [n + 1]."""
    start, end = np.triu_indices(len(steps), k=1)
    return np.stack((steps[start], steps[end]), axis=1)


def _nearest_span(spans: NDArray, edge: NDArray) -> NDArray:
    """Of the spans of each length, the one that covers most of the lesion's edge (start, end); on a tie the most
    centred."""
    length = np.round(spans[:, 1] - spans[:, 0], 6)
    reach = np.minimum(spans[:, 1], edge[1]) - np.maximum(spans[:, 0], edge[0])
    off_centre = np.abs(spans.mean(axis=1) - edge.mean())
    order = np.lexsort((off_centre, -np.round(reach, 6), length))
    return spans[order[np.unique(length[order], return_index=True)[1]]]


def _largest_component(mask: NDArray) -> NDArray:
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    x, y, width, height = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax(), :4]
    return np.array([x, y, x + width, y + height], np.float64)


def _placed(boxes: ArrayLike, sizes: ArrayLike, where: float | NDArray) -> NDArray[np.float64]:
    boxes, sizes = _boxes(boxes), np.asarray(sizes, np.float64).reshape(-1, 2)
    extent = boxes[:, 2:] - boxes[:, :2]
    corner = where * (sizes[:, ::-1] - extent)
    return np.concatenate((corner, corner + extent), axis=1)


def _boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def _lesions(lesions: ArrayLike) -> NDArray[np.float64]:
    lesions = _boxes(lesions)
    if not len(lesions):
        raise ValueError(
            "localisation needs a lesion box per radiograph: leave out radiographs without a visible lesion"
        )
    return lesions


def _area(boxes: NDArray) -> NDArray:
    return np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(axis=-1)
