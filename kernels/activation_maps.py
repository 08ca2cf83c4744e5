"""`activation_maps`: an encoder's features reduced to the two maps that later stages need (KALM eq. 4; MSFM eq. 3
and 10)."""

import torch
from torch import Tensor

import scaphoid.kernels.library  # noqa: F401  (loads the ops)


def activation_maps(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Channel sum of the features, and L2 norm over classes of `weight . features`, in one pass over the features.

    For features that exist as a tensor: beside a model in eager mode, or from an engine that hands them out. Encoders
    that are exported reduce their maps with plain operations (`trainer/stages/encoder.py`), as engines know no custom
    ops.

    Args:
        features: `Tensor[B, C, h, w]`, float16, bfloat16, float32 or float64; contiguous or channels-last, other
            strides are copied first.
        weight: `Tensor[K, C]`, the classifier's; at most 8 classes. float32, or of the features' dtype; float64 for
            float64 features.

    Returns:
        activation `Tensor[B, h, w]` and class activation `Tensor[B, h, w]`, float32 (float64 for float64 features):
        both feed `>=` and argmax, so half features are widened before anything is summed. A feature that is not finite
        spreads to its own cell alone; the norm is infinite where a square overflows.

    A map depends on its own image alone: sums are taken in a fixed order, whatever the batch and the threads.
    Differentiable in both arguments; the norm's gradient at 0 is 0. Raises RuntimeError that names the argument, what
    was expected and what came.
    """
    return torch.ops.scaphoid.activation_maps(features, weight)


def _sum_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


@torch.library.register_fake("scaphoid::activation_maps")
def _fake(features, weight):
    shape = features.shape[0], features.shape[2], features.shape[3]
    dtype = _sum_dtype(features)
    return features.new_empty(shape, dtype=dtype), features.new_empty(shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_activation, grad_class_activation):
    features, weight = ctx.saved_tensors
    dtype = _sum_dtype(features)
    values, rows = features.flatten(2).to(dtype), weight.to(dtype)
    of_class = rows @ values
    squares = of_class.square().sum(1, keepdim=True)
    positive = squares > 0
    norm = torch.where(positive, squares, 1.0).sqrt()
    direction = torch.where(positive, of_class / norm, 0.0)
    grad_of_class = grad_class_activation.flatten(1)[:, None] * direction
    grad_features = grad_activation.flatten(1)[:, None] + rows.t() @ grad_of_class
    grad_weight = (grad_of_class @ values.transpose(1, 2)).sum(0)
    return grad_features.reshape(features.shape).to(features.dtype), grad_weight.to(weight.dtype)


torch.library.register_autograd("scaphoid::activation_maps", _backward, setup_context=_setup_context)


def activation_maps_reference(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`activation_maps` in plain PyTorch, differentiable by autograd except where the norm is 0; the same arguments and
    results."""
    values, rows = features.to(_sum_dtype(features)), weight.to(_sum_dtype(features))
    of_class = torch.stack([(values * row[:, None, None]).sum(1) for row in rows.unbind()], 1)
    return values.sum(1), torch.linalg.vector_norm(of_class, dim=1)
