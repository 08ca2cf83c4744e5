"""Encoder stages to int8: one calibration, one ONNX for OpenVINO, ONNX Runtime and TensorRT.

Every convolution's input and weights pass through QuantizeLinear and DequantizeLinear as TensorRT wants them: int8,
symmetric (zero point 0), one scale for an activation, one for each output channel of a weight. Everything else stays
fp32: normalisation, activation functions, residual sums, pooling, the classifier and both maps. NNCF measures the
ranges and places the pairs. Weights use 7 of the 8 bits: a CPU without VNNI adds pairs of products in 16 bits, which
overflow silently with 8 (relative map error 0.5 instead of 0.1 on the demo's KALM).

Accuracy comes first: when a flow of the quantised stages misses its bar, the layers that do most harm alone stay fp32,
about as few of them as let it pass.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from scaphoid.export.calibration import Figures

LAYER = "Conv"
STRETCHES = 20  # consecutive layers are judged together, in about this many groups a stage
SAMPLES = 16  # images that the harm of a stretch is measured on


@dataclass(frozen=True)
class Quantized:
    """An encoder stage in fp32 and with every convolution in int8; `samples` are calibration inputs."""

    full: ModelProto
    int8: ModelProto
    samples: NDArray[np.uint8]

    @property
    def layers(self) -> list[str]:
        return [node.name for node in self.full.graph.node if node.op_type == LAYER]

    @property
    def stretches(self) -> list[tuple[str, ...]]:
        """The layers in groups of consecutive ones."""
        length = max(1, round(len(self.layers) / STRETCHES))
        return [tuple(self.layers[start : start + length]) for start in range(0, len(self.layers), length)]

    def keeping(self, layers: Iterable[str]) -> ModelProto:
        """The int8 model with `layers` in fp32."""
        model, layers = copy.deepcopy(self.int8), set(layers)
        originals = {node.name: node for node in self.full.graph.node}
        for node in model.graph.node:
            if node.name in layers:
                node.input[:] = originals[node.name].input
        present = {tensor.name for tensor in model.graph.initializer}
        model.graph.initializer.extend(each for each in self.full.graph.initializer if each.name not in present)
        return pruned(model)

    def harm(self) -> dict[tuple[str, ...], float]:
        """Relative error of the stage's outputs (the largest of any) with one stretch alone in int8, of each."""
        expected = simulate(self.full, self.samples)
        found = {}
        for stretch in self.stretches:
            outputs = simulate(self.keeping(set(self.layers) - set(stretch)), self.samples)
            found[stretch] = max(map(relative_error, expected, outputs))
        return found


def relative_error(expected: NDArray, found: NDArray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def simulate(model: ModelProto, samples: NDArray) -> list[NDArray]:
    """The model's outputs with its Q/DQ pairs computed in fp32, as written: what int8 gives on any machine."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: samples})


def quantize(model: ModelProto, inputs: NDArray[np.uint8]) -> Quantized:
    """`model` (an encoder's fp32 ONNX) calibrated on `inputs`, one row an image."""
    os.environ.setdefault("NNCF_CI", "1")  # or NNCF reports its use over the network
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level("ERROR")
    full = without_idle_casts(model)
    name = full.graph.input[0].name
    int8 = nncf.quantize(
        copy.deepcopy(full),
        nncf.Dataset(list(inputs[:, None]), lambda image: {name: image}),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(inputs),
        ignored_scope=nncf.IgnoredScope([node.name for node in full.graph.node if node.op_type != LAYER]),
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.ENABLE,
            disable_bias_correction=True,
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        ),
    )
    return Quantized(full, pruned(signed(int8)), inputs[:: max(1, len(inputs) // SAMPLES)][:SAMPLES])


def quantize_file(path: Path, inputs: NDArray[np.uint8]) -> None:
    """An encoder's fp32 ONNX to int8 in its place, every layer of it."""
    path.write_bytes(quantize(onnx.load(path), inputs).int8.SerializeToString(deterministic=True))


def without_idle_casts(model: ModelProto) -> ModelProto:
    """A copy without casts of a tensor to the type that it has, which NNCF stumbles over at an output."""
    model = onnx.shape_inference.infer_shapes(model)
    ports = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {port.name: port.type.tensor_type.elem_type for port in ports}
    for cast in [node for node in model.graph.node if node.op_type == "Cast"]:
        (source,), (result,) = cast.input, cast.output
        if types.get(source) == types.get(result):
            model.graph.node.remove(cast)
            for node in model.graph.node:
                node.input[:] = [result if name == source else name for name in node.input]
                node.output[:] = [result if name == source else name for name in node.output]
    return model


def signed(model: ModelProto) -> ModelProto:
    """NNCF quantises a tensor without negative values to uint8, which TensorRT lacks: the same range in int8."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and constants[node.input[2]].data_type == TensorProto.UINT8:
            scale, zero_point = (constants[name] for name in node.input[1:])
            wider = (numpy_helper.to_array(scale) * 255 / 127).astype(np.float32)
            scale.CopyFrom(numpy_helper.from_array(wider, scale.name))
            zero_point.CopyFrom(numpy_helper.from_array(np.zeros(wider.shape, np.int8), zero_point.name))
    return model


def pruned(model: ModelProto) -> ModelProto:
    """`model` without nodes, constants and type notes that nothing uses; constants in the order of their names."""
    wanted = {port.name for port in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            nodes.append(node)
    constants = sorted((each for each in model.graph.initializer if each.name in wanted), key=lambda each: each.name)
    for kept, field in ((nodes[::-1], model.graph.node), (constants, model.graph.initializer)):
        kept = copy.deepcopy(kept)
        del field[:]
        field.extend(kept)
    del model.graph.value_info[:]
    return model


@dataclass(frozen=True)
class Round:
    """One attempt: layers left in fp32 by stage, and the flow's figures with them."""

    kept: dict[str, list[str]]
    figures: Figures


def search(
    stages: Mapping[str, Quantized], measure: Callable[[Mapping[str, ModelProto]], Figures]
) -> tuple[dict[str, ModelProto], list[Round]]:
    """Leave about as few stretches in fp32 as `measure` lets pass: none, or the most harmful of all stages, their
    number found by bisection, which misses a smaller one that passes where more stretches can do worse than fewer. The
    last round is the result: the one with the fewest in fp32 of those that passed, if any did."""
    rounds: list[Round] = []

    def passes(stretches: Iterable[tuple[str, tuple[str, ...]]]) -> bool:
        chosen = set(stretches)
        kept = {
            name: [layer for stretch in stage.stretches if (name, stretch) in chosen for layer in stretch]
            for name, stage in stages.items()
        }
        rounds.append(Round(kept, measure(models_of(stages, kept))))
        return rounds[-1].figures.passed

    if not passes(()):
        harm = {(name, stretch): error for name, each in stages.items() for stretch, error in each.harm().items()}
        ranked = sorted(harm, key=lambda stretch: -harm[stretch])
        few, many = 0, len(ranked)  # that miss the bar; that leave nothing in int8, which is no answer
        while many - few > len(stages):
            middle = (few + many) // 2
            few, many = (few, middle) if passes(ranked[:middle]) else (middle, many)
    best = min(rounds, key=lambda each: (not each.figures.passed, sum(map(len, each.kept.values()))))
    if best.figures.passed:
        rounds.remove(best)
        rounds.append(best)
    return models_of(stages, rounds[-1].kept), rounds


def models_of(stages: Mapping[str, Quantized], kept: Mapping[str, Sequence[str]]) -> dict[str, ModelProto]:
    return {name: stage.keeping(kept[name]) for name, stage in stages.items()}
