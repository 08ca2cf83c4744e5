"""The object_crop stage (MSFM, section 2.4): from the main stage's maps to a closer look at the object."""

from torch import Tensor, nn

from scaphoid.kernels.crop_resize import crop_resize
from scaphoid.kernels.object_box import object_box


class ObjectCrop(nn.Module):
    def forward(self, image: Tensor, activation: Tensor, class_activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 Tensor[B, 1, H, W] (H = W) and two maps [B, h, w] to the object box [B, 4] in pixels of `image`, the
        object image [B, 1, H, W] and the box's margin [B, 1]. No gradient flows through the box."""
        height, width = image.shape[2], image.shape[3]
        box, margin = object_box(activation.detach(), class_activation.detach(), height, width)
        crop = crop_resize(image, box.unsqueeze(1), height)
        return box, crop.squeeze(1), margin.unsqueeze(1)
