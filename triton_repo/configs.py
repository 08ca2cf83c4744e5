"""Reads the static `config.pbtxt` files and holds each against its contract or flow; rules.py knows the rest.

The wiring of an ensemble exists once, in trainer/flows.py; its `config.pbtxt` repeats it in Triton's words, so it is
checked here: by a test for the files in the tree, and by assemble.py for every repository that it writes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from scaphoid.trainer.contracts import STAGES, Stage, Tensor
from scaphoid.trainer.flows import FLOWS, Flow

# What carries each kind of stage: backend and, where Triton wants it said too, platform.
_SHARED = {"preprocess": ("dali", ""), "glue": ("pytorch", "pytorch_libtorch")}
TARGETS = {
    "cpu": {**_SHARED, "encoder": ("openvino", "")},
    "gpu": {**_SHARED, "encoder": ("tensorrt", "tensorrt_plan")},
}
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
    if name in STAGES:
        _check_stage(path, config, STAGES[name], target)
    elif name in FLOWS:
        _check_flow(path, config, FLOWS[name])
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
