"""Stand-in for Triton's native openvino backend, so that the same model folders run on the server of the pytriton
wheel.

As the native one it binds tensors by name and reads the engine's options from the configuration's parameters. It runs a
batch as it is, where the native one pads it to max_batch_size. It also reads INFERENCE_PRECISION_HINT.

The native one has all engines in one process. Here each has one of its own, so its threads are not pinned to cores:
OpenVINO pins those of every process to the same ones, where each layer then waits for the slower of two threads.
"""

import scaphoid.export  # noqa: F401  # isort: skip  (declines OpenVINO's reports home, so before it)

import json
from pathlib import Path

import numpy as np
import openvino as ov
import triton_python_backend_utils as pb_utils

from scaphoid.triton_repo.batching import answer_all

OPTIONS = ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT", "INFERENCE_NUM_THREADS", "NUM_STREAMS")


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        path = Path(args["model_repository"], args["model_version"], "model.xml")
        options = {key: parameters[key] for key in OPTIONS if key in parameters} | {"ENABLE_CPU_PINNING": "NO"}
        compiled = ov.Core().compile_model(path, "CPU", options)
        self._request = compiled.create_infer_request()
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        named = {name for port in (*compiled.inputs, *compiled.outputs) for name in port.get_names()}
        if unknown := sorted({*self._inputs, *self._outputs} - named):
            raise pb_utils.TritonModelException(f"{path} has no tensor {unknown}; it has {sorted(named)}")

    def execute(self, requests):
        return answer_all(requests, self._inputs, self._run)

    def _run(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        self._request.infer(dict(zip(self._inputs, arrays, strict=True)), share_inputs=True)
        return {name: self._request.get_tensor(name).data for name in self._outputs}
