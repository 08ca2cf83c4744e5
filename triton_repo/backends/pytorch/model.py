"""Stand-in for Triton's native pytorch backend, so that the same model folders run on the server of the pytriton wheel.

It binds tensors by the native backend's rules: inputs by the names of `forward`'s arguments, else `name__index`, else
in the configuration's order; outputs by `name__index`, else in the configuration's order.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from scaphoid.triton_repo.batching import answer_all, input_places, output_places

# Every glue model has a process of its own, and starting the server is mostly these processes importing torch. What
# they don't need (shape inference without data, torch.export) is more than a third of that.
for name in ("torch._meta_registrations", "torch.export"):
    sys.modules[name] = types.ModuleType(name)

import torch  # noqa: E402


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        torch.set_num_threads(1)  # glue is small; the cores belong to the encoders
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        torch.ops.load_library(str(folder.parent / "libscaphoid_ops.so"))  # the container preloads it
        self._module = torch.jit.load(str(folder / args["model_version"] / "model.pt")).eval()
        arguments = [argument.name for argument in self._module.forward.schema.arguments[1:]]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        if len(self._inputs) != len(arguments):
            raise pb_utils.TritonModelException(
                f"forward takes {arguments}, the configuration has inputs {self._inputs}"
            )
        self._places = input_places(self._inputs, arguments)
        self._outputs = output_places([tensor["name"] for tensor in config["output"]])

    def execute(self, requests):
        return answer_all(requests, self._inputs, self._run)

    def _run(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        arguments = [torch.from_numpy(arrays[place]) for place in self._places]
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            results = self._module(*arguments)
        results = (results,) if isinstance(results, torch.Tensor) else results
        return {name: results[place].numpy() for name, place in self._outputs.items()}
