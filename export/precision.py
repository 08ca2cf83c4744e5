"""The precisions an engine can be exported for, and which of them a CPU has. Imports no torch."""

from typing import Literal, get_args

Precision = Literal["f32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "int8": "INT8"}  # OpenVINO's names
HINTS = {"f32": "f32", "bf16": "bf16", "int8": "f32"}  # its hint: int8 is in the graph, and what is beside it f32


def effective_precision(wanted: Precision) -> Precision:
    """What this CPU computes in when `wanted` is asked for: without the instructions OpenVINO falls back to f32,
    silently. Raises ImportError where its Python package is not installed."""
    from scaphoid.export.edge.openvino_engine import core

    return wanted if CAPABILITIES[wanted] in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def fallback(wanted: Precision) -> str:
    """A line for who serves engines that were exported for `wanted`, when they may run in something else here; else
    empty. A server needs OpenVINO, not its Python package, and so does without the answer where that is missing."""
    if wanted == "f32":
        return ""
    try:
        real = effective_precision(wanted)
    except ImportError:
        return f"exported for {wanted}; what they run in is unknown: OpenVINO's Python package is not installed here"
    return "" if real == wanted else f"exported for {wanted}, which this CPU does not have: they run in {real}"
