"""The encoders' least time on a GPU, layer by layer: what the glue between them is held against."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from scaphoid.bench.kernel_report.gpus import Gpu
from scaphoid.bench.kernel_report.workloads import IMAGE, PART, WINDOWS
from scaphoid.trainer.models.backbone import create_encoder
from scaphoid.trainer.models.kalm import KalmConfig

BACKBONE = "resnet50"
HALF = 2  # bytes

# Images in a batch and their side as the backbone sees it, for every pass that a flow makes for one image.
KALM_SIDE = round(IMAGE * KalmConfig().global_scale)
PASSES = {
    "msfm": ((1, IMAGE), (1, IMAGE), (WINDOWS, PART)),
    "msfm_fma": ((1, IMAGE), (1, IMAGE), (1, IMAGE), (WINDOWS, PART)),
    "kalm": ((1, KALM_SIDE), (1, KALM_SIDE)),
}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer in fp16: `moved_bytes` are input, weights and output once; what follows it (batch
    norm, activation, addition) is taken as fused into it."""

    flop: int
    moved_bytes: int


@cache
def layers(batch: int, side: int) -> list[Layer]:
    """Of one pass of the backbone; nothing is computed, only shapes."""
    found: list[Layer] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = module.weight
        moved = HALF * (inputs[0].numel() + weight.numel() + output.numel())
        found.append(Layer(2 * output.numel() * (weight.numel() // weight.shape[0]), moved))

    with torch.device("meta"), torch.no_grad():
        encoder = create_encoder(BACKBONE, False).eval()
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(keep)
        encoder.features(torch.empty(batch, 1, side, side))
    return found


def encoders_us(gpu: Gpu, flow: str) -> float:
    """All of a flow's passes for one image, every layer at the roofline."""
    passes = [layers(batch, side) for batch, side in PASSES[flow]]
    return sum(gpu.roofline_us(layer.moved_bytes, fp16_flop=layer.flop) for found in passes for layer in found)
