"""What a user has without the ops: each op's computation from torch, NumPy and scikit-image as they come.

Written as well as plain Python allows: vectorised over the batch wherever the libraries can, coordinates prepared
once. They return the op's first outputs (margins are the ops' own) and run wherever their tensors are.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class PooledWindows:
    """`part_windows`: `avg_pool2d` for every window shape over the batch, then greedy suppression in NumPy for every
    image and group, as the public fine-grained codes do it."""

    def __init__(
        self,
        h: int,
        w: int,
        groups: Sequence[Sequence[tuple[int, int]]],
        counts: Sequence[int],
        iou_threshold: float,
        scale: float,
    ) -> None:
        self.groups, self.counts, self.iou_threshold = groups, counts, iou_threshold
        self.windows = [
            np.array(
                [
                    (y, x, y + rows, x + cols)
                    for rows, cols in group
                    for y in range(h - rows + 1)
                    for x in range(w - cols + 1)
                ],
                np.float32,
            )
            for group in groups
        ]
        self.areas = [(each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]) for each in self.windows]
        self.boxes = [np.ascontiguousarray(each[:, [1, 0, 3, 2]]) * np.float32(scale) for each in self.windows]

    def __call__(self, activation: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `[B, h, w]` -> boxes `[B, n, 4]` in pixels, scores `[B, n]`."""
        maps = activation[:, None]
        boxes, scores = [], []
        for number, group in enumerate(self.groups):
            pooled = [functional.avg_pool2d(maps, shape, stride=1).flatten(1) for shape in group]
            group_scores = torch.cat(pooled, 1).cpu().numpy()
            picks = np.stack([self.pick(number, image_scores) for image_scores in group_scores])
            boxes.append(self.boxes[number][picks])
            scores.append(np.take_along_axis(group_scores, picks, 1))
        found = np.concatenate(boxes, 1), np.concatenate(scores, 1)
        return torch.from_numpy(found[0]).to(activation.device), torch.from_numpy(found[1]).to(activation.device)

    def pick(self, group: int, scores: np.ndarray) -> list[int]:
        windows, areas = self.windows[group], self.areas[group]
        order = np.argsort(-scores, kind="stable")
        picks: list[int] = []
        while len(picks) < self.counts[group]:
            if not len(order):
                picks.append(picks[-1])
                continue
            best, rest = order[0], order[1:]
            picks.append(int(best))
            sides = np.minimum(windows[rest, 2:], windows[best, 2:]) - np.maximum(windows[rest, :2], windows[best, :2])
            both = np.prod(np.maximum(sides, 0), 1)
            order = rest[both <= self.iou_threshold * (areas[rest] + areas[best] - both)]
        return picks


def labelled_box(activation: Tensor, class_activation: Tensor, scale: float) -> Tensor:
    """`object_box` by `skimage.measure.label`, an image at a time: maps `[B, h, w]` -> boxes `[B, 4]` in pixels."""
    from skimage.measure import label

    maps, class_maps = activation.cpu().numpy(), class_activation.cpu().numpy()
    masks = maps >= maps.mean((1, 2), dtype=np.float64, keepdims=True)
    class_masks = class_maps >= class_maps.mean((1, 2), dtype=np.float64, keepdims=True)
    boxes = np.empty((len(maps), 4), np.float32)
    for box, mask, class_mask in zip(boxes, masks, class_masks, strict=True):
        labels = label(mask, connectivity=2)
        largest = np.bincount(labels.ravel())[1:].argmax() + 1
        rows, columns = np.nonzero((labels == largest) & class_mask)
        if len(rows):
            box[:] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        else:
            box[:] = 0, 0, mask.shape[1], mask.shape[0]
    return torch.from_numpy(boxes * np.float32(scale)).to(activation.device)


def _grid(boxes: Tensor, size: int, height: int, width: int) -> Tensor:
    """Sampling grid of the windows `[B, n, 4]` stacked along its height: `[B, n * size, size, 2]`."""
    steps = (torch.arange(size, dtype=boxes.dtype, device=boxes.device) + 0.5) / size
    x0, y0, x1, y1 = boxes[..., None].unbind(2)
    x = (x0 + steps * (x1 - x0)) * (2 / width) - 1
    y = (y0 + steps * (y1 - y0)) * (2 / height) - 1
    shape = (*boxes.shape[:2], size, size)
    return torch.stack((x[:, :, None].expand(shape), y[..., None].expand(shape)), -1).flatten(1, 2)


def _sampled(image: Tensor, grid: Tensor) -> Tensor:
    return functional.grid_sample(image, grid, "bilinear", padding_mode="border", align_corners=False)


