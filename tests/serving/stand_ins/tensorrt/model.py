"""Stands in for Triton's native tensorrt backend where there is no GPU: `model.plan` is an engine's ONNX twin.

As the native one it binds tensors by name, and refuses to load a configuration that disagrees with the engine in a
name, a data type or a size. It loads on a CPU, where the native one does not.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

from scaphoid.triton_repo.batching import answer_all

TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        plan = Path(args["model_repository"], args["model_version"], "model.plan")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(plan.read_bytes(), options, ["CPUExecutionProvider"])
        for kind, ports in (("input", self._session.get_inputs()), ("output", self._session.get_outputs())):
            self._compare(config, kind, {port.name: port for port in ports})
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]

    def _compare(self, config, kind, ports):
        if unknown := {tensor["name"] for tensor in config[kind]} ^ set(ports):
            raise pb_utils.TritonModelException(f"{kind} names: engine has {sorted(ports)}, not common: {unknown}")
        for tensor in config[kind]:
            port = ports[tensor["name"]]
            if TYPES[port.type] != tensor["data_type"]:
                raise pb_utils.TritonModelException(
                    f"{kind} {port.name}: {tensor['data_type']}, engine has {port.type}"
                )
            written = [int(dim) for dim in tensor["dims"]]
            sizes = port.shape[1:]  # a name where the engine takes any size
            if len(written) != len(sizes) or any(
                isinstance(size, int) and dim != size for dim, size in zip(written, sizes, strict=True)
            ):
                raise pb_utils.TritonModelException(f"{kind} {port.name}: dims {written}, engine has {sizes}")

    def execute(self, requests):
        return answer_all(requests, self._inputs, self._run)

    def _run(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        results = self._session.run(self._outputs, dict(zip(self._inputs, arrays, strict=True)))
        return dict(zip(self._outputs, results, strict=True))
