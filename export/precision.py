"""The precisions an engine can be exported for, and which of them a CPU has. Imports no torch."""

from typing import Literal, get_args

Precision = Literal["f32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "int8": "INT8"}  # OpenVINO's names
HINTS = {"f32": "f32", "bf16": "bf16", "int8": "f32"}  # its hint: int8 is in the graph, and what is beside it f32


def effective_precision(wanted: Precision) -> Precision:
    """What this CPU computes in when `wanted` is asked for: without the instructions OpenVINO falls back to f32,
    silently."""
    import openvino as ov

    return wanted if CAPABILITIES[wanted] in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
