"""Stand-in for Triton's native openvino backend, so that the same model folders run on the server of the pytriton
wheel.

As the native one it binds tensors by name and reads the engine's options from the configuration's parameters. It runs a
batch as it is, where the native one pads it to max_batch_size. It also reads INFERENCE_PRECISION_HINT.
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
        compiled = ov.Core().compile_model(path, "CPU", {key: parameters[key] for key in OPTIONS if key in parameters})
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
