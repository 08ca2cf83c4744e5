"""MSFM: main, object and parts stages over one encoder and one classifier (spec: MSFM; paper, section 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.models.backbone import PACKAGED, create_encoder, map_size
from scaphoid.trainer.stages.encoder import ActivationEncoder, PartsEncoder
from scaphoid.trainer.stages.object_crop import ObjectCrop
from scaphoid.trainer.stages.part_crops import PartCrops
from scaphoid.trainer.stages.result import GAMMA, MainResult, PartsResult, Result, abnormal_probability
from scaphoid.trainer.stages.suppress import Suppress


@dataclass(frozen=True)
class MsfmConfig:
    """`image_size`: side of the image and of the object image; `part_size`: side of a cropped window; `scale`: the
    backbone sees each of them shrunk by this factor (1 in the paper); `fma`, `theta`, `r`: whether training dims the
    hottest cells of a frozen ImageNet encoder, from which share of its peak, and to which share of the brightness;
    `gamma`: weights of the windows in the box (eq. 11)."""

    backbone: str = "resnet50"
    image_size: int = 448
    part_size: int = 224
    scale: float = 1.0
    fma: bool = False
    theta: float = 0.6
    r: float = 0.15
    gamma: float = GAMMA

    @property
    def flow(self) -> str:
        return "msfm_fma" if self.fma else "msfm"


class Msfm(nn.Module):
    system = "msfm"
    phases = ("main", "joint")  # crops of an untrained map harm: the main stage goes first, alone

    def __init__(self, config: MsfmConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = create_encoder(config.backbone, pretrained, config.scale)
        # Frozen, so ImageNet's whatever the encoder starts from, wherever that needs no download.
        imagenet = pretrained or config.backbone == PACKAGED
        self.fma_encoder = create_encoder(config.backbone, imagenet, config.scale).requires_grad_(False)
        self.suppress = Suppress(config.theta, config.r)
        self.object_crop = ObjectCrop()
        self.part_crops = PartCrops(map_size(self.encoder, config.image_size), config.part_size)
        self.result = Result(config.image_size, config.gamma)

    def trained(self, phase: str) -> list[nn.Module]:
        return [self.encoder]

    def training_logits(self, phase: str, image: Tensor) -> list[Tensor]:
        """uint8 Tensor[B, 1, H, W] to the logits [B, 2] of every loss term (eq. 9): main, object and each window. Main,
        object and parts run in that order, each updating the running statistics when the encoder is in train mode."""
        logits, activation, class_activation = self.encoder(image)
        if phase == "main":
            return [logits]
        _, object_image, _ = self.object_crop(image, activation, class_activation)
        object_logits, object_activation, _ = self.encoder(object_image)
        _, _, part_images, _ = self.part_crops(object_image, object_activation)
        parts_logits = PartsEncoder(self.encoder)(part_images)
        return [logits, object_logits, *parts_logits.unbind(1)]

    def augment(self, image: Tensor) -> Tensor:
        """Feature-map augmentation, when the run uses it: in training between flip and jitter, and at inference."""
        if not self.config.fma:
            return image
        with torch.no_grad():
            return self.suppress(image, ActivationEncoder(self.fma_encoder)(image))

    def probabilities(self, phase: str, image: Tensor) -> dict[str, Tensor]:
        """Probabilities of abnormal, Tensor[B, 1], under the names that the flow gives them."""
        if phase == "main":
            return {"probability": abnormal_probability(self.encoder(self.augment(image))[0])}
        original_size = torch.tensor([image.shape[-2:]], dtype=torch.int32, device=image.device).expand(len(image), 2)
        wanted = (
            "probability",
            "main_probability",
            "object_probability",
            "parts_probability",
            "probability_with_parts",
        )
        flow = FLOWS[self.config.flow]
        tensors = flow.run(self.stages(), {"image": image, "original_size": original_size}, wanted)
        return {name: tensors[name] for name in wanted}

    def stages(self) -> dict[str, nn.Module]:
        """The modules behind the flows' stages, by name; `msfm` and `msfm_fma` share all but the first two."""
        return {
            "fma_encoder": ActivationEncoder(self.fma_encoder),
            "suppress": self.suppress,
            "encoder": self.encoder,
            "object_crop": self.object_crop,
            "part_crops": self.part_crops,
            "parts_encoder": PartsEncoder(self.encoder),
            "main_result": MainResult(),
            "result": self.result,
            "parts_result": PartsResult(),
        }
