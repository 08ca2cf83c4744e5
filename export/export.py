"""`scaphoid-export`: trained weights to artefacts, a folder for each stage and one manifest.

scaphoid-export msfm.safetensors kalm.safetensors --out artefacts
scaphoid-export msfm.safetensors --out artefacts --precision int8 --calibration data/phantoms
scaphoid-export formats
scaphoid-export verify artefacts
scaphoid-export check-rtx artefacts

Everything that was exported is held against eager fp32 before it is published (gate.py). What fails stays beside, in
OUT.rejected, with its report and without a manifest: nothing serves it.
"""

import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from openvino.frontend import GeneralFailure, OpConversionFailure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import scaphoid.kernels
from scaphoid.export import artefacts as artefacts_module
from scaphoid.export import rtx_compile_check
from scaphoid.export.artefacts import CONTAINER, MANIFEST, OPS_LIBRARY, ManifestError, accepted, licence, versions
from scaphoid.export.calibration import prepare
from scaphoid.export.disk import room_in
from scaphoid.export.doors import Door
from scaphoid.export.edge.settings import settings
from scaphoid.export.flow_module import FlowModule, flow_stage
from scaphoid.export.formats import FORMATS, INT8, SERVED, Format, choose, describe
from scaphoid.export.gate import hold
from scaphoid.export.gate_images import PHANTOMS as GATE
from scaphoid.export.gate_images import gate_images
from scaphoid.export.gpu_files import write_gpu_files
from scaphoid.export.manifest import check
from scaphoid.export.parity_report import rounds, table
from scaphoid.export.pipeline_to_dali import pipeline_to_dali
from scaphoid.export.precision import Precision, effective_precision
from scaphoid.export.publish import GateError, place_of, publish
from scaphoid.export.runner import PREPROCESS_BATCH
from scaphoid.export.tensorrt_engines.device_files import write_device_files
from scaphoid.export.trained import ExportError, Trained, load_trained
from scaphoid.trainer.contracts import STAGES, Stage
from scaphoid.trainer.data.index import Index

FAILURES = (RuntimeError, GeneralFailure, OpConversionFailure)  # of converters


def export(
    weights: list[Path],
    out: Path,
    precision: Precision = "f32",
    formats: Sequence[str] = (),
    images: int = GATE.images,
    data: Path | None = None,
    accept: str = "",
    calibration: Path | None = None,
) -> dict:
    """Export every flow that the `weights` files make possible into the folder `out`; returns the manifest's content.
    `formats` are written besides those that are served. The gate holds all of it against eager fp32 on `images`
    phantoms, or radiographs of the index `data`; `accept` is the reason to publish what fails.

    An `out` that holds earlier artefacts is replaced, once the new ones are complete. Raises ExportError, GateError
    (nothing was published), OSError, also when the disk is full, and ValueError for a file whose model does not load or
    is served by no flow, for a format that cannot be written, and for images that cannot be used.
    """
    if (precision == "int8") != (calibration is not None):
        raise ExportError("--precision int8 and --calibration INDEX go together: int8 is calibrated on training images")
    chosen = prepare(calibration) if calibration else None
    out = out.resolve()  # what a link names is replaced, not the link
    if out.is_mount():
        raise ExportError(f"--out {out} is a mount point, which cannot be replaced as one: choose a folder inside it")
    also = choose([*formats, *(["onnx"] if precision == "int8" else [])])
    if taken := [path for path in (out, *out.parents) if path.exists() and not path.is_dir()]:
        raise ExportError(f"--out {out}: {taken[0]} is a file: artefacts need a folder of their own")
    with place_of(out) as work:  # nothing half-written stays, whatever happens
        trained = load_trained(weights)
        checked_on = gate_images(images, data)
        with room_in(out.parent):
            content = write_artefacts(trained, precision, also, chosen, work.new)
            check(out / MANIFEST, content)
            report = hold(work.new, content, trained.eager, checked_on)
            return publish(work, content, report, accept)


def write_artefacts(
    trained: Trained,
    precision: Precision,
    also: Sequence[Format],
    calibration: tuple[Index, Index] | None,
    artefacts: Path,
) -> dict:
    """Every file but the gate's; returns the manifest's content."""
    quantization = write_stages(trained, also, calibration, artefacts)
    content = {
        "flows": [flow.name for flow in trained.flows],
        "precision": precision,
        "image_size": trained.image_size,
        "weights": trained.origins,
        "thresholds": {name: each["threshold"] for each in trained.origins for name in each["flows"]},
        "licence": licence(),
        "versions": versions(),
        "container": CONTAINER,
        "formats": [each.name for each in FORMATS.values() if each in also or each.name in SERVED.values()],
        "stages": {
            name: describe_stage(STAGES[name], door, trained.modules.get(name)) for name, door in trained.doors.items()
        },
        **({"quantization": quantization} if quantization else {}),
    }
    if FORMATS["onnx"] in also:
        write_device_files(artefacts, content["stages"])
        write_gpu_files(artefacts, content["stages"], trained.image_size)
    return content


def write_stages(
    trained: Trained, also: Sequence[Format], calibration: tuple[Index, Index] | None, artefacts: Path
) -> list[dict]:
    """Every stage and flow, and the op library; returns what int8 did to each model, nothing without `calibration`."""
    doors, size = trained.doors, trained.image_size
    for name in sorted({name for flow in trained.flows for name in flow.stages}):
        export_stage(STAGES[name], trained.modules.get(name), doors[name].inputs, artefacts, size, also)
    quantization = []
    if calibration:
        from scaphoid.export.onnx_to_int8 import onnx_to_int8  # of an optional extra

        quantization = [onnx_to_int8(each, calibration, artefacts) for each in trained.models]
    for flow in trained.flows:
        module = FlowModule(flow, trained.modules)
        export_stage(flow_stage(flow), module, doors["preprocess"].outputs, artefacts, size, also)
    shutil.copyfile(Path(scaphoid.kernels.__file__).parent / OPS_LIBRARY, artefacts / OPS_LIBRARY)
    return quantization


