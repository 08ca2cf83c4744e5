"""What artefacts carry so that a device without torch or this package can build its engines: build_engines.py itself,
and a script of trtexec commands for those who prefer it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from scaphoid.export.tensorrt_engines import build_engines
from scaphoid.export.tensorrt_engines.build_engines import PRECISIONS, WORKSPACE, encoders, onnx_file, shapes_of

FOLDER = "tensorrt"  # in the artefacts
SCRIPT = "trtexec.sh"

HEAD = """#!/bin/sh
# Builds TensorRT engines by trtexec (TensorRT 10 or 11), from the ONNX of the artefacts that this file lies in:
#     sh {script} ENGINES [{choices}] [WORKSPACE_MIB]
# ENGINES gets the same manifest as by build_engines.py, which this ends with. Not run on hardware.
set -eu
engines=${{1:?usage: sh $0 ENGINES [{choices}] [WORKSPACE_MIB]}}
precision=${{2:-{precision}}}
workspace=${{3:-{workspace}}}
artefacts=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$engines/trtexec"

build() {{ # ONNX, STAGE, smallest, best and largest shape
    trtexec --onnx="$artefacts/$1" --saveEngine="$engines/trtexec/$2.plan" --stronglyTyped --noTF32 --skipInference \\
        --minShapes="$3" --optShapes="$4" --maxShapes="$5" \\
        --memPoolSize="workspace:$workspace" --timingCacheFile="$engines/trtexec/timing.cache"
}}

case $precision in
"""
TAIL = """*)
    echo "$0: no ONNX of precision $precision: expected {choices}" >&2
    exit 2
    ;;
esac
python3 "$artefacts/{folder}/{builder}" "$artefacts" "$engines" --precision "$precision" --adopt "$engines/trtexec"
"""


def trtexec_script(manifest: Mapping) -> str:
    """The script for the artefacts of `manifest`, whose `files` say which precisions there are. Shapes are written as
    trtexec wants them, `image:4x1x448x448`."""
    stages = encoders(manifest)
    present = [each for each in PRECISIONS if all(onnx_file(stage, each) in manifest["files"] for stage in stages)]
    choices = "|".join(present)
    head = HEAD.format(script=SCRIPT, choices=choices, precision=present[0], workspace=WORKSPACE)
    cases = [
        "".join([f"{each})\n", *(f"    build {_arguments(manifest, stage, each)}\n" for stage in stages), "    ;;\n"])
        for each in present
    ]
    return (
        head + "".join(cases) + TAIL.format(choices=choices, folder=FOLDER, builder=Path(build_engines.__file__).name)
    )


def _arguments(manifest: Mapping, stage: str, precision: str) -> str:
    profiles = shapes_of(manifest, stage)
    shapes = [
        ",".join(f"{name}:{'x'.join(map(str, each[size]))}" for name, each in profiles.items()) for size in range(3)
    ]
    return " ".join([onnx_file(stage, precision), stage, *shapes])


def write_device_files(artefacts: Path, stages: Mapping) -> None:
    """Write both into `artefacts`, which hold the ONNX already; `stages` are their manifest's."""
    folder, files = artefacts / FOLDER, [path.relative_to(artefacts).as_posix() for path in artefacts.rglob("*.onnx")]
    folder.mkdir()
    shutil.copyfile(build_engines.__file__, folder / Path(build_engines.__file__).name)
    (folder / SCRIPT).write_text(trtexec_script({"stages": stages, "files": files}))
