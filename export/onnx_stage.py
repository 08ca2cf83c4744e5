"""An encoder's ONNX as a function, run by ONNX Runtime on the CPU."""

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from scaphoid.trainer.contracts import Stage


class OnnxStage:
    """`stage(*inputs)` gives the outputs in the contract's order; `threads` limits the engine (0: all cores)."""

    def __init__(self, path: Path, stage: Stage, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # fp16 weights are widened on a CPU: said once for each, as a warning
        self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self._inputs = [tensor.name for tensor in stage.inputs]
        self._outputs = [tensor.name for tensor in stage.outputs]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = {name: tensor.numpy() for name, tensor in zip(self._inputs, inputs, strict=True)}
        return tuple(map(torch.from_numpy, self._session.run(self._outputs, arrays)))
