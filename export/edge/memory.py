"""How much memory a flow takes, computed from its artefacts: for devices whose 8 GB are shared by CPU and GPU.

An upper bound on paper: activations are counted operator by operator, as if an engine fused nothing; an engine that
needs scratch memory for its convolutions may take some of what fusing saves. Not counted: CUDA, its libraries and the
system, and the builder's own memory while an engine is built (`workspace` is the part of it that is bounded).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.export.edge.flow import encoders
from scaphoid.export.edge.plan import allocate
from scaphoid.export.tensorrt_engines.build_engines import no_onnx
from scaphoid.trainer.data.header import MAX_PIXELS
from scaphoid.trainer.flows import FLOWS

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "int8": 4}  # int8: of what stays a float
DECODED_BYTES = 13  # a pixel while it is decoded, at most: CMYK as stored, turned upright, as colour, as grey
MIB = 2**20


@dataclass(frozen=True)
class Budget:
    """Bytes for one flow at one batch size. `weights` and `activations`: of all its engines, each of which keeps its
    own; `arrays`: what crosses the stages' boundaries; `decoding`: the largest radiograph that is accepted, on every
    thread at once."""

    flow: str
    batch: int
    precision: str
    weights: int
    activations: int
    arrays: int
    decoding: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.arrays + self.decoding


def budgets(artefacts: Path, batches: list[int], precision: str, threads: int) -> list[Budget]:
    """One for each flow of `artefacts` and batch size, with `threads` decoding; needs OpenVINO, to read graphs."""
    manifest, decoding = read_manifest(artefacts), threads * MAX_PIXELS * DECODED_BYTES
    found = []
    for flow in manifest["flows"]:
        models = [_model(artefacts, name) for name in encoders(flow)]
        weights = sum(weight_bytes(model, precision) for model in models)
        for batch in batches:
            activations = sum(activation_bytes(model, batch, precision) for model in models)
            arrays = array_bytes(flow, manifest, batch)
            found.append(Budget(flow, batch, precision, weights, activations, arrays, decoding))
    return found


def _model(artefacts: Path, stage: str) -> Any:
    from scaphoid.export.edge.openvino_engine import core

    openvino = artefacts / stage / "model.xml"
    onnx = sorted((artefacts / "onnx").glob(f"{stage}.*onnx"))
    if not openvino.is_file() and not onnx:
        raise ManifestError(no_onnx(artefacts, stage, "f32"))
    return core().read_model(str(openvino if openvino.is_file() else onnx[0]))


def _bytes(port: Any, precision: str) -> int:
    kind = port.get_element_type()
    quantized = kind.get_type_name() in ("i8", "u8")
    stands_for_float = kind.is_real() or (quantized and precision != "int8")
    each = FLOAT_BYTES[precision] if stands_for_float else max(1, kind.bitwidth // 8)
    return int(np.prod(tuple(port.get_shape()), dtype=np.int64)) * each


def weight_bytes(model: Any, precision: str) -> int:
    """Bytes of a model's constants, floats in `precision`, and those that it holds in 8 bits for floats too."""
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return sum(_bytes(op.output(0), precision) for op in constants)


def activation_bytes(model: Any, batch: int, precision: str) -> int:
    """The most bytes that are alive at once while the operators run in order: an output from the operator that makes it
    to the last one that reads it."""
    model.reshape({port: [batch, *list(port.get_partial_shape())[1:]] for port in model.inputs})
    order = [op for op in model.get_ordered_ops() if op.get_type_name() not in ("Constant", "Result")]
    place = {op.get_name(): index for index, op in enumerate(order)}
    dying: list[int] = [0] * (len(order) + 1)
    alive = most = 0
    for index, op in enumerate(order):
        for port in op.outputs():
            readers = [place.get(target.get_node().get_name(), len(order)) for target in port.get_target_inputs()]
            dying[max(readers, default=index)] += _bytes(port, precision)
            alive += _bytes(port, precision)
        most = max(most, alive)
        alive -= dying[index]
    return most


def array_bytes(flow: str, manifest: Mapping, batch: int) -> int:
    """Bytes of the arrays between the stages of a plan."""
    arrays: dict[str, np.ndarray] = {}
    for step in FLOWS[flow].steps:
        allocate(step, manifest, batch, arrays, np.empty)
    return sum(array.nbytes for array in arrays.values())


def table(found: list[Budget]) -> str:
    """The budgets as text, in MiB."""
    rows = [("flow", "batch", "precision", "weights", "activations", "arrays", "decoding", "MiB in all")]
    for each in found:
        parts = (each.weights, each.activations, each.arrays, each.decoding, each.total)
        rows.append((each.flow, str(each.batch), each.precision, *(f"{part / MIB:.1f}" for part in parts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
