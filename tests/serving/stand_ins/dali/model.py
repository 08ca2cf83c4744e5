"""Stands in for NVIDIA's DALI backend on a GPU: serves a `model.dali` for `mixed` where there is no GPU.

It takes no other file than the one that the exporter writes for this size, and runs that pipeline's twin for a CPU. As
the native backend it binds the input by name and the outputs by order, looks at no image before DALI does, and answers
every request of a batch with an error when DALI fails.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from scaphoid.export.pipeline_to_dali import pipeline_to_dali
from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.data.pipeline import preprocess_pipeline


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._size = max(int(dim) for tensor in config["output"] for dim in tensor["dims"])
        self._batch = config["max_batch_size"]
        found = Path(args["model_repository"], args["model_version"], "model.dali").read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "model.dali")
            pipeline_to_dali(written, self._size, self._batch, "mixed")
            if found != written.read_bytes():
                raise pb_utils.TritonModelException(f"model.dali is not the GPU's for {self._size} pixels")
        self._pipeline = preprocess_pipeline(self._size, self._batch, num_threads=1)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, ENCODED.name).as_numpy() for request in requests]
        try:
            outputs = self._pipeline.run(**{ENCODED.name: [image for images in inputs for image in images]})
        except RuntimeError:
            self._pipeline = preprocess_pipeline(self._size, self._batch, num_threads=1)
            return [pb_utils.InferenceResponse(error=self._error()) for _ in requests]
        arrays = [np.array(output.as_cpu().as_array()) for output in outputs]  # copied: DALI writes there again
        rows = np.cumsum([len(images) for images in inputs])[:-1]
        parts = zip(*(np.split(array, rows) for array in arrays), strict=True)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(*each) for each in zip(self._outputs, part, strict=True)])
            for part in parts
        ]

    @staticmethod
    def _error():
        """A new one for every response: one that several share takes the server down."""
        return pb_utils.TritonError("DALI error: the batch cannot be decoded", pb_utils.TritonError.UNKNOWN)
