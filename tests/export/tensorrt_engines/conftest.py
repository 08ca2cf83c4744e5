"""Artefacts of two encoders with the contracts' tensors and made-up ONNX, and a driver that knows one GPU."""

import shutil
import subprocess

import pytest

from scaphoid.export.artefacts import write_manifest
from scaphoid.export.tensorrt_engines.build_engines import DRIVER, onnx_file
from scaphoid.trainer.contracts import STAGES

ENCODERS = ("encoder", "parts_encoder")
SIZES = {"height": 90, "width": 90, "part_height": 50, "part_width": 50, "map_height": 3, "map_width": 3}
SOURCE = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return device != 40; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : 7;
    return device != 40;
}
"""


def describe(stage) -> dict:
    sides = (("inputs", stage.inputs), ("outputs", stage.outputs))
    doors = {
        side: [{"name": tensor.name, "dims": [SIZES.get(dim, dim) for dim in tensor.dims]} for tensor in tensors]
        for side, tensors in sides
    }
    return {"kind": stage.kind, **doors}


@pytest.fixture
def write_artefacts(tmp_path):
    """Writes the artefacts, in the same folder each time; another `version` has other ONNX."""

    def write(version: str = "first"):
        folder = tmp_path / "artefacts"
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        for stage in ENCODERS:
            for precision in ("f16", "f32"):
                (folder / onnx_file(stage, precision)).write_text(f"{stage} {precision} {version}")
        write_manifest(folder, {"stages": {name: describe(STAGES[name]) for name in (*ENCODERS, "object_crop")}})
        return folder

    return write


@pytest.fixture
def artefacts(write_artefacts):
    return write_artefacts()


@pytest.fixture
def driver(tmp_path):
    """A folder with the driver's library: its GPU is an Orin of compute capability 8.7."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    folder = tmp_path / "driver"
    folder.mkdir()
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / DRIVER], input=SOURCE, text=True, check=True
    )
    return folder
