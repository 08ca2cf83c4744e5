"""A flow laid out for one batch size: every array that crosses a stage boundary allocated once, every step bound to its
arrays. Running it is calling the steps in order."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np

from scaphoid.export.edge.glue import GLUE
from scaphoid.export.edge.ops import DTYPES, Array, Call, Ops
from scaphoid.trainer.contracts import Tensor
from scaphoid.trainer.flows import FLOWS, Flow, Step

PREPROCESS = "preprocess"
Allocate = Callable[[tuple[int, ...], np.dtype], Array]


class Engine(Protocol):
    """One encoder, for any batch: a function of named buffers."""

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call: ...


def decoded_tensors(flow: Flow) -> tuple[str, ...]:
    """The flow's tensors that decoding gives: with them at hand, preprocessing is not run."""
    return tuple(name for step in flow.steps if step.stage.name == PREPROCESS for name in step.outputs.values())


def allocate(step: Step, manifest: Mapping, batch: int, arrays: MutableMapping[str, Array], empty: Allocate) -> None:
    """Adds the outputs of `step` to `arrays`, under the flow's names, sized as the `manifest` says."""
    described = manifest["stages"][step.stage.name]["outputs"]
    for tensor, real in zip(step.stage.outputs, described, strict=True):
        arrays[step.outputs[tensor.name]] = empty((batch, *real["dims"]), DTYPES[tensor.dtype])


def bind(
    steps: Iterable[Step], manifest: Mapping, arrays: Mapping[str, Array], ops: Ops, engines: Mapping[str, Engine]
) -> list[Call]:
    """The calls that run `steps` on `arrays`, in order."""

    def taken(tensors: Sequence[Tensor], names: Mapping[str, str]) -> dict[str, Array]:
        return {tensor.name: arrays[names[tensor.name]] for tensor in tensors}

    calls: list[Call] = []
    for step in steps:
        stage = step.stage
        inputs, outputs = taken(stage.inputs, step.inputs), taken(stage.outputs, step.outputs)
        if stage.kind == "encoder":
            calls.append(engines[stage.name].bind(inputs, outputs))
        else:
            settings = manifest["stages"][stage.name]["settings"]
            calls += GLUE[stage.name](ops, settings, *inputs.values(), *outputs.values())
    return calls


class HostPlan:
    """A flow on the CPU, `batch` images at a time. `arrays` holds every tensor by the flow's name: fill those of
    `decoded_tensors`, call the plan, read the `wanted` ones before the next call."""

    def __init__(
        self,
        flow: str,
        manifest: Mapping,
        wanted: Iterable[str],
        batch: int,
        ops: Ops,
        engines: Mapping[str, Engine],
    ) -> None:
        given = decoded_tensors(FLOWS[flow])
        self.arrays: dict[str, np.ndarray] = {}
        for step in FLOWS[flow].steps:
            if step.stage.name == PREPROCESS:
                allocate(step, manifest, batch, self.arrays, np.empty)
        steps = FLOWS[flow].steps_for(wanted, given)
        for step in steps:
            allocate(step, manifest, batch, self.arrays, np.empty)
        self._calls = bind(steps, manifest, self.arrays, ops, engines)

    def __call__(self) -> None:
        for call in self._calls:
            call()
