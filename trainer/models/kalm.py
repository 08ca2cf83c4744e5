"""KALM: a global CNN finds the key area, a local CNN looks at it (spec: KALM; paper, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.models.backbone import create_encoder, map_size
from scaphoid.trainer.stages.encoder import LogitsEncoder
from scaphoid.trainer.stages.key_area_crop import KeyAreaCrop
from scaphoid.trainer.stages.result import KeyAreaResult, abnormal_probability


@dataclass(frozen=True)
class KalmConfig:
    """`image_size`: I448, from which the key area is cropped; `global_scale`: shrinks it to I224 for the global CNN;
    `key_size`: side of the crop; `initial_size`: where the half extents of the key area start."""

    backbone: str = "resnet18"
    image_size: int = 448
    global_scale: float = 0.5
    key_size: int = 224
    initial_size: float = 0.5


class Kalm(nn.Module):
    system = "kalm"
    phases = ("global", "local")

    def __init__(self, config: KalmConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.global_encoder = create_encoder(config.backbone, pretrained, config.global_scale)
        self.local_encoder = create_encoder(config.backbone, pretrained)
        self.key_area_crop = KeyAreaCrop(
            map_size(self.global_encoder, config.image_size), config.key_size, config.initial_size
        )
        self.key_area_result = KeyAreaResult(config.image_size)

    def trained(self, phase: str) -> list[nn.Module]:
        """The global CNN alone; then the local CNN and the size layers with the global CNN frozen and in eval mode."""
        return [self.global_encoder] if phase == "global" else [self.local_encoder, self.key_area_crop]

    def training_logits(self, phase: str, image: Tensor) -> list[Tensor]:
        """uint8 Tensor[B, 1, H, W] to the logits [B, 2] of every loss term. The local CNN's crop is float, so that its
        gradient reaches w and h."""
        logits, activation, _ = self.global_encoder(image)
        if phase == "global":
            return [logits]
        _, key_image, _ = self.key_area_crop(image.float(), activation)
        return [self.local_encoder(key_image)[0]]

    def probabilities(self, phase: str, image: Tensor) -> dict[str, Tensor]:
        """Probabilities of abnormal, Tensor[B, 1], under the names that the flow gives them, and the width and height
        of the key area (w and h of eq. 7) as shares of the image's."""
        if phase == "global":
            return {"probability": abnormal_probability(self.global_encoder(image)[0])}
        original_size = torch.tensor([image.shape[-2:]], dtype=torch.int32, device=image.device).expand(len(image), 2)
        wanted = ("probability", "global_probability", "local_probability")
        tensors = FLOWS["kalm"].run(self.stages(), {"image": image, "original_size": original_size}, wanted)
        x0, y0, x1, y1 = (tensors["key_box"] / self.config.image_size).split(1, dim=1)
        return {name: tensors[name] for name in wanted} | {"key_area_width": x1 - x0, "key_area_height": y1 - y0}

    def stages(self) -> dict[str, nn.Module]:
        """The modules behind the flow's stages, by name."""
        return {
            "global_encoder": self.global_encoder,
            "key_area_crop": self.key_area_crop,
            "local_encoder": LogitsEncoder(self.local_encoder),
            "key_area_result": self.key_area_result,
        }
