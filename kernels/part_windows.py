"""`part_windows`: the parts stage's choice of windows on an activation map (MSFM, section 2.4)."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)
from scaphoid.kernels.cells import box_of_cells, finite_maps


def part_windows(
    activation: Tensor,
    height: int,
    width: int,
    window_shapes: list[int],
    group_sizes: list[int],
    group_counts: list[int],
    iou_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best windows of each group of shapes, by mean activation, after greedy non-maximum suppression in the group.

    Every placement (stride 1) of every shape is a window; its score is the mean of its cells, from an integral image in
    double (so it errs by up to 2^-52 of the sum of all the map's magnitudes), rounded to float32 before scores are
    compared. Order: score, then shape order, then row-major. A pick drops the windows that overlap it by an IoU of more
    than `iou_threshold`; when none is left, the last pick repeats.

    Args:
        activation: `Tensor[B, h, w]`, float32.
        height, width: size in pixels of the image that the map belongs to.
        window_shapes: height, width in cells of this map, shape after shape: `[6, 6, 7, 5, ...]`, each within the map.
        group_sizes: how many of the shapes form each group, in order.
        group_counts: how many windows each group keeps; their sum is `n`.
        iou_threshold: in [0, 1].

    Returns:
        `Tensor[B, n, 4]`, boxes `(x0, y0, x1, y1)` in pixels, group after group in order of choice.
        `Tensor[B, n]`, scores.
        `Tensor[B]`, margin: the smaller of two gaps, relative to `max|activation|`: over all picks, between the picked
        score and the best other one then available; over all groups, between the scores of two kept windows whose
        boxes differ (`map_boxes` ranks them, eq. 11). 0 for a constant map, 1 where no score had a rival.
        A map with a cell that is not finite: `n` times the whole image, scores 0, margin 0.

    No gradient. On CUDA a map has at most 64 cells a side, and there are at most 32 shapes, 16 groups and 64 windows.
    The same bits on every processor. Raises RuntimeError that names the argument, what was expected and what came.
    """
    return torch.ops.scaphoid.part_windows(
        activation.detach(), height, width, window_shapes, group_sizes, group_counts, iou_threshold
    )


@torch.library.register_fake("scaphoid::part_windows")
def _fake(activation, height, width, window_shapes, group_sizes, group_counts, iou_threshold):
    batch, n = activation.shape[0], sum(group_counts)
    return activation.new_empty((batch, n, 4)), activation.new_empty((batch, n)), activation.new_empty((batch,))


def list_windows(h: int, w: int, shapes: list[tuple[int, int]]) -> Tensor:
    """Every placement of the shapes on an `h x w` map, in tie order: `[K, 4]` (top, left, bottom, right) in cells."""
    windows = []
    for rows, columns in shapes:
        top, left = torch.meshgrid(torch.arange(h - rows + 1), torch.arange(w - columns + 1), indexing="ij")
        windows.append(torch.stack((top, left, top + rows, left + columns), -1).reshape(-1, 4))
    return torch.cat(windows)


def _iou(window: Tensor, others: Tensor) -> Tensor:
    sides = (torch.minimum(window[2:], others[:, 2:]) - torch.maximum(window[:2], others[:, :2])).clamp(min=0)
    both = sides.prod(1).double()
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (window, others)]
    return both / (areas[0] + areas[1] - both)


def _pick_group(scores: Tensor, windows: Tensor, count: int, iou_threshold: float) -> tuple[list[int], float]:
    """Indices of the kept windows, and the smallest gap to a rival (infinite without one)."""
    alive = torch.ones(len(scores), dtype=torch.bool)
    picks: list[int] = []
    gap = float("inf")
    for _ in range(count):
        if not alive.any():
            picks.append(picks[-1])
            continue
        left = torch.nonzero(alive).flatten()
        order = left[scores[left].sort(descending=True, stable=True).indices]
        best = int(order[0])
        if len(order) > 1:
            gap = min(gap, float(scores[best].double() - scores[order[1]].double()))
        picks.append(best)
        alive &= _iou(windows[best], windows) <= iou_threshold
        alive[best] = False
    return picks, gap


def part_windows_reference(
    activation: Tensor,
    height: int,
    width: int,
    window_shapes: list[int],
    group_sizes: list[int],
    group_counts: list[int],
    iou_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`part_windows` in plain PyTorch on the CPU, slow; the same arguments and results."""
    batch, h, w = activation.shape
    n = sum(group_counts)
    boxes = activation.new_tensor([0.0, 0.0, width, height]).repeat(batch, n, 1)
    scores, margin = activation.new_zeros(batch, n), activation.new_zeros(batch)
    shapes = list(zip(window_shapes[::2], window_shapes[1::2], strict=True))
    for b in torch.nonzero(finite_maps(activation)).flatten().tolist():
        kept, gap, first = 0, float("inf"), 0
        for size, count in zip(group_sizes, group_counts, strict=True):
            windows = list_windows(h, w, shapes[first : first + size])
            cells = [activation[b, top:bottom, left:right] for top, left, bottom, right in windows.tolist()]
            group_scores = torch.stack([window.double().mean() for window in cells]).float()
            picks, group_gap = _pick_group(group_scores, windows, count, iou_threshold)
            boxes[b, kept : kept + count] = box_of_cells(windows[picks], h, w, height, width)
            scores[b, kept : kept + count] = group_scores[picks]
            kept, first, gap = kept + count, first + size, min(gap, group_gap)
        differ = (boxes[b, :, None] != boxes[b]).any(-1)
        differences = (scores[b, :, None].double() - scores[b].double()).abs()[differ]
        gap = min([gap, *differences.tolist()])
        if activation[b].min() < activation[b].max():
            margin[b] = 1.0 if gap == float("inf") else gap / float(activation[b].abs().max())
    return boxes, scores, margin
