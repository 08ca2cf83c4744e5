"""The one table of formats that a stage can be carried in: it drives `scaphoid-export --formats`, the check of every
exported file against eager fp32, and `scaphoid-export formats`. Imports nothing heavy: writers and loaders import their
engine when they are called."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaphoid.export.tolerances import precision_of
from scaphoid.trainer.contracts import Stage

SERVED = {"preprocess": "dali", "encoder": "openvino", "glue": "torchscript"}  # kind of a stage: what Triton serves
Write = Callable[[Any, tuple, Stage, Path], None]  # module, example inputs of two images, stage, the file to write
Load = Callable[[Path, Stage, str, int], Callable]  # file, stage, precision, threads (0: all cores)


class FormatError(ValueError):
    """A format that is unknown, or cannot be used here. One line: which, and what to do."""


@dataclass(frozen=True)
class Format:
    """`needs`: importable module -> what to install for it. `files`: suffix of each file it writes for a stage -> the
    precision in that file ("" where the engine is told when it loads)."""

    name: str
    purpose: str
    kinds: tuple[str, ...]
    needs: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    write: Write | None = None
    load: Load | None = None
    gpu: bool = False

    def missing(self) -> list[str]:
        """What this machine lacks for it, each with its remedy; empty when it has everything."""
        lacking = [f"{remedy} ({module})" for module, remedy in self.needs.items() if not _importable(module)]
        return [*lacking, *(["an NVIDIA GPU"] if self.gpu and not Path("/proc/driver/nvidia/version").exists() else [])]

    def require(self) -> None:
        """Raises FormatError, naming what to install, unless this machine can write and run the format."""
        if missing := self.missing():
            raise FormatError(f"format {self.name} needs {', '.join(missing)}")

    def path(self, artefacts: Path, stage: Stage, suffix: str) -> Path:
        """Where a stage's file lies: what Triton serves is in the stage's own folder, the rest in the format's."""
        if SERVED.get(stage.kind) == self.name:
            return artefacts / stage.name / f"model{suffix}"
        return artefacts / self.name / f"{stage.name}{suffix}"


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _write_torchscript(module, example: tuple, stage: Stage, path: Path) -> None:
    from scaphoid.export.torch_to_torchscript import torch_to_torchscript

    torch_to_torchscript(module, example, stage, path)


def _load_torchscript(path: Path, stage: Stage, precision: str, threads: int) -> Callable:
    import torch

    with warnings.catch_warnings():  # deprecated, but still what Triton serves
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        return torch.jit.load(str(path)).eval()


def _write_exported(module, example: tuple, stage: Stage, path: Path) -> None:
    from scaphoid.export.torch_to_exported import torch_to_exported

    torch_to_exported(module, example, stage, path)


def _load_exported(path: Path, stage: Stage, precision: str, threads: int) -> Callable:
    import torch

    return torch.export.load(path).module()


def _write_onnx(module, example: tuple, stage: Stage, path: Path) -> None:
    """int8 is calibrated on the `example` alone: enough for speed and a compile check. onnx_to_int8.py does better."""
    from scaphoid.export.torch_to_onnx import torch_to_onnx

    if not path.name.endswith(INT8):
        torch_to_onnx(module, example, stage, path, FORMATS["onnx"].files["".join(path.suffixes)])
        return
    from scaphoid.export.quantize import quantize_file

    torch_to_onnx(module, example, stage, path)
    if precision_of(stage, "int8") == "int8":
        quantize_file(path, example[0].numpy())


def _load_onnx(path: Path, stage: Stage, precision: str, threads: int) -> Callable:
    from scaphoid.export.onnx_stage import OnnxStage

    return OnnxStage(path, stage, threads)


def _write_openvino(module, example: tuple, stage: Stage, path: Path) -> None:
    from scaphoid.export.torch_to_openvino import torch_to_openvino

    torch_to_openvino(module, example, stage, path)


def _load_openvino(path: Path, stage: Stage, precision: str, threads: int) -> Callable:
    from scaphoid.export.runner import OpenVinoStage

    return OpenVinoStage(path, stage, precision, threads)


INT8 = ".int8.onnx"  # of the ONNX that an export leaves to onnx_to_int8.py, which calibrates it
ANY = ("encoder", "glue", "flow")  # every kind of stage, and the whole flow
TORCH = {"torch": "scaphoid itself"}
ONNX = "pip install 'scaphoid[onnx]'"

FORMATS = {
    each.name: each
    for each in (
        Format("eager", "the trained modules: what every other format is held against", ANY, TORCH),
        Format(
            "torchscript",
            "glue in Triton; any stage or flow from Python or C++",
            ANY,
            TORCH,
            {".pt": "f32"},
            _write_torchscript,
            _load_torchscript,
        ),
        Format(
            "exported",
            "torch.export's .pt2, TorchScript's successor; where torch-tensorrt and AOTInductor start",
            ANY,
            TORCH,
            {".pt2": "f32"},
            _write_exported,
            _load_exported,
        ),
        Format(
            "onnx",
            "where TensorRT starts on a machine without torch; ONNX Runtime",
            ("encoder",),
            {"onnx": ONNX, "onnxruntime": ONNX},
            {".onnx": "f32", ".f16.onnx": "f16", INT8: "int8"},
            _write_onnx,
            _load_onnx,
        ),
        Format(
            "openvino",
            "encoders in Triton on a CPU",
            ("encoder",),
            {"openvino": "scaphoid itself"},
            {".xml": ""},
            _write_openvino,
            _load_openvino,
        ),
        Format(
            "tensorrt",
            "encoders in Triton on a GPU; built there, from the ONNX",
            ("encoder",),
            {"tensorrt": "NVIDIA TensorRT"},
            gpu=True,
        ),
    )
}


def named(names: Sequence[str]) -> list[Format]:
    """The formats of these names, in the table's order. Raises FormatError for an unknown one."""
    if unknown := [name for name in names if name not in FORMATS]:
        raise FormatError(f"unknown format {unknown[0]!r}: expected some of {', '.join(writable())}")
    return [each for each in FORMATS.values() if each.name in names]


def choose(names: Sequence[str]) -> list[Format]:
    """The formats to write besides those that are served. Raises FormatError: unknown, without files, not here."""
    chosen = named(names)
    for each in chosen:
        if each.write is None:
            way = "export onnx and build from it on the target GPU" if each.name == "tensorrt" else "it has no files"
            known = ", ".join(writable())
            raise FormatError(f"format {each.name} cannot be written here: {way}; expected some of {known}")
        each.require()
    return chosen


def writable() -> list[str]:
    return [each.name for each in FORMATS.values() if each.write]


def describe() -> list[dict]:
    """The table as `scaphoid-export formats --json` prints it."""
    return [
        {
            "format": each.name,
            "purpose": each.purpose,
            "stages": list(each.kinds),
            "files": dict(each.files),
            "served": [kind for kind, name in SERVED.items() if name == each.name],
            "needs": sorted({*each.needs, *(["an NVIDIA GPU"] if each.gpu else [])}),
            "here": not each.missing(),
            "missing": each.missing(),
        }
        for each in FORMATS.values()
    ]
