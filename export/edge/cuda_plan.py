"""A flow laid out for one batch size on a GPU: everything up to logits, boxes and scores runs in order on one stream,
as one CUDA graph over buffers allocated once; the results, some numbers an image, are reckoned on the host.

The wiring and the glue are those of plan.py and glue.py. Not run on hardware; a test runs this file over the same CUDA
sources under the SIMT executor.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from scaphoid.export.edge.ops import Array, Call, Ops
from scaphoid.export.edge.plan import PREPROCESS, Engine, allocate, bind, decoded_tensors
from scaphoid.trainer.flows import FLOWS, Flow, Step


class Runtime(Protocol):
    """A GPU's memory and one stream of it (cuda_runtime.py)."""

    stream: int

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array: ...
    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray: ...
    def upload(self, array: np.ndarray) -> Array: ...
    def copy(self, to: Array, of: Array) -> None: ...
    def synchronise(self) -> None: ...
    def capture(self, calls: Sequence[Call]) -> Call: ...


def reckons(flow: Flow, step: Step) -> bool:
    """Whether `step` makes nothing but results of the flow: no other step waits for it."""
    return set(step.outputs.values()) <= set(flow.outputs)


class CudaPlan:
    """As plan.py's HostPlan: `arrays` holds, on the host, what to fill and what was asked for."""

    def __init__(
        self,
        flow: str,
        manifest: Mapping,
        wanted: Iterable[str],
        batch: int,
        library: ctypes.CDLL,
        engines: Mapping[str, Engine],
        runtime: Runtime,
    ) -> None:
        table = FLOWS[flow]
        decoded = decoded_tensors(table)
        steps = table.steps_for(wanted, decoded)
        preprocess = [step for step in table.steps if step.stage.name == PREPROCESS]
        on_gpu = [step for step in steps if not reckons(table, step)]
        on_host = [step for step in steps if reckons(table, step)]

        buffers: dict[str, Array] = {}
        for step in [*preprocess, *on_gpu]:
            allocate(step, manifest, batch, buffers, runtime.empty)
        crossing = {name for step in on_host for name in step.inputs.values()}.union(decoded) & buffers.keys()
        self.arrays = {name: runtime.pinned(buffers[name].shape, buffers[name].dtype) for name in sorted(crossing)}
        for step in on_host:
            allocate(step, manifest, batch, self.arrays, np.empty)

        read = {name for step in on_gpu for name in step.inputs.values()}
        self._in = [(buffers[name], self.arrays[name]) for name in decoded if name in read]
        self._out = [(self.arrays[name], buffers[name]) for name in sorted(crossing - {*decoded})]
        self._runtime = runtime
        self._graph = runtime.capture(
            bind(on_gpu, manifest, buffers, Ops(library, runtime.stream, runtime.upload), engines)
        )
        self._results = bind(on_host, manifest, self.arrays, Ops(library), {})

    def __call__(self) -> None:
        for to, of in self._in:
            self._runtime.copy(to, of)
        self._graph()
        for to, of in self._out:
            self._runtime.copy(to, of)
        self._runtime.synchronise()
        for call in self._results:
            call()
