"""The key_area_crop stage (KALM, sections 3.2 and 3.3): cropped from I448 where the activation's marginals peak."""

import math

import torch
from torch import Tensor, nn

from scaphoid.kernels.crop_resize import crop_resize
from scaphoid.kernels.key_area_box import key_area_box


class KeyAreaCrop(nn.Module):
    """`map_size`: height, width of the activation map; `key_size`: side of the crop in pixels; `initial_size`: the half
    extents w and h start as this fraction. FC_w and FC_h are one linear layer each (KALM eq. 7)."""

    def __init__(self, map_size: tuple[int, int], key_size: int = 224, initial_size: float = 0.5) -> None:
        super().__init__()
        self.key_size = key_size
        logit = math.log(initial_size / (1 - initial_size))
        self.height_weight = nn.Parameter(torch.zeros(map_size[0]))
        self.height_bias = nn.Parameter(torch.full((1,), logit))
        self.width_weight = nn.Parameter(torch.zeros(map_size[1]))
        self.width_bias = nn.Parameter(torch.full((1,), logit))

    def forward(self, image: Tensor, activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tensor[B, 1, H, W] (uint8, or float for a gradient to w and h) and the map [B, h, w] to the key area
        [B, 4] in pixels of `image`, its crop [B, 1, key_size, key_size] and the margin [B, 1]."""
        box, margin = key_area_box(
            activation,
            self.width_weight,
            self.width_bias,
            self.height_weight,
            self.height_bias,
            image.shape[2],
            image.shape[3],
        )
        crop = crop_resize(image, box.unsqueeze(1), self.key_size)
        return box, crop.squeeze(1), margin.unsqueeze(1)
