"""The six losses of MSFM (section 2.2): a term for each stage, to be added up over main, object and windows (eq. 9).

`ce`, `wce` (eq. 6), `mfl`, `wmfl` (eq. 7, the mean of per-image focal terms), `alpha-fl`, `alpha-wfl` (eq. 8, focal
of the batch mean). A weighted loss takes the weighted cross-entropy everywhere, in the focal exponent too, and
divides by the number of images, not by the sum of weights.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.distributed.nn.functional as differentiable
from torch import Tensor, distributed
from torch.nn import functional

from scaphoid.trainer.data.index import Index

Kind = Literal["ce", "wce", "mfl", "wmfl", "alpha-fl", "alpha-wfl"]
ALPHA = 0.8
BETA = 2.0

BodyPartWeights = Mapping[str | None, tuple[float, float]]


def stage_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    kind: Kind = "alpha-wfl",
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Tensor:
    """One term of eq. 9, a scalar: logits [B, 2], labels [B] int64, weights [B] (used by the weighted kinds).

    The mean is over the whole batch, summed over processes when torch.distributed is initialised (the value is then
    the same on each; DDP's gradient average gives the gradient of that value). Raises ValueError on shapes or an
    unknown kind.
    """
    terms = image_terms(logits, labels, weights, kind, beta)
    total = torch.stack((terms.sum(), terms.new_tensor(float(len(terms)))))
    if distributed.is_available() and distributed.is_initialized():
        total = differentiable.all_reduce(total)
    mean = total[0] / total[1].detach()
    return alpha * _focal(mean, beta) if kind.startswith("alpha") else mean


def image_terms(logits: Tensor, labels: Tensor, weights: Tensor, kind: Kind, beta: float = BETA) -> Tensor:
    """What `stage_loss` averages, [B] in fp32: the (weighted) cross-entropy, for `mfl` and `wmfl` its focal form."""
    _check(logits, labels, weights, kind)
    terms = functional.cross_entropy(logits.float(), labels, reduction="none")
    if kind in ("wce", "wmfl", "alpha-wfl"):
        terms = weights.float() * terms
    return _focal(terms, beta) if kind in ("mfl", "wmfl") else terms


def body_part_weights(index: Index, split: str = "train") -> dict[str | None, tuple[float, float]]:
    """(w-, w+) = (N+/N, N-/N) of each body part in a split, and of the whole split under None (for unknown parts).

    A part that holds one class only would weigh all of its images 0; it is left to the global weights. Raises
    ValueError when the split has no image or one class only.
    """
    counts: dict[str | None, list[int]] = {None: [0, 0]}
    for radiograph in index.radiographs:
        if radiograph.split == split:
            counts[None][radiograph.label] += 1
            counts.setdefault(radiograph.body_part, [0, 0])[radiograph.label] += 1
    if not all(counts[None]):
        normal, abnormal = counts[None]
        raise ValueError(
            f"split {split!r} has {normal} normal and {abnormal} abnormal images: both are needed to weigh the classes"
        )
    return {
        part: (abnormal / (normal + abnormal), normal / (normal + abnormal))
        for part, (normal, abnormal) in counts.items()
        if normal and abnormal
    }


def image_weights(weights: BodyPartWeights, body_parts: Sequence[str], labels: Tensor) -> Tensor:
    """The weight of every image, [B] fp32: its body part's and label's; of an unknown part the global one."""
    table = torch.tensor([weights.get(part, weights[None]) for part in body_parts], device=labels.device)
    return table.gather(1, labels[:, None]).squeeze(1)


def _focal(entropy: Tensor, beta: float) -> Tensor:
    return (-torch.expm1(-entropy)) ** beta * entropy


def _check(logits: Tensor, labels: Tensor, weights: Tensor, kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if logits.ndim != 2 or logits.shape[1] != 2 or not len(logits):
        raise ValueError(f"logits must be [B, 2] with B >= 1, got {list(logits.shape)}")
    for name, tensor in (("labels", labels), ("weights", weights)):
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{len(logits)}] like logits, got {list(tensor.shape)}")
