"""`scaphoid-export`: trained weights to artefacts, a folder for each stage and one manifest.

scaphoid-export msfm.safetensors kalm.safetensors --out artefacts
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

import scaphoid.kernels
from scaphoid.export.artefacts import MANIFEST, OPS_LIBRARY, PHANTOMS, sha256, versions, write_manifest
from scaphoid.export.precision import Precision, effective_precision
from scaphoid.export.runner import PREPROCESS_BATCH, eager_stages, load_served, run
from scaphoid.export.torch_to_openvino import torch_to_openvino
from scaphoid.export.torch_to_torchscript import torch_to_torchscript
from scaphoid.trainer.checkpoint import Model, read_metadata
from scaphoid.trainer.contracts import ENCODED, STAGES, Stage
from scaphoid.trainer.data.pipeline import serialize
from scaphoid.trainer.flows import FLOWS, Flow

SAMPLE = b"P5\n96 64\n255\n" + bytes((7 * x + 5 * y + x * y // 16) % 256 for y in range(64) for x in range(96))
TORCH_TYPES = {"UINT8": torch.uint8, "INT32": torch.int32, "FP32": torch.float32}


class ExportError(Exception):
    """Weights that cannot be exported as asked. One line: which file, what was expected, what to do."""


@dataclass(frozen=True)
class Door:
    """What really goes in and out of one stage of a trained model, from one run on a sample of two images."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def describe(self, stage: Stage) -> dict:
        """The stage's contract with the run's numbers in place of words."""

        def tensors(contract, samples) -> list[dict]:
            return [
                {"name": tensor.name, "dtype": tensor.dtype, "dims": list(sample.shape[1:])}
                for tensor, sample in zip(contract, samples, strict=True)
            ]

        return {
            "kind": stage.kind,
            "inputs": tensors(stage.inputs, self.inputs),
            "outputs": tensors(stage.outputs, self.outputs),
        }


def export(weights: list[Path], out: Path, precision: Precision = "f32") -> dict:
    """Export every flow that the `weights` files make possible into the folder `out`; returns the manifest's content.

    An `out` that holds earlier artefacts is replaced, once the new ones are complete. Raises ExportError, and
    ValueError for a file whose model does not load or is served by no flow.
    """
    if taken := [path for path in (out, *out.parents) if path.exists() and not path.is_dir()]:
        raise ExportError(f"--out {out}: {taken[0]} is a file: artefacts need a folder of their own")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} is not empty and holds no artefacts: choose another --out")
    modules: dict[str, nn.Module] = {}
    doors: dict[str, Door] = {}
    origins: list[dict] = []
    image_size = None
    for path in weights:
        model = load_served(path)
        size = model.config.image_size
        if image_size not in (None, size):
            raise ExportError(f"{path} takes images of {size} pixels, {weights[0]} of {image_size}: export them apart")
        image_size = size
        stages = model.stages()
        if taken := sorted(set(stages) & set(modules)):
            raise ExportError(f"{path} has the stages of another weights file ({taken[0]}): export them apart")
        modules |= stages
        origins.append(origin(path, model, stages))
        for flow in flows_of(stages):
            doors |= record(flow, eager_stages(model, size))
    flows = flows_of(modules)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in sorted({name for flow in flows for name in flow.stages}):
        (partial / name).mkdir(parents=True)
        export_stage(STAGES[name], modules.get(name), doors[name], partial / name, image_size)
    shutil.copyfile(Path(scaphoid.kernels.__file__).parent / OPS_LIBRARY, partial / OPS_LIBRARY)
    content = {
        "flows": [flow.name for flow in flows],
        "precision": precision,
        "image_size": image_size,
        "weights": origins,
        "versions": versions(),
        "stages": {name: door.describe(STAGES[name]) for name, door in doors.items()},
    }
    write_manifest(partial, content)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return content


def origin(path: Path, model: Model, stages: Mapping[str, nn.Module]) -> dict:
    """What the manifest says of one weights file: the flows that run on it, and `phantoms`, the generator's version,
    when it was trained on drawn radiographs."""
    facts = {key: value for key, value in read_metadata(path).items() if key == PHANTOMS}
    flows = [flow.name for flow in flows_of(stages)]
    about = {"file": path.name, "sha256": sha256(path), "system": model.system, "config": asdict(model.config)}
    return {**about, "flows": flows, **facts}


def flows_of(stages: Mapping[str, object]) -> list[Flow]:
    """The flows that can run on `stages`, which leave out preprocessing."""
    return [flow for flow in FLOWS.values() if set(flow.stages) <= {*stages, "preprocess"}]


def record(flow: Flow, stages: Mapping) -> dict[str, Door]:
    """Run `flow` on a sample and keep what crossed every stage's door. Raises ExportError where that breaks the
    contract."""
    tensors = run(flow, stages, [SAMPLE, SAMPLE], flow.outputs)
    tensors[ENCODED.name] = torch.empty(2, len(SAMPLE), dtype=torch.uint8)
    doors = {}
    for step in flow.steps:
        inputs = tuple(tensors[step.inputs[tensor.name]] for tensor in step.stage.inputs)
        outputs = tuple(tensors[step.outputs[tensor.name]] for tensor in step.stage.outputs)
        doors[step.stage.name] = Door(inputs, outputs)
        check_door(step.stage, doors[step.stage.name])
    return doors


def check_door(stage: Stage, door: Door) -> None:
    """Hold a stage's real tensors against its contract."""
    contract = [*stage.inputs, *stage.outputs]
    for tensor, sample in zip(contract, [*door.inputs, *door.outputs], strict=True):
        wanted = [
            2,
            *(
                size if isinstance(size, int) else real
                for size, real in zip(tensor.dims, sample.shape[1:], strict=False)
            ),
        ]
        if (
            sample.dtype != TORCH_TYPES[tensor.dtype]
            or list(sample.shape) != wanted
            or len(wanted) != 1 + len(tensor.dims)
        ):
            raise ExportError(
                f"stage {stage.name}: {tensor.name} is {sample.dtype} {list(sample.shape)}, "
                f"the contract says {tensor.dtype} [batch, {', '.join(map(str, tensor.dims))}]"
            )


def export_stage(stage: Stage, module: nn.Module | None, door: Door, folder: Path, image_size: int) -> None:
    """Write one stage as what its kind is served from."""
    if stage.kind == "preprocess":
        serialize(folder / "model.dali", image_size, PREPROCESS_BATCH)
    elif stage.kind == "encoder":
        torch_to_openvino(module, door.inputs, stage, folder / "model.xml")
    else:
        torch_to_torchscript(module, stage, folder / "model.pt")


@dataclass(frozen=True)
class Arguments:
    """Export trained weights for serving on a CPU."""

    weights: tyro.conf.Positional[list[Path]]
    """Weights files (.safetensors): MSFM's, KALM's, or both for a repository that serves all flows."""
    out: Path
    """Folder for the artefacts; earlier artefacts in it are replaced."""
    precision: Precision = "f32"
    """What the encoders' engines compute in. A CPU without it runs f32; scaphoid-serve says so."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        content = export(arguments.weights, arguments.out, arguments.precision)
    except (ExportError, OSError, ValueError) as error:
        sys.exit(f"scaphoid-export: {error}")
    if (real := effective_precision(arguments.precision)) != arguments.precision:
        print(f"this CPU has no {arguments.precision}: served here, the engines run in {real}")
    print(
        f"{arguments.out}: flows {', '.join(content['flows'])}, {content['precision']}, {len(content['stages'])} stages"
    )


if __name__ == "__main__":
    main()
