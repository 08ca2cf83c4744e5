"""The encoder stage: a timm backbone, global average pooling and one linear layer. The one place that normalises."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Encoder(nn.Module):
    """Grey radiographs to logits and two small maps (KALM eq. 1-4; MSFM eq. 3, 4 and 10).

    `scale` shrinks the image inside the graph before the backbone sees it: KALM's global CNN reads I224, the resize of
    I448 (scale 0.5), so that only I448 crosses stage boundaries.
    """

    def __init__(
        self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], scale: float = 1.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, 2)
        self.scale = scale
        # In grey levels 0..255, so that a uint8 pixel is normalised in one multiply-add.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)

    def features(self, image: Tensor) -> Tensor:
        """Tensor[B, 1, H, W] grey, uint8 or float in 0..255, to F, Tensor[B, C, h, w]."""
        pixels = image.to(self.mean.dtype)
        if self.scale != 1.0:
            size = [round(int(side) * self.scale) for side in image.shape[-2:]]
            pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
            if not image.is_floating_point():
                pixels = pixels.round()
        return self.backbone.forward_features((pixels - self.mean) / self.std)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tensor[B, 1, H, W] to logits [B, 2], activation [B, h, w] and class activation [B, h, w], all float32."""
        features = self.features(image)
        logits = self.classifier(features.mean((2, 3)))
        features = features.float()  # the maps feed `>=` and argmax: they are reduced in fp32 whatever the precision
        # W . F without a matrix product, which autocast would bring back to bf16.
        rows = self.classifier.weight.float().unbind()
        class_features = torch.stack([(features * row.view(1, -1, 1, 1)).sum(1) for row in rows])
        return logits.float(), features.sum(1), class_features.square().sum(0).sqrt()


class ActivationEncoder(nn.Module):
    """The `fma_encoder` stage: the activation map alone."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """Tensor[B, 1, H, W] to activation [B, h, w]."""
        return self.encoder.features(image).float().sum(1)


class LogitsEncoder(nn.Module):
    """The `local_encoder` stage: the logits alone."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, key_image: Tensor) -> Tensor:
        """Tensor[B, 1, H, W] to logits [B, 2]."""
        return self.encoder.classifier(self.encoder.features(key_image).mean((2, 3))).float()


class PartsEncoder(LogitsEncoder):
    """The `parts_encoder` stage: n windows an image, folded into the batch inside the graph (an ensemble cannot)."""

    def forward(self, part_images: Tensor) -> Tensor:
        """Tensor[B, n, 1, H, W] to logits [B, n, 2]."""
        logits = super().forward(part_images.flatten(0, 1))
        return logits.unflatten(0, (-1, part_images.shape[1]))
