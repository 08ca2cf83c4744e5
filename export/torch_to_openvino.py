"""An encoder stage to OpenVINO: `model.xml` and `model.bin`, dynamic batch, tensors named by the contract."""

import re
import warnings
from pathlib import Path

import openvino as ov
import torch
from torch import nn

from scaphoid.export.onnx_to_openvino import write
from scaphoid.trainer.contracts import Stage

ELEMENT_TYPES = {"UINT8": ov.Type.u8, "FP32": ov.Type.f32, "INT32": ov.Type.i32}


def torch_to_openvino(module: nn.Module, example: tuple[torch.Tensor, ...], stage: Stage, path: Path) -> None:
    """Convert `module` and save it to `path` (`.xml`; the weights go beside it, in fp32: the engine's precision is a
    hint at load time). `example` are inputs with the batch dim first; every other dim is fixed to theirs.

    Raises ValueError when the converted model's door differs from the stage's contract.
    """
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)  # what OpenVINO reads
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # every size but the batch is fixed: wanted
        # traced here: OpenVINO would check the trace by two more, most of the time; parity.py checks better
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
        model = ov.convert_model(traced, example_input=example)
    for port, tensor in zip(model.inputs, stage.inputs, strict=True):
        port.get_tensor().set_names({tensor.name})
    for port, tensor in zip(model.outputs, stage.outputs, strict=True):
        port.get_tensor().set_names({tensor.name})
    model.reshape(
        {port: ov.PartialShape([-1, *sample.shape[1:]]) for port, sample in zip(model.inputs, example, strict=True)}
    )
    for port, tensor in zip([*model.inputs, *model.outputs], [*stage.inputs, *stage.outputs], strict=True):
        if port.get_element_type() != ELEMENT_TYPES[tensor.dtype]:
            raise ValueError(
                f"{stage.name}: {tensor.name} became {port.get_element_type()}, the contract says {tensor.dtype}"
            )
        if len(port.get_partial_shape()) != 1 + len(tensor.dims) or port.get_partial_shape()[0].is_static:
            raise ValueError(
                f"{stage.name}: {tensor.name} became {port.get_partial_shape()}, "
                f"expected a dynamic batch and {tensor.dims}"
            )
    save(model, stage, path)


def save(model: ov.Model, stage: Stage, path: Path) -> None:
    """Save `model` as the engine of `stage`: the same model gives the same bytes. Raises OSError when it cannot be
    written."""
    model.set_friendly_name(stage.name)
    for index, operation in enumerate(model.get_ordered_ops()):
        if re.fullmatch(r"\w+_\d+", operation.get_friendly_name()):  # named by a count over the whole process
            operation.set_friendly_name(f"{operation.get_type_name()}_{index}")
    write(model, path)