def grid_sample_batch(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """`crop_resize` by one `grid_sample` over the batch, an image's windows stacked in its grid: `[B, n, C, s, s]`."""
    crops = _sampled(image, _grid(boxes, size, *image.shape[2:]))
    return crops.unflatten(2, (boxes.shape[1], size)).transpose(1, 2)


def grid_sample_images(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The same by a call an image, whose pixels then stay in the cache."""
    return torch.cat([grid_sample_batch(image[b : b + 1], boxes[b : b + 1], size) for b in range(len(image))])


def grid_sample_list(image: Tensor, boxes: Tensor, size: int) -> list[Tensor]:
    """The same without putting the images' crops into one tensor."""
    return [grid_sample_batch(image[b : b + 1], boxes[b : b + 1], size) for b in range(len(image))]


def eager_key_area_box(
    activation: Tensor,
    width_weight: Tensor,
    width_bias: Tensor,
    height_weight: Tensor,
    height_bias: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """`key_area_box` in fp32 torch: boxes `[B, 4]`."""

    def interval(dim: int, weight: Tensor, bias: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
        marginal = activation.sum(dim)
        low, high = marginal.aminmax(dim=1, keepdim=True)
        scaled = (marginal - low) / (high - low).clamp_min(torch.finfo(marginal.dtype).tiny)
        half = torch.sigmoid(torch.mv(scaled, weight) + bias) / 2
        centre = (marginal.argmax(1) + 0.5) / marginal.shape[1]
        centre = torch.maximum(torch.minimum(centre, 1 - half), half)
        return (centre - half) * pixels, (centre + half) * pixels

    x0, x1 = interval(1, width_weight, width_bias, width)
    y0, y1 = interval(2, height_weight, height_bias, height)
    return torch.stack((x0, y0, x1, y1), 1)


def _enlarged_below(image: Tensor, activation: Tensor, theta: float) -> Tensor:
    enlarged = functional.interpolate(activation[:, None], image.shape[2:], mode="bilinear", align_corners=False)
    return enlarged < theta * activation.amax((1, 2))[:, None, None, None]


def eager_suppress_where(image: Tensor, activation: Tensor, theta: float, r: float) -> Tensor:
    """`suppress_artifacts` in torch, choosing between the image and a dimmed copy of it."""
    return torch.where(_enlarged_below(image, activation, theta), image, (image * r).round_().to(torch.uint8))


def eager_suppress_mask(image: Tensor, activation: Tensor, theta: float, r: float) -> Tensor:
    """The same by the paper's mask of 1 and r, multiplied with the pixels."""
    mask = torch.where(_enlarged_below(image, activation, theta), 1.0, r)
    return (image * mask).round_().to(torch.uint8)


def eager_activation_maps(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`activation_maps` as the encoder computes it: a pass over the features for the sum and for each class."""
    features = features.float()
    of_class = torch.stack([(features * row.view(1, -1, 1, 1)).sum(1) for row in weight.float().unbind()])
    return features.sum(1), of_class.square().sum(0).sqrt()


def product_activation_maps(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one matrix product, with the sum as a further row of the weights."""
    rows = torch.cat((torch.ones_like(weight[:1]), weight)).float()
    maps = torch.matmul(rows, features.float().flatten(2)).unflatten(2, features.shape[2:])
    return maps[:, 0], maps[:, 1:].square().sum(1).sqrt()


def eager_map_boxes(
    boxes: Tensor, scores: Tensor, gamma: float, object_boxes: Tensor, height: int, width: int, original_sizes: Tensor
) -> Tensor:
    """`map_boxes` in fp32 torch: boxes `[B, 4]` in original pixels."""
    n = boxes.shape[1]
    weights = gamma ** torch.arange(1, n + 1, dtype=boxes.dtype, device=boxes.device)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    ranked = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    box = (weights[:, None] * ranked).sum(1) / weights.sum()
    sides = boxes.new_tensor([width, height, width, height])
    start, end = object_boxes.split(2, 1)
    in_image = start.repeat(1, 2) + box / sides * (end - start).repeat(1, 2)
    return in_image / sides * original_sizes.flip(1).repeat(1, 2)


def gradients(crop: Callable[..., Tensor], image: Tensor, boxes: Tensor, size: int) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of a crop, as a function: gradients to image and boxes of the sum of its pixels."""
    leaves = image.detach().requires_grad_(), boxes.detach().requires_grad_()
    crops = crop(*leaves, size)
    ones = torch.ones_like(crops)
    return lambda: torch.autograd.grad(crops, leaves, ones, retain_graph=True)
