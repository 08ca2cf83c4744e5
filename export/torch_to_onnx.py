"""An encoder stage to ONNX: one file, dynamic batch, tensors named by the contract, no custom op.

Opset 18: the newest that PyTorch's tracing exporter writes without converting, and one that the parsers of TensorRT
10.3 (JetPack 6) and of all later ones read. Weights carry the precision (TensorRT 11 is strongly typed and takes it
from the graph): in f16 the backbone alone is half precision, of an EfficientNet without its first blocks;
normalisation, pooling, classifier and both maps stay in fp32.
"""

import copy
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scaphoid.export.tolerances import precision_of
from scaphoid.trainer.contracts import Stage
from scaphoid.trainer.stages.encoder import Encoder

OPSET = 18
TYPES = {"UINT8": "UINT8", "FP32": "FLOAT", "INT32": "INT32"}  # Triton's name: ONNX's


class HalfBackbone(nn.Module):
    """A backbone that computes in fp16 and gives its features back in fp32."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.half()
        self.early = nn.ModuleList(early_layers(backbone)).float()
        if self.early:
            self.early[-1].register_forward_hook(lambda module, inputs, output: output.half())

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Normalised Tensor[B, 3, H, W] to F, Tensor[B, C, h, w], both fp32."""
        return self.backbone.forward_features(pixels if self.early else pixels.half()).float()


class Bracketed(nn.Module):
    """A backbone between two pairs of casts, which `halve` finds in its ONNX. The trace itself runs in fp32, because a
    CPU takes a hundred times as long in fp16."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.early = early_layers(backbone)
        if self.early:
            self.early[-1].register_forward_hook(lambda module, inputs, output: output.half().float())

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Normalised Tensor[B, 3, H, W] to F, Tensor[B, C, h, w]."""
        return self.backbone.forward_features(pixels if self.early else pixels.half().float()).half().float()


