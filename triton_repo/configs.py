"""Reads the static `config.pbtxt` files and holds each against its contract or flow; rules.py knows the rest.

The wiring of an ensemble exists once, in trainer/flows.py; its `config.pbtxt` repeats it in Triton's words, so it is
checked here: by a test for the files in the tree, and by assemble.py for every repository that it writes. What a target
has besides is said here alone: on a GPU a guard before everything else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from scaphoid.trainer.contracts import ENCODED, Stage, Tensor
from scaphoid.trainer.flows import FLOWS, Flow, Step

# What carries each kind of stage: backend and, where Triton wants it said too, platform.
_SHARED = {"preprocess": ("dali", ""), "glue": ("pytorch", "pytorch_libtorch")}
TARGETS = {
    "cpu": {**_SHARED, "encoder": ("openvino", "")},
    "gpu": {**_SHARED, "encoder": ("tensorrt", "tensorrt_plan"), "guard": ("python", "")},
}
# The vendor's DALI backend looks at no image before it decodes a batch, and fails it as a whole; the CPU's stand-in has
# the guard inside. So on a GPU nothing comes to `preprocess` but what a step before it let pass.
GUARD = Stage("guard", "guard", (ENCODED,), (ENCODED,))
GUARDED = "guarded"  # the tensor between the two


def guarded(flow: Flow) -> Flow:
    """`flow` as a GPU's ensemble has it: `encoded` goes to the guard, and what passes to the step that took it."""
    wire = {ENCODED.name: GUARDED}
    steps = (
        replace(step, inputs={tensor: wire.get(name, name) for tensor, name in step.inputs.items()})
        for step in flow.steps
    )
    return replace(flow, steps=(Step(GUARD.name, GUARD, {ENCODED.name: ENCODED.name}, wire), *steps))


ENSEMBLES = {"cpu": FLOWS, "gpu": {name: guarded(flow) for name, flow in FLOWS.items()}}
MODELS = {
    target: {step.stage.name: step.stage for flow in flows.values() for step in flow.steps}
    for target, flows in ENSEMBLES.items()
}  # every model of a target that is no ensemble
FIRST = {target: next(iter(models)) for target, models in MODELS.items()}  # where every request goes first
CONFIG = "config.pbtxt"
PRECISION = "INFERENCE_PRECISION_HINT"
WEIGHTS = "weights"  # parameter of an assembled flow: which weights it runs on
TRAINED_ON_PHANTOMS = "trained_on_phantoms"  # and, where those know drawn radiographs alone, the generator's version
ACCEPTED = "accepted"  # and, where the export failed its gate and was published all the same, a line that says so


class ConfigError(Exception):
    """A `config.pbtxt` that disagrees with the contracts or the flows. One line: which file, what was expected, what
    came."""


def read(path: Path) -> ModelConfig:
    try:
        return text_format.Parse(path.read_text(), ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise ConfigError(f"{path}: {error}") from None


def check(path: Path, target: str = "cpu") -> ModelConfig:
    """The configuration of one model folder's `config.pbtxt`, held against the stage or the flow of its folder's name,
    in the repository for `target`. Raises ConfigError."""
    config, name = read(path), path.parent.name
    expect(path, "name", config.name, name)
    if name in MODELS[target]:
        _check_stage(path, config, MODELS[target][name], target)
    elif name in ENSEMBLES[target]:
        _check_flow(path, config, ENSEMBLES[target][name])
    else:
        raise ConfigError(f"{path}: no stage and no flow is called {name}")
    return config


def _check_stage(path: Path, config: ModelConfig, stage: Stage, target: str) -> None:
    expect(path, "backend and platform", (config.backend, config.platform), TARGETS[target][stage.kind])
    _check_tensors(path, "input", config.input, stage.inputs)
    _check_tensors(path, "output", config.output, stage.outputs)


def _check_flow(path: Path, config: ModelConfig, flow: Flow) -> None:
    tensors: dict[str, Tensor] = {}
    for step in flow.steps:
        tensors |= {step.inputs[t.name]: t for t in step.stage.inputs if step.inputs[t.name] not in tensors}
        tensors |= {step.outputs[t.name]: t for t in step.stage.outputs}
    expect(path, "platform", config.platform, "ensemble")
    _check_tensors(path, "input", config.input, [tensors[name] for name in flow.inputs], flow.inputs)
    _check_tensors(path, "output", config.output, [tensors[name] for name in flow.outputs], flow.outputs)
    expect(path, "number of steps", len(config.ensemble_scheduling.step), len(flow.steps))
    used = {*flow.outputs, *(name for step in flow.steps for name in step.inputs.values())}  # Triton refuses the others
    for written, step in zip(config.ensemble_scheduling.step, flow.steps, strict=True):
        outputs = {tensor: name for tensor, name in step.outputs.items() if name in used}
        expect(path, f"model of step {step.name}", written.model_name, step.stage.name)
        expect(path, f"input_map of step {step.name}", dict(written.input_map), dict(step.inputs))
        expect(path, f"output_map of step {step.name}", dict(written.output_map), outputs)
        if written.model_version < 1:
            raise ConfigError(f"{path}: step {step.name} pins no version; all versions of an ensemble share this file")


def _check_tensors(
    path: Path, kind: str, written: Iterable, tensors: Sequence[Tensor], names: Sequence[str] = ()
) -> None:
    """In the contract's order: Triton's pytorch backend binds a stage's outputs by it. Where the contract has a word a
    number is right too: that is an assembled file."""
    written = list(written)
    expect(path, f"{kind} names, in order", [t.name for t in written], list(names) or [t.name for t in tensors])
    for found, tensor in zip(written, tensors, strict=True):
        expect(path, f"data_type of {kind} {found.name}", DataType.Name(found.data_type), f"TYPE_{tensor.dtype}")
        dims = [real if word == -1 else word for word, real in zip(tensor.triton_dims, found.dims, strict=False)]
        expect(
            path,
            f"dims of {kind} {found.name}",
            list(found.dims),
            dims if len(dims) == len(tensor.dims) else tensor.triton_dims,
        )


def expect(path: Path, what: str, found: object, expected: object) -> None:
    """Raises ConfigError unless `found` is `expected`."""
    if found != expected:
        raise ConfigError(f"{path}: {what}: expected {expected}, got {found}")
