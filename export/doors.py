"""What really goes in and out of the stages of a trained model, held against their contracts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scaphoid.export.runner import run
from scaphoid.trainer.contracts import ENCODED, Stage
from scaphoid.trainer.flows import Flow

SAMPLE = b"P5\n96 64\n255\n" + bytes((7 * x + 5 * y + x * y // 16) % 256 for y in range(64) for x in range(96))
TORCH_TYPES = {"UINT8": torch.uint8, "INT32": torch.int32, "FP32": torch.float32}


class DoorError(ValueError):
    """A stage that breaks its contract. One line: which tensor, what the contract says, what came."""


@dataclass(frozen=True)
class Door:
    """What really goes in and out of one stage of a trained model, from one run on a sample of two images."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def describe(self, stage: Stage) -> dict:
        """The stage's contract with the run's numbers in place of words."""

        def tensors(contract, samples) -> list[dict]:
            return [
                {"name": tensor.name, "dtype": tensor.dtype, "dims": list(sample.shape[1:])}
                for tensor, sample in zip(contract, samples, strict=True)
            ]

        return {
            "kind": stage.kind,
            "inputs": tensors(stage.inputs, self.inputs),
            "outputs": tensors(stage.outputs, self.outputs),
        }


def record(flow: Flow, stages: Mapping) -> dict[str, Door]:
    """Run `flow` on a sample and keep what crossed every stage's door. Raises DoorError where that breaks the
    contract."""
    tensors = run(flow, stages, [SAMPLE, SAMPLE], flow.outputs)
    tensors[ENCODED.name] = torch.empty(2, len(SAMPLE), dtype=torch.uint8)
    doors = {}
    for step in flow.steps:
        inputs = tuple(tensors[step.inputs[tensor.name]] for tensor in step.stage.inputs)
        outputs = tuple(tensors[step.outputs[tensor.name]] for tensor in step.stage.outputs)
        doors[step.stage.name] = Door(inputs, outputs)
        check_door(step.stage, doors[step.stage.name])
    return doors


def check_door(stage: Stage, door: Door) -> None:
    """Hold a stage's real tensors against its contract."""
    contract = [*stage.inputs, *stage.outputs]
    for tensor, sample in zip(contract, [*door.inputs, *door.outputs], strict=True):
        wanted = [
            2,
            *(
                size if isinstance(size, int) else real
                for size, real in zip(tensor.dims, sample.shape[1:], strict=False)
            ),
        ]
        if (
            sample.dtype != TORCH_TYPES[tensor.dtype]
            or list(sample.shape) != wanted
            or len(wanted) != 1 + len(tensor.dims)
        ):
            raise DoorError(
                f"stage {stage.name}: {tensor.name} is {sample.dtype} {list(sample.shape)}, "
                f"the contract says {tensor.dtype} [batch, {', '.join(map(str, tensor.dims))}]"
            )