def describe_stage(stage: Stage, door: Door, module: nn.Module | None) -> dict:
    """What the manifest says of a stage: its door, and of glue the numbers that runtimes without torch need."""
    return door.describe(stage) | ({"settings": settings(module)} if stage.kind == "glue" else {})


def export_stage(
    stage: Stage,
    module: nn.Module | None,
    example: tuple[Tensor, ...],
    artefacts: Path,
    image_size: int,
    also: Sequence[Format],
) -> None:
    """Write one stage, or a flow, as what its kind is served from, and in every format of `also` that takes it.
    `example` are its inputs for two images."""
    if stage.kind == "preprocess":
        (artefacts / stage.name).mkdir(parents=True)
        pipeline_to_dali(artefacts / stage.name / "model.dali", image_size, PREPROCESS_BATCH)
        return
    served = SERVED.get(stage.kind)
    for each in [
        each for each in FORMATS.values() if each.name == served or (each in also and stage.kind in each.kinds)
    ]:
        for suffix in (suffix for suffix in each.files if suffix != INT8):
            path = each.path(artefacts, stage, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                each.write(module, example, stage, path)
            except FAILURES as error:  # many lines, of which the last one sums up
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].lstrip("- ")
                sizes = f"images of {image_size} pixels"
                raise ExportError(f"{stage.name} cannot be written as {each.name} for {sizes}: {reason}") from error


@dataclass(frozen=True)
class Arguments:
    """Export trained weights for serving on a CPU."""

    weights: tyro.conf.Positional[list[Path]]
    """Weights files (.safetensors) or folders of runs: MSFM's, KALM's, or both, for a repository of all flows."""
    out: Path
    """Folder for the artefacts; earlier artefacts in it are replaced."""
    precision: Precision = "f32"
    """What the encoders' engines compute in. A CPU without it runs f32; scaphoid-serve says so. int8 needs
    --calibration and writes the ONNX too, which TensorRT's int8 is built from."""
    formats: tuple[str, ...] = ()
    """Formats to write besides those that are served: torchscript, exported, onnx. `scaphoid-export formats` lists
    them; `scaphoid-export check-rtx ARTEFACTS` compiles the ONNX for GPUs, without one."""
    gate_images: int = GATE.images
    """Images on which every exported file and flow is held against eager fp32: drawn, or of --gate-data. A large
    backbone takes seconds an image; from 100 on differences of AUROC and kappa are judged too."""
    gate_data: Path | None = None
    """Your own index.csv for the gate (`python -m scaphoid.trainer.data`), instead of phantoms."""
    calibration: Path | None = None
    """Index of the data set that the weights were trained on, for --precision int8: ranges are measured on part of its
    training images, and layers that cost accuracy on another part stay in f32."""
    accept: str = ""
    """The reason to publish artefacts that fail the gate, int8 that misses its bar among them. Manifest, model card,
    server and report repeat it."""


@dataclass(frozen=True)
class FormatsArguments:
    """List the formats: what each is for, which stages it takes, what it needs, whether this machine has it."""

    json: bool = False
    """Print JSON."""


def print_formats() -> None:
    if tyro.cli(FormatsArguments, prog="scaphoid-export formats", args=sys.argv[2:]).json:
        print(json.dumps(describe(), indent=2))
        return
    rows = Table("format", "for", "stages", "needs", "here")
    for row in describe():
        here = "yes" if row["here"] else f"no: {', '.join(row['missing'])}"
        cells = (row["format"], row["purpose"], ", ".join(row["stages"]), ", ".join(row["needs"]), here)
        rows.add_row(*map(escape, cells))
    Console().print(rows)


def main() -> None:
    if sys.argv[1:2] == ["formats"]:
        return print_formats()
    if sys.argv[1:2] == ["verify"]:
        return artefacts_module.main(sys.argv[2:])
    if sys.argv[1:2] == ["check-rtx"]:
        return rtx_compile_check.main(sys.argv[2:])
    arguments = tyro.cli(Arguments)
    if arguments.accept and not arguments.accept.strip():
        sys.exit("scaphoid-export: --accept: expected the reason to publish what fails, got blanks")
    interrupted = []

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    try:
        content = export(
            arguments.weights,
            arguments.out,
            arguments.precision,
            arguments.formats,
            arguments.gate_images,
            arguments.gate_data,
            arguments.accept,
            arguments.calibration,
        )
    except (Exception, KeyboardInterrupt) as error:
        if interrupted:  # OpenVINO hides KeyboardInterrupt in an error of its own
            sys.exit("scaphoid-export: interrupted, nothing was published")
        if not isinstance(error, ExportError | GateError | ManifestError | OSError | ValueError):
            raise
        sys.exit(f"scaphoid-export: {error}")
    if (real := effective_precision(arguments.precision)) != arguments.precision:
        print(f"this CPU has no {arguments.precision}: served here, the engines run in {real}")
    served = f"flows {', '.join(content['flows'])}, {content['precision']}, {len(content['stages'])} stages"
    print(f"{arguments.out}: {served}; held against eager fp32 on {content['parity']['images']['count']} images")
    for each in content.get("quantization", ()):
        Console().print(table(rounds(each)))
    if line := accepted(content):
        print(line)


if __name__ == "__main__":
    main()
