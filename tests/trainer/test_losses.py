import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from scaphoid.trainer.data.index import Index, Radiograph
from scaphoid.trainer.losses import body_part_weights, image_weights, stage_loss

KINDS = ("ce", "wce", "mfl", "wmfl", "alpha-fl", "alpha-wfl")

# Probability of the true class 1/2, 1/4, 4/5: logits (normal, abnormal) with labels 1, 0, 1.
LOGITS = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(4)]])
LABELS = torch.tensor([1, 0, 1])
WEIGHTS = torch.tensor([0.75, 0.25, 0.5])
A, B, C = math.log(2), math.log(4), math.log(1.25)


def weighted_focal(weight: float, entropy: float) -> float:
    return (1 - math.exp(-weight * entropy)) ** 2 * weight * entropy


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ce", (A + B + C) / 3),
        ("wce", (0.75 * A + 0.25 * B + 0.5 * C) / 3),
        ("mfl", (0.5**2 * A + 0.75**2 * B + 0.2**2 * C) / 3),
        ("wmfl", (weighted_focal(0.75, A) + weighted_focal(0.25, B) + weighted_focal(0.5, C)) / 3),
        ("alpha-fl", 0.8 * (1 - (1 / 2 * 1 / 4 * 4 / 5) ** (1 / 3)) ** 2 * (A + B + C) / 3),
        ("alpha-wfl", 0.8 * weighted_focal(1.0, (0.75 * A + 0.25 * B + 0.5 * C) / 3)),
    ],
)
def test_by_hand(kind: str, expected: float) -> None:
    assert stage_loss(LOGITS, LABELS, WEIGHTS, kind).item() == pytest.approx(expected, rel=1e-5)


def test_alpha_and_beta() -> None:
    mean = (A + B + C) / 3
    loss = stage_loss(LOGITS, LABELS, WEIGHTS, "alpha-fl", alpha=0.5, beta=3.0)
    assert loss.item() == pytest.approx(0.5 * (1 - math.exp(-mean)) ** 3 * mean, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_finite_where_the_answer_is_certain(kind: str) -> None:
    logits = torch.tensor([[90.0, -90.0], [-90.0, 90.0]], requires_grad=True)
    stage_loss(logits, torch.tensor([0, 1]), torch.ones(2), kind).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    logits = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, weights = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0.2, 0.7, 0.4, 0.9, 0.5])
    loss = stage_loss(logits, labels, weights, kind)
    loss.backward()
    step = 1e-2 * logits.grad / logits.grad.norm()
    with torch.no_grad():
        ahead, behind = (stage_loss(logits + sign * step, labels, weights, kind) for sign in (1, -1))
    assert (ahead - behind).item() / 2e-2 == pytest.approx(logits.grad.norm().item(), rel=1e-3)


def random_batch(images: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(2, (images,), generator=generator)
    return torch.randn(images, 2, generator=generator), labels, torch.rand(images, generator=generator)


def _one_of_two_processes(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    logits, labels, weights = random_batch(11)
    rows = slice(0, 4) if rank == 0 else slice(4, 11)
    found = {}
    for kind in KINDS:
        own = logits[rows].clone().requires_grad_()
        loss = stage_loss(own, labels[rows], weights[rows], kind)
        loss.backward()
        found[kind] = (loss.detach(), own.grad / 2)  # DDP averages over the processes
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_see_the_mean_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the spawned processes import this file by its full name
    multiprocessing.spawn(_one_of_two_processes, (tmp_path,), nprocs=2)
    logits, labels, weights = random_batch(11)
    for kind in KINDS:
        whole = logits.clone().requires_grad_()
        value = stage_loss(whole, labels, weights, kind)
        value.backward()
        halves = [torch.load(tmp_path / f"{rank}.pt")[kind] for rank in (0, 1)]
        for loss, _ in halves:
            torch.testing.assert_close(loss, value.detach())
        torch.testing.assert_close(torch.cat([gradient for _, gradient in halves]), whole.grad)


def index_of(*rows: tuple[str, int, str]) -> Index:
    return Index(
        Path("."),
        tuple(
            Radiograph(f"{i}.png", "p", "s", "frontal", part, label, None, 8, 8, split)
            for i, (part, label, split) in enumerate(rows)
        ),
    )


def test_body_part_weights_by_hand() -> None:
    train = [("hand", 1), ("hand", 0), ("hand", 0), ("hand", 0), ("wrist", 1), ("wrist", 0), ("rib", 1)]
    index = index_of(*((*row, "train") for row in train), *[("hand", 1, "valid")] * 5)
    weights = body_part_weights(index)
    assert weights == {None: (3 / 7, 4 / 7), "hand": (1 / 4, 3 / 4), "wrist": (1 / 2, 1 / 2)}
    found = image_weights(weights, ["hand", "hand", "rib", "knee"], torch.tensor([1, 0, 1, 0]))
    torch.testing.assert_close(found, torch.tensor([3 / 4, 1 / 4, 4 / 7, 3 / 7]))


def test_weights_need_both_classes() -> None:
    with pytest.raises(ValueError, match="0 normal and 2 abnormal"):
        body_part_weights(index_of(("hand", 1, "train"), ("wrist", 1, "train")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOGITS, LABELS, WEIGHTS, "focal"), "kind must be one of ce, wce"),
        ((LOGITS[:, :1], LABELS, WEIGHTS, "ce"), r"logits must be \[B, 2\]"),
        ((LOGITS, LABELS[:2], WEIGHTS, "ce"), r"labels must be \[3\]"),
        ((LOGITS, LABELS, WEIGHTS[:, None], "ce"), r"weights must be \[3\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_loss(*arguments)
