"""An encoder stage to a TensorRT engine by torch-tensorrt, on a machine with torch and the GPU that will run it.

    python -m scaphoid.export.torch_to_tensorrt msfm.safetensors artefacts engines --precision f16

It fills the same folder of engines, under the same rules, as build_engines.py does from the ONNX. int8 is the ONNX's
alone. torch-tensorrt comes with the extra `gpu`.

Not run on hardware, and here is how far it went without. torch-tensorrt 2.14 cannot be imported without a driver: its
import asks for the current device, its compute capability and properties. With those answered for it,
`torch-tensorrt-rtx`, the same code over TensorRT for RTX, lowered, converted and compiled ResNet-18's encoder (f32 and
f16) and Lite0's (f32), tensors named by the contract; then it deserialises what it compiled, which needs a GPU. It has
no converter for `avg_pool2d` with `ceil_mode` (ResNet-D backbones): those go through the ONNX.
"""

import copy
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import tyro
from torch import nn
from torch.export import Dim

from scaphoid.export.artefacts import ManifestError, read_manifest, sha256
from scaphoid.export.runner import load_served
from scaphoid.export.tensorrt_engines.build_engines import (
    BuilderGaveUp,
    BuildError,
    Job,
    build_all,
    gpu_name,
    load_tensorrt,
    make_jobs,
)
from scaphoid.export.torch_to_onnx import in_half, with_half_backbone
from scaphoid.trainer.contracts import STAGES, Stage

MODULE = "torch_tensorrt"


def load_torch_tensorrt() -> ModuleType:
    """Raises BuildError: the extra is missing, or the driver."""
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise BuildError(f"torch-tensorrt is not here ({error}): pip install 'scaphoid[gpu]'") from None
    except Exception as error:  # its import asks the driver, and TensorRT's libraries, many questions
        reason = str(error).strip().splitlines()[0]
        raise BuildError(f"torch-tensorrt does not load, it needs an NVIDIA GPU and TensorRT: {reason}") from None


def torch_to_tensorrt(
    module: nn.Module, stage: Stage, shapes: list[list[int]], precision: str = "f16", workspace: int = 0
) -> bytes:
    """The serialised engine of `module`, with the contract's tensor names. `shapes` are the smallest, best and largest
    of its only input, batch first; `precision`: f32 or f16; `workspace` in MiB (0: what TensorRT likes).

    Raises BuildError without torch-tensorrt or a driver or when it cannot convert the stage, BuilderGaveUp.
    """
    torch_tensorrt = load_torch_tensorrt()
    module = with_half_backbone(module) if in_half(stage, precision) else copy.deepcopy(module)
    example = torch.zeros(max(shapes[1][0], 2), *shapes[1][1:], dtype=torch.uint8)
    batch = Dim("batch", min=shapes[0][0], max=shapes[2][0])
    with torch.no_grad():
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
    smallest, best, largest = map(tuple, shapes)
    outputs = tuple(tensor.name for tensor in stage.outputs)
    try:
        return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=(
                torch_tensorrt.Input(min_shape=smallest, opt_shape=best, max_shape=largest, dtype=torch.uint8),
            ),
            arg_input_binding_names=tuple(tensor.name for tensor in stage.inputs),
            output_binding_names=outputs if len(outputs) > 1 else outputs[0],  # as the module returns them
            require_full_compilation=True,
            disable_tf32=True,
            workspace_size=workspace << 20,
            offload_module_to_cpu=True,  # it is there already
        )
    except torch.OutOfMemoryError as error:
        raise BuilderGaveUp(str(error).splitlines()[0]) from None
    except Exception as error:
        while error.__cause__:  # the outer ones quote the whole graph
            error = error.__cause__
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BuildError(f"torch-tensorrt does not convert {stage.name}: {reason}") from None


@dataclass(frozen=True)
class Arguments:
    """Build TensorRT engines by torch-tensorrt, on the machine that will run them."""

    weights: tyro.conf.Positional[Path]
    """The weights file that the artefacts were exported from."""
    artefacts: tyro.conf.Positional[Path]
    """Folder that scaphoid-export wrote with --formats onnx."""
    engines: tyro.conf.Positional[Path]
    """Folder for the engines; those that fit are kept."""
    precision: Literal["f16", "f32"] = "f16"
    """What the backbone computes in."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        version = load_torch_tensorrt().__version__
        model = load_served(arguments.weights)
        if sha256(arguments.weights) not in [each["sha256"] for each in read_manifest(arguments.artefacts)["weights"]]:
            raise BuildError(f"{arguments.artefacts} were exported from other weights than {arguments.weights}")
        modules, trt = model.stages(), load_tensorrt()
        builder = f"{MODULE} {version}"
        jobs = [
            job
            for job in make_jobs(arguments.artefacts, arguments.precision, trt, gpu_name(), builder)
            if job.stage in modules
        ]

        def build(job: Job, workspace: int, plan: Path, timing_cache: Path) -> None:
            (shapes,) = job.key["shapes"].values()
            stage = STAGES[job.stage]
            plan.write_bytes(torch_to_tensorrt(modules[job.stage], stage, shapes, job.key["precision"], workspace))

        complete = build_all(jobs, arguments.engines, build)
    except (BuildError, ManifestError, OSError, ValueError) as error:
        sys.exit(f"torch_to_tensorrt: {error}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
