"""`suppress_artifacts`: feature-map augmentation dims what a pretrained encoder finds most striking (MSFM's FMA; on the
pixels before normalisation, where the paper does not say)."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)
from scaphoid.kernels.cells import finite_maps
from scaphoid.kernels.crop_resize import sample_positions


def suppress_artifacts(image: Tensor, activation: Tensor, theta: float, r: float) -> Tensor:
    """Multiplies by `r` the pixels whose activation, enlarged to the image, reaches `theta` times the map's maximum.

    The map is enlarged bilinearly (half-pixel centres, in double); its maximum is taken before.

    Args:
        image: `Tensor[B, 1, H, W]`, uint8.
        activation: `Tensor[B, h, w]`, float32, of the frozen pretrained encoder.
        theta: threshold, a fraction of the map's maximum; finite.
        r: share of the brightness that is kept, in [0, 1].

    Returns:
        `Tensor[B, 1, H, W]`, uint8, rounded half to even. Unchanged where the map has a cell that is not finite.

    No gradient. Raises RuntimeError that names the argument, what was expected and what came.
    """
    return torch.ops.scaphoid.suppress_artifacts(image, activation.detach(), theta, r)


@torch.library.register_fake("scaphoid::suppress_artifacts")
def _fake(image, activation, theta, r):
    return image.new_empty(image.shape)


def _enlarged(maps: Tensor, size: int) -> Tensor:
    """Maps `[..., cells]` in double to `[..., size]`. Written as `a + weight * (b - a)`: between equal cells exactly
    their value, which `interpolate` misses by a rounding error."""
    cells = maps.new_tensor(maps.shape[-1])
    low, high, weight = sample_positions(torch.zeros_like(cells), cells, size, maps.shape[-1])
    first, second = maps[..., low], maps[..., high]
    return first + weight * (second - first)


def suppress_artifacts_reference(image: Tensor, activation: Tensor, theta: float, r: float) -> Tensor:
    """`suppress_artifacts` in plain PyTorch; the same arguments and results."""
    maps = activation.double()
    rows = _enlarged(maps, image.shape[3])
    enlarged = _enlarged(rows.transpose(1, 2), image.shape[2]).transpose(1, 2)
    below = enlarged < theta * maps.amax((1, 2))[:, None, None]
    keep = (below | ~finite_maps(activation)[:, None, None])[:, None]
    return torch.where(keep, image, (image.double() * r).round().to(torch.uint8))
