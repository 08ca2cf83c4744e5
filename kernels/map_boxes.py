"""`map_boxes`: one box out of scored windows, back in the original radiograph's pixels (MSFM, eq. 11)."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)


def map_boxes(
    boxes: Tensor,
    scores: Tensor,
    gamma: float,
    object_boxes: Tensor,
    height: int,
    width: int,
    original_sizes: Tensor,
) -> Tensor:
    """Mean of the windows' corners, weighted by rank, through the object box and the image to original pixels.

    Windows are ranked by falling score (equals keep their order, NaN ranks last); the weight of rank `i = 1..n` is
    `gamma^i / sum_j gamma^j`. Computed in double.

    Args:
        boxes: `Tensor[B, n, 4]`, float32, `(x0, y0, x1, y1)` in pixels of the object image. Without windows (`n = 0`)
            the box is the whole object image.
        scores: `Tensor[B, n]`, float32.
        gamma: in (0, 1].
        object_boxes: `Tensor[B, 4]`, float32, in pixels of the image.
        height, width: size in pixels of the image and of the object image, which are equal.
        original_sizes: `Tensor[B, 2]`, int32, height and width of the original radiograph.

    Returns:
        `Tensor[B, 4]`, float32, in original pixels. A coordinate computed from one that is not finite is not finite.

    No gradient. The same bits on every processor. Raises RuntimeError that names the argument, what was expected and
    what came.
    """
    return torch.ops.scaphoid.map_boxes(
        boxes.detach(), scores.detach(), gamma, object_boxes.detach(), height, width, original_sizes
    )


@torch.library.register_fake("scaphoid::map_boxes")
def _fake(boxes, scores, gamma, object_boxes, height, width, original_sizes):
    return boxes.new_empty((boxes.shape[0], 4))


def map_boxes_reference(
    boxes: Tensor,
    scores: Tensor,
    gamma: float,
    object_boxes: Tensor,
    height: int,
    width: int,
    original_sizes: Tensor,
) -> Tensor:
    """`map_boxes` in plain PyTorch; the same arguments and results."""
    batch, n, _ = boxes.shape
    sides = torch.tensor([width, height, width, height], dtype=torch.float64)
    if n == 0:
        box = sides * torch.tensor([0, 0, 1, 1])
    else:
        order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = order.sort(dim=1, descending=True, stable=True).indices
        ranked = boxes.double().gather(1, order[..., None].expand(batch, n, 4))
        weights = gamma ** torch.arange(1, n + 1, dtype=torch.float64)
        box = (weights[:, None] * ranked).sum(1) / weights.sum()
    start, end = object_boxes.double().split(2, 1)
    in_image = start.repeat(1, 2) + box / sides * (end - start).repeat(1, 2)
    return (in_image / sides * original_sizes.flip(1).repeat(1, 2)).float()
