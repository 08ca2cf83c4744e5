"""What a GPU repository needs of the artefacts, written where there is no GPU."""

import math
import os
import re

import numpy as np
import pytest

from scaphoid.export.artefacts import GPU_FILES, WARMUP
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS

pytest.importorskip("nvidia.dali")
pytest.importorskip("scaphoid.kernels.library")

from scaphoid.export.gpu_files import sample, write_gpu_files
from scaphoid.export.pipeline_to_dali import pipeline_to_dali
from scaphoid.trainer.data.guard import check_encoded

SIZES = {"bytes": 99, "height": 90, "width": 90, "map_height": 5, "map_width": 6, "part_height": 50, "part_width": 50}
SIZES |= {"key_height": 110, "key_width": 110}  # larger than the image: KALM may enlarge the key area
DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "FP32": np.float32}


def described(name: str) -> dict:
    tensors = STAGES[name].inputs
    return {"inputs": [{"name": t.name, "dtype": t.dtype, "dims": [SIZES.get(d, d) for d in t.dims]} for t in tensors]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    artefacts = tmp_path_factory.mktemp("artefacts")
    write_gpu_files(artefacts, {name: described(name) for name in STAGES}, 90)
    return artefacts / GPU_FILES


def test_every_stage_has_a_sample_of_the_size_of_its_inputs(folder):
    assert {path.name for path in (folder / WARMUP).iterdir()} == {name for f in FLOWS.values() for name in f.stages}
    for name in STAGES:
        for tensor in described(name)["inputs"]:
            content = (folder / WARMUP / name / tensor["name"]).read_bytes()
            if tensor["name"] == "encoded":
                assert check_encoded(content).format == "JPEG"
                continue
            values = np.frombuffer(content, DTYPES[tensor["dtype"]])
            assert values.size == math.prod(tensor["dims"])
            assert np.isfinite(values).all()
            assert tensor["dtype"] != "UINT8" or len(np.unique(values)) > 1


def test_samples_are_plausible():
    image = np.arange(90 * 90, dtype=np.uint8).reshape(90, 90)
    assert np.array_equal(sample("UINT8", [1, 90, 90], image)[0], image)
    assert np.array_equal(sample("UINT8", [7, 1, 50, 50], image)[6, 0], image[:50, :50])
    hill = sample("FP32", [5, 6], image)
    assert hill.max() == hill[2, 2] == 1
    x0, y0, x1, y1 = sample("FP32", [7, 4], image)[3]
    assert (x0, y0, x1, y1) == (22, 22, 67, 67)


def test_the_pipeline_of_a_gpu_is_written_without_one_and_the_same_on_every_machine(tmp_path, monkeypatch, folder):
    pipeline_to_dali(tmp_path / "here", 90, 8, "mixed")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    pipeline_to_dali(tmp_path / "there", 90, 8, "mixed")
    written = (tmp_path / "here").read_bytes()
    assert written == (tmp_path / "there").read_bytes() == (folder / "model.dali").read_bytes()
    assert re.findall(rb"device\x12\x06string\*.(cpu|gpu|mixed)", written)[1:4] == [b"mixed", b"gpu", b"gpu"]
    assert os.fsencode(tmp_path.parent) not in written
