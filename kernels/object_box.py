"""`object_box`: the main stage's box from an image's two maps (MSFM, section 2.2, eq. 3 and 10)."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)
from scaphoid.kernels.cells import box_of_cells, finite_maps, threshold_margin


def object_box(activation: Tensor, class_activation: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bounding box of the largest active region, cut down to where the classes agree.

    `M` is the largest 8-connected component of `activation >= mean` (ties: the one whose first cell in row-major order
    comes first), `M'` is `class_activation >= mean`; the box bounds the cells of both. Means are taken in double.

    Args:
        activation: `Tensor[B, h, w]`, float32, the channel sum of the feature map.
        class_activation: `Tensor[B, h, w]`, float32.
        height, width: size in pixels of the image that the maps belong to.

    Returns:
        `Tensor[B, 4]`, boxes `(x0, y0, x1, y1)` in pixels, half-open, `0 <= x0 < x1 <= width`; the whole image where
        the two masks do not meet or a map has a cell that is not finite.
        `Tensor[B]`, margin: the smallest `|cell - mean| / max|cell|` of both maps; 0 for a constant map and for one
        that is not finite.

    No gradient. On CUDA a map has at most 64 cells a side. The same bits on every processor. Raises RuntimeError that
    names the argument, what was expected and what came.
    """
    return torch.ops.scaphoid.object_box(activation.detach(), class_activation.detach(), height, width)


@torch.library.register_fake("scaphoid::object_box")
def _fake(activation, class_activation, height, width):
    batch = activation.shape[0]
    return activation.new_empty((batch, 4)), activation.new_empty((batch,))


def largest_component(mask: Tensor) -> Tensor:
    """The largest 8-connected component of a mask `[h, w]`: the smallest cell number spreads until nothing changes."""
    h, w = mask.shape
    cells = h * w
    labels = torch.where(mask, torch.arange(cells).reshape(h, w), cells)
    while True:
        padded = torch.nn.functional.pad(labels, (1, 1, 1, 1), value=cells)
        spread = padded.unfold(0, 3, 1).unfold(1, 3, 1).amin((-2, -1))
        spread = torch.where(mask, spread, cells)
        if torch.equal(spread, labels):
            break
        labels = spread
    sizes = torch.bincount(labels.flatten(), minlength=cells + 1)[:cells]
    return mask & (labels == sizes.argmax())


def object_box_reference(
    activation: Tensor, class_activation: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """`object_box` in plain PyTorch on the CPU, slow; the same arguments and results."""
    batch, h, w = activation.shape
    boxes = activation.new_tensor([0.0, 0.0, width, height]).repeat(batch, 1)
    margin = activation.new_zeros(batch)
    finite = finite_maps(activation) & finite_maps(class_activation)
    for b in torch.nonzero(finite).flatten().tolist():
        maps = torch.stack((activation[b], class_activation[b])).double()
        masks = maps >= maps.mean((1, 2), keepdim=True)
        margin[b] = threshold_margin(maps).min()
        rows, columns = torch.nonzero(largest_component(masks[0]) & masks[1], as_tuple=True)
        if len(rows):
            corners = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            boxes[b] = box_of_cells(torch.stack(corners), h, w, height, width)
    return boxes, margin
