"""`crop_resize`: boxes cut out of images and resized to one size."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)


def crop_resize(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Bilinear crops with half-pixel centres (`align_corners=False`), clamped to the image.

    Output pixel `i` of an axis reads position `x0 + (i + 0.5) * (x1 - x0) / size - 0.5`, clamped to `[0, side - 1]`.

    Args:
        image: `Tensor[B, C, H, W]`, uint8, float16, bfloat16, float32 or float64; contiguous, channels-last and any
            other strides are read in place.
        boxes: `Tensor[B, n, 4]`, `(x0, y0, x1, y1)` in pixels; float32, for a float64 image float64. The formula holds
            for every box: an empty one repeats a point, a reversed one mirrors, one outside the image repeats its
            border. A position that is not a number reads pixel 0.
        size: side of the crops in pixels.

    Returns:
        `Tensor[B, n, C, size, size]` of the image's dtype, contiguous whatever the image's layout. Rows are mixed
        first, then columns, in float32 (float64 for float64), then rounded once, half to even. A float pixel that is
        not finite spreads to every output that reads it, also with weight 0.

    For float images differentiable in the image and in the boxes (once); a clamped position does not move with its box.
    Gradients are summed in float32 (those of a box in float64). On CUDA the sum at an image's pixel runs in no fixed
    order, unless `torch.use_deterministic_algorithms(True)`: then in that of the CPU.
    Raises RuntimeError that names the argument, what was expected and what came.
    """
    return torch.ops.scaphoid.crop_resize(image, boxes, size)


@torch.library.register_fake("scaphoid::crop_resize")
def _fake(image, boxes, size):
    return image.new_empty((image.shape[0], boxes.shape[1], image.shape[1], size, size))


@torch.library.register_fake("scaphoid::crop_resize_backward")
def _fake_backward(grad, image, boxes, deterministic=False, to_image=True, to_boxes=True):
    return image.new_empty(image.shape if to_image else 0), boxes.new_empty(boxes.shape if to_boxes else 0)


def _setup_context(ctx, inputs, output):
    image, boxes, _size = inputs
    ctx.save_for_backward(image, boxes)


def _backward(ctx, grad):
    to_image, to_boxes, _ = ctx.needs_input_grad
    deterministic = torch.are_deterministic_algorithms_enabled()
    of_image, of_boxes = torch.ops.scaphoid.crop_resize_backward(
        grad, *ctx.saved_tensors, deterministic, to_image, to_boxes
    )
    return of_image if to_image else None, of_boxes if to_boxes else None, None


torch.library.register_autograd("scaphoid::crop_resize", _backward, setup_context=_setup_context)


def sample_positions(start: Tensor, end: Tensor, size: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels before and after each output position and the weight of the second: `[..., size]` for ends `[...]`."""
    steps = torch.arange(size, dtype=start.dtype, device=start.device) + 0.5
    position = start[..., None] + steps * (end - start)[..., None] / size - 0.5
    position = torch.where(position >= 0, position, torch.zeros_like(position))  # NaN compares false
    position = torch.where(position <= limit - 1, position, torch.full_like(position, limit - 1))
    low = position.detach().long()
    return low, (low + 1).clamp(max=limit - 1), position - low


def crop_resize_reference(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """`crop_resize` in plain PyTorch, differentiable by autograd; the same arguments and results."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    left, right, along = sample_positions(x0, x1, size, image.shape[3])
    top, bottom, down = sample_positions(y0, y1, size, image.shape[2])
    pixels = image.to(boxes.dtype).permute(0, 2, 3, 1)  # indices first, so that gathered rows end in channels
    batch = torch.arange(image.shape[0], device=image.device)[:, None, None, None]

    def column(x: Tensor) -> Tensor:
        x = x[..., None, :]
        first, second = pixels[batch, top[..., None], x], pixels[batch, bottom[..., None], x]
        return first + down[..., None, None] * (second - first)

    before, after = column(left), column(right)
    crops = (before + along[..., None, :, None] * (after - before)).permute(0, 1, 4, 2, 3)
    return (crops if image.is_floating_point() else crops.round()).to(image.dtype)