def early_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers at a backbone's start that stay in fp32. EfficientNets begin with depthwise layers, whose sums are too
    short to average rounding out, and all that follows inherits it: with these in fp32 the probability of 3 % of the
    phantoms moved by more than 0.02 in the shipped MSFM, of 8 % with everything in fp16."""
    if not hasattr(backbone, "conv_stem"):
        return []
    return [backbone.conv_stem, backbone.bn1, backbone.blocks[0], backbone.blocks[1][0]]


def with_half_backbone(module: nn.Module, wrap: type[nn.Module] = HalfBackbone) -> nn.Module:
    """A copy of an encoder stage whose backbone computes in fp16."""
    module = copy.deepcopy(module)
    for encoder in [each for each in module.modules() if isinstance(each, Encoder)]:
        encoder.backbone = wrap(encoder.backbone)
    return module


def in_half(stage: Stage, precision: str) -> bool:
    """Whether the backbone of the encoder `stage` computes in fp16."""
    return precision_of(stage, precision) == "f16"


def torch_to_onnx(
    module: nn.Module, example: tuple[Tensor, ...], stage: Stage, path: Path, precision: str = "f32"
) -> None:
    """Convert `module` and save it to `path`: the same module gives the same bytes. `example` are inputs with the batch
    dim first; every other dim is fixed to theirs. `precision`: f32 or f16.

    Raises ValueError when the converted model's door differs from the stage's contract.
    """
    import onnx

    names = [[tensor.name for tensor in tensors] for tensors in (stage.inputs, stage.outputs)]
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace fixes every size but the batch: wanted
        torch.onnx.export(
            (with_half_backbone(module, Bracketed) if in_half(stage, precision) else module).eval(),
            example,
            file,
            dynamo=False,  # the other exporter takes many times as long and writes source paths into the file
            opset_version=OPSET,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes={name: {0: "batch"} for name in (*names[0], *names[1])},
        )
    model = onnx.load_from_string(file.getvalue())
    for port, size in zip(model.graph.output, _sizes(module, example), strict=True):
        for dim, real in list(zip(port.type.tensor_type.shape.dim, size, strict=True))[1:]:
            dim.dim_value = real  # where the exporter lost it
    cast_before_reshape(model)
    if in_half(stage, precision):
        halve(model)
    check_door(model, stage)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def cast_before_reshape(model) -> None:
    """TensorRT reshapes no uint8: where an input is reshaped and then cast, the two change places."""
    graph = model.graph
    inputs = {port.name for port in graph.input}
    for reshape in [node for node in graph.node if node.op_type == "Reshape" and node.input[0] in inputs]:
        (cast,) = [node for node in graph.node if reshape.output[0] in node.input]
        reshaped, both = reshape.output[0], cast.output[0]
        cast.input[0], cast.output[0] = reshape.input[0], reshaped
        reshape.input[0], reshape.output[0] = reshaped, both
        graph.node.remove(cast)
        graph.node.insert(list(graph.node).index(reshape), cast)
    del graph.value_info[:]  # its types are those of before


def halve(model) -> None:
    """Turn what lies between a bracketed backbone's casts to fp16, weights and constants included; of each pair of
    casts one is left."""
    from onnx import TensorProto, numpy_helper, shape_inference

    graph = model.graph
    typed = shape_inference.infer_shapes(model).graph
    # Not integers: the arithmetic of shapes (of padding, for one) stays as it is.
    pixels = {port.name for port in typed.value_info if port.type.tensor_type.elem_type == TensorProto.FLOAT}
    made = {name: node for node in graph.node for name in node.output if name in pixels}
    half = {node.output[0] for node in graph.node if _casts_to(node, TensorProto.FLOAT16)}
    first, last = [node for node in graph.node if _casts_to(node, TensorProto.FLOAT) and node.input[0] in half]
    (rounded,) = [node for node in graph.node if node.output[0] == last.input[0]]
    weights = {each.name: each for each in graph.initializer if each.data_type == TensorProto.FLOAT}
    inside, ahead = [], [made[rounded.input[0]]]
    while ahead:  # from the last cast back to the first
        inside.append(node := ahead.pop())
        ahead += [made[name] for name in node.input if name in made and made[name] not in (first, *inside, *ahead)]
    for node in inside:
        for attribute in node.attribute:
            if attribute.t.data_type == TensorProto.FLOAT:  # a constant's value
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float16)))
        for index, name in enumerate(node.input):
            if name in weights:
                node.input[index] = f"{name}.f16"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == first.output[0]:
                node.input[index] = first.input[0]
    used = {name for node in graph.node for name in node.input}
    for name, weight in weights.items():
        if f"{name}.f16" in used:
            values = numpy_helper.to_array(weight).astype(np.float16)
            graph.initializer.append(numpy_helper.from_array(values, f"{name}.f16"))
        if name not in used:
            graph.initializer.remove(weight)
    for node in (first, rounded):
        graph.node.remove(node)
    last.input[0] = rounded.input[0]
    del graph.value_info[:]  # its types are fp32's


def _casts_to(node, kind: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == kind


def _sizes(module: nn.Module, example: tuple[Tensor, ...]) -> list[torch.Size]:
    with torch.inference_mode():
        outputs = module(*example)
    return [output.shape for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def check_door(model, stage: Stage) -> None:
    """Hold an ONNX model's inputs and outputs against the contract; it may use no op but ONNX's own."""
    import onnx

    ports = [*model.graph.input, *model.graph.output]
    for port, tensor in zip(ports, [*stage.inputs, *stage.outputs], strict=True):
        kind, dims = port.type.tensor_type.elem_type, port.type.tensor_type.shape.dim
        found = onnx.TensorProto.DataType.Name(kind)
        sizes = [dim.dim_param or dim.dim_value for dim in dims]
        if (port.name, found, len(sizes)) != (tensor.name, TYPES[tensor.dtype], 1 + len(tensor.dims)):
            raise ValueError(
                f"stage {stage.name}: {port.name} became {found} {sizes}, the contract says {tensor.name}: "
                f"{tensor.dtype} [batch, {', '.join(map(str, tensor.dims))}]"
            )
        if sizes[0] != "batch":
            raise ValueError(f"stage {stage.name}: {port.name} became {sizes}, expected a dynamic batch first")
    if custom := sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"}):
        raise ValueError(f"stage {stage.name}: its ONNX uses ops of {', '.join(custom)}, expected ONNX's own alone")
