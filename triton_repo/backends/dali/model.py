"""Stands in for NVIDIA's DALI backend on a CPU: serves `backend: "dali"` models from the same `model.dali`.

Every image of an execute call goes through one DALI run. An image that is rejected, by the guard or by DALI, is
answered with INVALID_ARGUMENT and the reason; the requests batched with it are answered as if it had not been there.
Inputs and outputs are bound as NVIDIA's backend binds them: the input by name, the outputs by order.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.data.pipeline import Decoder
from scaphoid.triton_repo.supervisor.request_log import log_refused


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        names = [tensor["name"] for tensor in config["input"]]
        if names != [ENCODED.name] or len(config["output"]) != 2:
            raise pb_utils.TritonModelException(
                f"{config['name']}: expected the input {ENCODED.name} and two outputs, "
                f"got {names} and {len(config['output'])}"
            )
        self.outputs = [tensor["name"] for tensor in config["output"]]
        pipeline = Path(args["model_repository"], args["model_version"], "model.dali").read_bytes()
        self.decoder = Decoder(pipeline, config["max_batch_size"])

    def execute(self, requests):
        """One response for each request. A request of several images fails as a whole if one of them does."""
        inputs = [pb_utils.get_input_tensor_by_name(request, ENCODED.name).as_numpy() for request in requests]
        answers = iter(self.decoder.decode([memoryview(image) for images in inputs for image in images]))
        return [
            self._response(request, [next(answers) for _ in images])
            for request, images in zip(requests, inputs, strict=True)
        ]

    def _response(self, request, answers):
        for answer in answers:
            if isinstance(answer, RejectedImage):
                log_refused(request, "INVALID_ARGUMENT")
                error = pb_utils.TritonError(answer.reason, pb_utils.TritonError.INVALID_ARG)
                return pb_utils.InferenceResponse(error=error)
        tensors = [np.stack(column) for column in zip(*answers, strict=True)]
        outputs = [pb_utils.Tensor(*named) for named in zip(self.outputs, tensors, strict=True)]
        return pb_utils.InferenceResponse(outputs)
