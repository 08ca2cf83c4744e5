"""Cells of a feature map and pixels of its image, for the references: cell `(r, c)` of an `h x w` map covers pixels
`[r*H/h, (r+1)*H/h) x [c*W/w, (c+1)*W/w)`."""

import torch
from torch import Tensor


def box_of_cells(corners: Tensor, h: int, w: int, height: int, width: int) -> Tensor:
    """`corners` `[..., 4]` (top, left, bottom, right) in cells -> boxes `[..., 4]` `(x0, y0, x1, y1)` in pixels."""
    top, left, bottom, right = corners.double().unbind(-1)
    return torch.stack((left * width / w, top * height / h, right * width / w, bottom * height / h), -1).float()


def finite_maps(maps: Tensor) -> Tensor:
    """Which of the maps `[B, h, w]` hold finite cells only: bool `[B]`."""
    return torch.isfinite(maps).flatten(1).all(1)


def threshold_margin(maps: Tensor) -> Tensor:
    """Smallest relative distance of a cell from the decision `cell >= mean`: `[N, h, w]` in double -> `[N]`."""
    nearest = (maps - maps.mean((1, 2), keepdim=True)).abs().amin((1, 2))
    largest = maps.abs().amax((1, 2))
    return torch.where(largest > 0, nearest / largest, 0.0)
