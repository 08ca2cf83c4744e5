"""An encoder on a GPU: TensorRT 10.3 and later, without torch. Not run on hardware."""

from collections.abc import Mapping
from typing import Any

from scaphoid.export.edge.cuda_runtime import DeviceArray
from scaphoid.export.edge.ops import Call, OpError


class TensorrtEngine:
    """`engine`: the `ICudaEngine` of `stage`, as export/tensorrt_engines loads it. Runs on `stream`."""

    def __init__(self, engine: Any, stage: str, stream: int) -> None:
        self._engine, self._stage, self._stream = engine, stage, stream
        self._names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        self._contexts: dict[int, Any] = {}

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Call:
        """The call that reads `inputs` and fills `outputs`. A batch size has one context, whatever it is bound to: on
        one stream its runs follow each other, and captured graphs keep what they were captured with."""
        arrays = {**inputs, **outputs}
        if self._names != set(arrays):
            raise OpError(f"the engine of {self._stage} has {sorted(self._names)}, the contract says {sorted(arrays)}")
        (batch,) = {array.shape[0] for array in inputs.values()}
        if batch not in self._contexts:
            self._contexts[batch] = self._engine.create_execution_context()
        context = self._contexts[batch]
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise OpError(f"the engine of {self._stage} takes no {name} of {array.shape}: build it for this batch")

        def call() -> None:
            for name, array in arrays.items():
                context.set_tensor_address(name, array.address)
            if not context.execute_async_v3(self._stream):
                raise OpError(f"the engine of {self._stage} failed on a batch of {batch}")

        return call
