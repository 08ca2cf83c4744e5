"""Random inputs for the ops, reproducible from a seed, drawn so that ties and equal means are common."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def random_maps() -> Callable[..., Tensor]:
    def draw(seed: int, shape: tuple[int, ...], levels: int, transposed: bool = False) -> Tensor:
        """Maps of small whole numbers (sums and means are exact), as a non-contiguous view if asked for."""
        generator = torch.Generator().manual_seed(seed)
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        maps = torch.randint(-levels, levels + 1, shape, generator=generator).float()
        return maps.transpose(-2, -1) if transposed else maps

    return draw


@pytest.fixture(scope="session")
def random_boxes() -> Callable[..., Tensor]:
    def draw(seed: int, batch: int, n: int, height: int, width: int, overhang: float = 0.3) -> Tensor:
        """Boxes of positive size in float64, some of which reach over the border."""
        generator = torch.Generator().manual_seed(seed)
        corners = torch.rand(batch, n, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values
        corners = corners * (1 + 2 * overhang) - overhang
        corners[..., 1, :] += 0.01
        return (corners * torch.tensor([width, height])).reshape(batch, n, 4)

    return draw
