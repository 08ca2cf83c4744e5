"""An encoder on a CPU: OpenVINO, without torch; how every process here compiles it."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np
import openvino as ov

from scaphoid.export.edge.ops import Call
from scaphoid.export.precision import HINTS


def compiled(path: Path, precision: str, threads: int = 0) -> ov.CompiledModel:
    """One model file in the artefacts' `precision`, or in f32 on a CPU without it; `threads`: 0 for all cores."""
    options: dict[str, object] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return core().compile_model(str(path), "CPU", options)


@cache
def core() -> ov.Core:
    """One for the process: each sets the stack that signals are handled on, and when several end in another order than
    they began, it stays set to memory that is gone: the next signal is a segmentation fault."""
    return ov.Core()


class OpenVinoEngine:
    """The engine of one `model.xml`, for any batch; arguments as of `compiled`."""

    def __init__(self, path: Path, precision: str, threads: int = 0) -> None:
        self._compiled = compiled(path, precision, threads)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Call:
        """The call that reads `inputs` and fills `outputs`, arrays by the contract's names."""
        request = self._compiled.create_infer_request()
        for name, array in {**inputs, **outputs}.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        return partial(request.infer, share_outputs=True)
