"""The part_crops stage (MSFM, sections 2.2 and 2.4): windows of high activation, cropped from the object image."""

from torch import Tensor, nn

from scaphoid.kernels.crop_resize import crop_resize
from scaphoid.kernels.part_windows import part_windows
from scaphoid.trainer.contracts import WINDOWS

# Shapes [height, width] in cells of a 14 x 14 map, in groups that each keep some windows; fractions of any other map.
REFERENCE_MAP = 14
WINDOW_GROUPS = (((6, 6), (7, 5)), ((8, 8), (6, 10), (7, 9)), ((10, 10), (9, 11), (8, 12)))
KEPT = (2, 2, 3)
IOU_THRESHOLD = 0.25
assert sum(KEPT) == WINDOWS


def window_groups(map_height: int, map_width: int) -> list[list[tuple[int, int]]]:
    """The groups' window shapes in cells of a `map_height` x `map_width` map. Shapes that become the same on a coarse
    map count once: a window that ties with its own copy would make every choice look unstable."""

    def cells(reference: int, side: int) -> int:
        return max(1, min(side, round(reference * side / REFERENCE_MAP)))

    shapes = [[(cells(h, map_height), cells(w, map_width)) for h, w in group] for group in WINDOW_GROUPS]
    return [list(dict.fromkeys(group)) for group in shapes]


class PartCrops(nn.Module):
    """`map_size`: height, width of the activation map; `part_size`: side of a cropped window in pixels."""

    def __init__(self, map_size: tuple[int, int], part_size: int = 224) -> None:
        super().__init__()
        self.part_size = part_size
        groups = window_groups(*map_size)
        self.shapes: list[int] = [side for group in groups for shape in group for side in shape]
        self.group_sizes: list[int] = [len(group) for group in groups]
        self.kept: list[int] = list(KEPT)
        self.iou_threshold = IOU_THRESHOLD

    def forward(self, object_image: Tensor, activation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 Tensor[B, 1, H, W] and its map [B, h, w] to window boxes [B, 7, 4] in pixels of `object_image`, their
        scores [B, 7], the cropped windows [B, 7, 1, part_size, part_size] and the margin [B, 1] of their choice."""
        boxes, scores, margin = part_windows(
            activation.detach(),
            object_image.shape[2],
            object_image.shape[3],
            self.shapes,
            self.group_sizes,
            self.kept,
            self.iou_threshold,
        )
        crops = crop_resize(object_image, boxes, self.part_size)
        return boxes, scores, crops, margin.unsqueeze(1)
