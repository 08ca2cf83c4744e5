"""Loads engines that build_engines.py wrote, and only those that were built for this: these artefacts, this TensorRT,
this GPU. Everything else is refused in one line, with the command that builds the right one.

Deserialising needs a GPU: not run on hardware.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from scaphoid.export.tensorrt_engines import build_engines
from scaphoid.export.tensorrt_engines.build_engines import (
    ENGINE,
    MANIFEST,
    PRECISIONS,
    BuildError,
    gpu_name,
    load_tensorrt,
    make_key,
    no_onnx,
    onnx_file,
    read_entries,
    read_manifest,
    sha256,
    shapes_of,
)

WORDS = {"onnx": "other ONNX", "tensorrt": "another TensorRT", "gpu": "another GPU", "shapes": "other input shapes"}


class EngineError(Exception):
    """An engine that may not be loaded here. One line: which, why, and the command that builds it anew."""


def rebuild_command(artefacts: Path, engines: Path, precision: str) -> str:
    return shlex.join(
        [sys.executable, "-m", build_engines.__name__, str(artefacts), str(engines), "--precision", precision]
    )


def find_engine(
    artefacts: Path, engines: Path, stage: str, trt: ModuleType, gpu: str, precision: str = PRECISIONS[0]
) -> Path:
    """The engine of `stage` that was built from these artefacts by this TensorRT for this GPU, its bytes unchanged.
    Raises EngineError: of several that do not fit, it speaks of the one built last."""
    remedy = f"; build it: {rebuild_command(artefacts, engines, precision)}"
    try:
        manifest, entries = read_manifest(artefacts), read_entries(engines)
    except BuildError as error:
        raise EngineError(f"{error}{remedy}") from None
    if stage not in manifest["stages"] or onnx_file(stage, precision) not in manifest["files"]:
        raise EngineError(no_onnx(artefacts, stage, precision))
    onnx = manifest["files"][onnx_file(stage, precision)]
    wanted = make_key(onnx, trt, gpu, precision, shapes_of(manifest, stage))
    reason = f"{engines / MANIFEST} lists no {precision} engine of {stage}"
    for file, entry in entries.items():
        if (entry["stage"], entry["key"]["precision"]) == (stage, precision):
            reason = why_not(engines / file, entry, wanted)
            if not reason:
                return engines / file
    raise EngineError(reason + remedy)


def why_not(plan: Path, entry: Mapping, wanted: Mapping) -> str:
    """Why the engine in the file `plan`, of which the manifest says `entry`, may not be loaded where `wanted` is the
    key; empty when it may. Who built it does not matter."""
    if entry["kind"] != ENGINE:
        return f"{plan} is an {entry['kind']}, not an engine"
    for part, words in WORDS.items():
        if entry["key"][part] != wanted[part]:
            return f"{plan} was built for {words}: {entry['key'][part]}, here it is {wanted[part]}"
    if not plan.is_file():
        return f"{plan} is missing, though {MANIFEST} lists it"
    if sha256(plan) != entry["sha256"]:
        return f"{plan} changed since it was built (sha256 differs)"
    return ""


def load_engine(
    artefacts: Path, engines: Path, stage: str, precision: str = PRECISIONS[0], trt: ModuleType | None = None
):
    """The `ICudaEngine` of one stage. Raises EngineError, BuildError without TensorRT or a driver."""
    trt = trt or load_tensorrt()
    plan = find_engine(artefacts, engines, stage, trt, gpu_name(), precision)
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        remedy = rebuild_command(artefacts, engines, precision)
        raise EngineError(f"TensorRT does not take {plan}: its reason is in the lines above; build it: {remedy}")
    return engine
