"""The result stages: from logits and boxes to probabilities and boxes in pixels of the original radiograph."""

import torch
from torch import Tensor, nn

from scaphoid.kernels.map_boxes import map_boxes

GAMMA = 0.5  # weight of the i-th window by falling score is gamma^i (MSFM eq. 11)


def abnormal_probability(logits: Tensor) -> Tensor:
    """logits Tensor[..., 2] to the probability of abnormal, Tensor[..., 1]."""
    return torch.softmax(logits, dim=-1)[..., 1:]


def to_original(boxes: Tensor, original_size: Tensor, height: int, width: int) -> Tensor:
    """boxes [B, 4] in pixels of the image (height x width) to pixels of the original radiograph."""
    whole = torch.tensor([0.0, 0.0, float(width), float(height)]).to(boxes).expand(boxes.shape[0], 4)
    scores = torch.ones_like(boxes[:, :1])
    return map_boxes(boxes.unsqueeze(1), scores, 1.0, whole, height, width, original_size)


class MainResult(nn.Module):
    """The `main_result` stage: main-stage triage needs this alone."""

    def forward(self, main_logits: Tensor) -> Tensor:
        return abnormal_probability(main_logits)


class Result(nn.Module):
    """The `result` stage of MSFM. `image_size`: side in pixels of the image and of the object image."""

    def __init__(self, image_size: int, gamma: float = GAMMA) -> None:
        super().__init__()
        self.image_size = image_size
        self.gamma = gamma

    def forward(
        self,
        main_logits: Tensor,
        object_logits: Tensor,
        object_box: Tensor,
        object_margin: Tensor,
        part_boxes: Tensor,
        part_scores: Tensor,
        part_margin: Tensor,
        original_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs and outputs as the contract lists them; the boxes given back are in pixels of the original."""
        size = self.image_size
        object_probability = abnormal_probability(object_logits)
        probability = (abnormal_probability(main_logits) + object_probability) / 2
        box = map_boxes(part_boxes, part_scores, self.gamma, object_box, size, size, original_size)
        windows = part_boxes.shape[1]
        window_boxes = map_boxes(
            part_boxes.reshape(-1, 1, 4),
            part_scores.reshape(-1, 1),
            self.gamma,
            object_box.repeat_interleave(windows, 0),
            size,
            size,
            original_size.repeat_interleave(windows, 0),
        ).reshape(-1, windows, 4)
        main_box = to_original(object_box, original_size, size, size)
        margin = torch.minimum(object_margin, part_margin)
        return probability, object_probability, box, main_box, window_boxes, part_scores, margin


class PartsResult(nn.Module):
    """The `parts_result` stage: what depends on the parts' logits, and nothing else."""

    def forward(self, main_logits: Tensor, object_logits: Tensor, parts_logits: Tensor) -> tuple[Tensor, Tensor]:
        parts_probability = abnormal_probability(parts_logits).mean(1)
        total = abnormal_probability(main_logits) + abnormal_probability(object_logits) + parts_probability
        return parts_probability, total / 3


class KeyAreaResult(nn.Module):
    """The `key_area_result` stage of KALM: `(S_g + S_l) / 2` and the key area. `image_size`: side of the image."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(
        self, global_logits: Tensor, local_logits: Tensor, key_box: Tensor, key_margin: Tensor, original_size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        global_probability = abnormal_probability(global_logits)
        local_probability = abnormal_probability(local_logits)
        probability = (global_probability + local_probability) / 2
        box = to_original(key_box, original_size, self.image_size, self.image_size)
        return probability, global_probability, local_probability, box, key_margin
