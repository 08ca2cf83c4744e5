"""The client that an ensemble replaces: it asks the flow's models itself, one after the other, and carries every tensor
from one to the next. Needs numpy and tritonclient only."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.grpc as triton

from scaphoid.trainer.contracts import ENCODED, Stage, Tensor
from scaphoid.trainer.flows import FLOWS

Chain = Callable[[Sequence[bytes]], Mapping[str, np.ndarray]]
"""Every tensor of a flow, by name, for a batch of encoded images."""


def chain(server: triton.InferenceServerClient, flow: str, wanted: Sequence[str]) -> Chain:
    """The steps that `wanted` needs as a function of a batch: copies of one encoded image, or images of one length.
    Raises InferenceServerException when a request fails."""
    members = {step.stage.name: _member(server, step.stage) for step in FLOWS[flow].steps_for(wanted)}

    def run(encoded: Sequence[bytes]) -> Mapping[str, np.ndarray]:
        batch = np.stack([np.frombuffer(each, np.uint8) for each in encoded])
        return FLOWS[flow].run(members, {ENCODED.name: batch}, wanted)

    return run


class ChainedClient:
    """A connection of its own, and a thread to wait in, as `async with ChainedClient(...) as client`."""

    def __init__(self, url: str, flow: str, wanted: Sequence[str]) -> None:
        self._url, self._flow, self._wanted = url, flow, wanted

    async def __aenter__(self) -> "ChainedClient":
        self._thread = ThreadPoolExecutor(1)
        self._server = triton.InferenceServerClient(self._url)
        self._chain = chain(self._server, self._flow, self._wanted)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._server.close()

    async def infer(self, encoded: bytes) -> Mapping[str, np.ndarray]:
        """The flow's tensors for one image."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._chain, [encoded])


def as_input(tensor: Tensor, array: np.ndarray) -> triton.InferInput:
    given = triton.InferInput(tensor.name, list(array.shape), tensor.dtype)
    given.set_data_from_numpy(array)
    return given


def _member(server: triton.InferenceServerClient, stage: Stage) -> Callable[..., tuple[np.ndarray, ...]]:
    """A model of the repository as a function of its stage's tensors."""
    outputs = [triton.InferRequestedOutput(tensor.name) for tensor in stage.outputs]

    def call(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        answer = server.infer(stage.name, list(map(as_input, stage.inputs, arrays)), outputs=outputs)
        return tuple(answer.as_numpy(tensor.name) for tensor in stage.outputs)

    return call
