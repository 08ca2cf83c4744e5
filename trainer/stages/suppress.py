"""The suppress stage (MSFM's feature-map augmentation): dims the pixels under the hottest cells of a frozen encoder.

`msfm_fma`'s margin leaves this threshold out: of hundreds of thousands of pixels the nearest always lies at rounding
distance from it, so that the margin would be 0 for every image.
"""

from torch import Tensor, nn

from scaphoid.kernels.suppress_artifacts import suppress_artifacts


class Suppress(nn.Module):
    """`theta`: cells at or above `theta * max(activation)` are dimmed; `r`: the share of brightness they keep."""

    def __init__(self, theta: float = 0.6, r: float = 0.15) -> None:
        super().__init__()
        self.theta = theta
        self.r = r

    def forward(self, image: Tensor, activation: Tensor) -> Tensor:
        """uint8 Tensor[B, 1, H, W] and float Tensor[B, h, w] to the dimmed uint8 image."""
        return suppress_artifacts(image, activation, self.theta, self.r)
