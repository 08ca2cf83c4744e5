"""A plain classifier: the baseline, KALM's first training stage, and the start of MSFM."""

from dataclasses import dataclass

from torch import Tensor, nn

from scaphoid.trainer.models.backbone import create_encoder
from scaphoid.trainer.stages.result import abnormal_probability


@dataclass(frozen=True)
class PlainConfig:
    """`scale`: the backbone sees the image shrunk by this factor (0.5 of 448 is KALM's I224)."""

    backbone: str = "resnet50"
    image_size: int = 448
    scale: float = 1.0


class Plain(nn.Module):
    system = "plain"
    phases = ("global",)

    def __init__(self, config: PlainConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = create_encoder(config.backbone, pretrained, config.scale)

    def trained(self, phase: str) -> list[nn.Module]:
        return [self.encoder]

    def training_logits(self, phase: str, image: Tensor) -> list[Tensor]:
        """uint8 Tensor[B, 1, H, W] to the logits [B, 2] of every loss term."""
        return [self.encoder(image)[0]]

    def probabilities(self, phase: str, image: Tensor) -> dict[str, Tensor]:
        """Probability of abnormal, Tensor[B, 1], under the names that the flow gives it."""
        return {"probability": abnormal_probability(self.encoder(image)[0])}
