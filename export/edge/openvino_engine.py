"""An encoder on a CPU: OpenVINO, without torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov

from scaphoid.export.edge.ops import Call
from scaphoid.export.precision import HINTS


class OpenVinoEngine:
    """The engine of one `model.xml`, for any batch, in the artefacts' `precision`, or in f32 on a CPU without it.
    `threads` limits it (0: all cores)."""

    def __init__(self, path: Path, precision: str, threads: int = 0) -> None:
        options: dict[str, object] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self._compiled = ov.Core().compile_model(str(path), "CPU", options)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Call:
        """The call that reads `inputs` and fills `outputs`, arrays by the contract's names."""
        request = self._compiled.create_infer_request()
        for name, array in {**inputs, **outputs}.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        return partial(request.infer, share_outputs=True)
