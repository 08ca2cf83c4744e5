"""`key_area_box`: KALM's key area localisation, from eq. 4 on; kept inside the image, which the paper leaves open."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)


def key_area_box(
    activation: Tensor,
    width_weight: Tensor,
    width_bias: Tensor,
    height_weight: Tensor,
    height_bias: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Box around the peak of the map's two marginals, sized by a linear layer an axis.

    `V_w`, `V_h`: column and row sums of the map (in double), min-max scaled to [0, 1], a constant one to zeros. Centre:
    the middle of the cell where each peaks (the first of equals). Size, as a fraction of the image:
    `sigmoid(weight . V + bias)`. The centre is then moved so that the box lies inside the image.

    Args:
        activation: `Tensor[B, h, w]`, float32 or float64.
        width_weight, width_bias: `Tensor[w]`, `Tensor[1]` of the same dtype: the layer on `V_w`.
        height_weight, height_bias: `Tensor[h]`, `Tensor[1]`: the layer on `V_h`.
        height, width: size in pixels of the image that the map belongs to.

    Returns:
        `Tensor[B, 4]`, boxes `(x0, y0, x1, y1)` in pixels, half-open, within the image; the whole image, without a
        gradient, where the map, or a layer's answer on it, is not finite.
        `Tensor[B]`, margin: largest less second largest sum of an axis (not scaled), over `max|activation|` times the
        number of cells summed, the smaller of both axes; 0 for an axis of equal sums or of one cell, and where the box
        is the whole image for want of finite values.

    The boxes are differentiable in the weights and biases: also where the centre was moved, which then depends on the
    size. The map gets no gradient: the argmax has none, and KALM trains this with its encoder frozen. Raises
    RuntimeError that names the argument, what was expected and what came.
    """
    return torch.ops.scaphoid.key_area_box(
        activation.detach(), width_weight, width_bias, height_weight, height_bias, height, width
    )


@torch.library.register_fake("scaphoid::key_area_box")
def _fake(activation, width_weight, width_bias, height_weight, height_bias, height, width):
    batch = activation.shape[0]
    return activation.new_empty((batch, 4)), activation.new_empty((batch,))


def scaled_marginal(activation: Tensor, dim: int) -> Tensor:
    """Sum over `dim` of the map `[B, h, w]`, min-max scaled, in double: `[B, w]` (dim 1) or `[B, h]` (dim 2). NaN where
    a map's sums are not finite."""
    marginal = activation.double().sum(dim)
    low, high = marginal.aminmax(dim=1, keepdim=True)
    extent = high - low
    scaled = torch.where(extent > 0, (marginal - low) / extent, torch.zeros_like(marginal))
    return torch.where(torch.isfinite(extent), scaled, torch.nan)


def _axis(scaled: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and size of the box along one axis, in units of the image's side: `[B]` each."""
    cells = torch.arange(scaled.shape[1], device=scaled.device)
    peak = torch.where(scaled == scaled.amax(1, keepdim=True), cells, scaled.shape[1]).amin(1)
    centre = (peak.double() + 0.5) / scaled.shape[1]
    return centre, torch.sigmoid(scaled @ weight.double() + bias.double())


def _axis_gradients(
    grad_start: Tensor, grad_end: Tensor, scaled: Tensor, weight: Tensor, bias: Tensor, defined: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one layer, from those of the interval's ends in units of the image's side."""
    centre, size = _axis(scaled, weight, bias)
    moved = torch.where(centre < size / 2, 0.5, torch.where(centre > 1 - size / 2, -0.5, 0.0))
    grad_size = grad_start * (moved - 0.5) + grad_end * (moved + 0.5)
    grad_logit = torch.where(defined, grad_size * size * (1 - size), 0.0)
    grad_weight = grad_logit @ torch.where(defined[:, None], scaled, 0.0)
    return grad_weight.to(weight.dtype), grad_logit.sum().reshape(1).to(bias.dtype)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_boxes, _grad_margin):
    activation, width_weight, width_bias, height_weight, height_bias = ctx.saved_tensors
    across, down = scaled_marginal(activation, 1), scaled_marginal(activation, 2)
    widths, heights = _axis(across, width_weight, width_bias)[1], _axis(down, height_weight, height_bias)[1]
    defined = torch.isfinite(widths) & torch.isfinite(heights)
    x0, y0, x1, y1 = grad_boxes.double().unbind(1)
    width, height = ctx.width, ctx.height
    grad_width = _axis_gradients(x0 * width, x1 * width, across, width_weight, width_bias, defined)
    grad_height = _axis_gradients(y0 * height, y1 * height, down, height_weight, height_bias, defined)
    return None, *grad_width, *grad_height, None, None


torch.library.register_autograd("scaphoid::key_area_box", _backward, setup_context=_setup_context)


def _interval(scaled: Tensor, weight: Tensor, bias: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    centre, size = _axis(scaled, weight, bias)
    half = size / 2
    centre = torch.where(centre < half, half, torch.where(centre > 1 - half, 1 - half, centre))
    start, end = centre - half, centre + half
    return torch.where(start < 0, 0.0, start) * pixels, torch.where(end > 1, 1.0, end) * pixels


def key_area_box_reference(
    activation: Tensor,
    width_weight: Tensor,
    width_bias: Tensor,
    height_weight: Tensor,
    height_bias: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """`key_area_box` in plain PyTorch, differentiable by autograd; the same arguments and results."""
    across, down = scaled_marginal(activation, 1), scaled_marginal(activation, 2)
    x0, x1 = _interval(across, width_weight, width_bias, width)
    y0, y1 = _interval(down, height_weight, height_bias, height)
    boxes = torch.stack((x0, y0, x1, y1), 1)
    defined = ~torch.isnan(boxes).any(1)
    boxes = torch.where(defined[:, None], boxes, boxes.new_tensor([0.0, 0.0, width, height]))
    leads = []
    for dim in (1, 2):
        means = activation.double().mean(dim)
        best = means.topk(min(2, means.shape[1]), 1).values
        leads.append(best[:, 0] - best[:, -1])
    largest = activation.double().abs().amax((1, 2))
    margin = torch.where(defined & (largest > 0), torch.minimum(*leads) / largest, 0.0)
    return boxes.to(activation.dtype), margin.to(activation.dtype)
