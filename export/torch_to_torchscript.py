"""A glue stage to TorchScript: `model.pt`, as Triton's pytorch backend loads it."""

import warnings
from pathlib import Path

import torch
from torch import nn

from scaphoid.trainer.contracts import Stage


def torch_to_torchscript(module: nn.Module, stage: Stage, path: Path) -> None:
    """Script `module` and save it to `path`.

    The pytorch backend binds inputs by the names of `forward`'s arguments, so they must be the contract's, in its
    order.
    Raises ValueError when they are not.
    """
    with warnings.catch_warnings():  # TorchScript is deprecated but still what Triton's backend batches
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        scripted = torch.jit.script(module.eval())
    arguments = forward_arguments(scripted)
    expected = [tensor.name for tensor in stage.inputs]
    if arguments != expected:
        raise ValueError(
            f"stage {stage.name}: forward takes {arguments}, the contract says {expected}; rename the arguments"
        )
    scripted.save(str(path))


def forward_arguments(scripted: torch.jit.ScriptModule) -> list[str]:
    """Names of the arguments of a scripted module's `forward`."""
    return [argument.name for argument in scripted.forward.schema.arguments[1:]]
