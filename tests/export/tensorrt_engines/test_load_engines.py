"""What the loader refuses, and that the command it names is one; the trtexec script, from its text to the manifest."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from scaphoid.export.tensorrt_engines.build_engines import MANIFEST, build_all, make_jobs, read_entries
from scaphoid.export.tensorrt_engines.device_files import FOLDER, SCRIPT, write_device_files
from scaphoid.export.tensorrt_engines.load_engines import EngineError, find_engine, load_engine

TRT = SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
LATER = SimpleNamespace(__name__="tensorrt", __version__="11.4.0.106")
GPU = "Orin, compute capability 8.7"


def write(job, workspace, plan, timing_cache) -> None:
    plan.write_text(job.stage)


@pytest.fixture
def engines(artefacts, tmp_path):
    folder = tmp_path / "engines"
    build_all(make_jobs(artefacts, "f16", TRT, GPU), folder, write)
    return folder


def refusal(artefacts, engines, trt=TRT, gpu=GPU, precision="f16") -> str:
    with pytest.raises(EngineError) as error:
        find_engine(artefacts, engines, "encoder", trt, gpu, precision)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_engine_of_here_is_found_whoever_built_it(artefacts, engines):
    (other,) = [job for job in make_jobs(artefacts, "f16", LATER, GPU, "trtexec") if job.stage == "encoder"]
    build_all([other], engines, write)
    found = [find_engine(artefacts, engines, "encoder", trt, GPU) for trt in (TRT, LATER)]
    assert found[0] != found[1]
    assert [path.read_text() for path in found] == ["encoder", "encoder"]


def test_an_engine_of_something_else_is_refused(artefacts, engines, write_artefacts):
    assert "for another TensorRT: tensorrt 10.3.0, here it is tensorrt 11.4" in refusal(artefacts, engines, trt=LATER)
    assert f"for another GPU: {GPU}, here it is NVIDIA L4" in refusal(artefacts, engines, gpu="NVIDIA L4, 8.9")
    assert "lists no f32 engine of encoder" in refusal(artefacts, engines, precision="f32")
    assert "holds no onnx/encoder.int8.onnx" in refusal(artefacts, engines, precision="int8")
    write_artefacts("trained again")
    assert "was built for other ONNX" in refusal(artefacts, engines)


def test_other_shapes_are_refused(artefacts, engines):
    manifest = json.loads((artefacts / "manifest.json").read_text())
    manifest["stages"]["encoder"]["inputs"][0]["dims"] = [1, 91, 91]
    (artefacts / "manifest.json").write_text(json.dumps(manifest))
    assert "was built for other input shapes" in refusal(artefacts, engines)


def test_changed_and_missing_engines_are_refused(artefacts, engines):
    plan = find_engine(artefacts, engines, "encoder", TRT, GPU)
    plan.write_text("tampered")
    assert f"{plan} changed since it was built" in refusal(artefacts, engines)
    plan.unlink()
    assert f"{plan} is missing" in refusal(artefacts, engines)
    for text in ("{", "[" * 100_000):
        (engines / MANIFEST).write_text(text)
        assert "lists no scaphoid.engines/1" in refusal(artefacts, engines)
    (engines / MANIFEST).unlink()
    assert "lists no f16 engine of encoder" in refusal(artefacts, engines)


def test_a_compile_check_is_never_an_engine(artefacts, engines):
    key = make_jobs(artefacts, "f16", TRT, GPU)[0].key  # even with an engine's key
    manifest = json.loads((engines / MANIFEST).read_text())
    (entries,) = manifest.values()
    next(entry for entry in entries.values() if entry["key"] == key)["kind"] = "RTX compile check"
    (engines / MANIFEST).write_text(json.dumps(manifest))
    assert "is an RTX compile check, not an engine" in refusal(artefacts, engines)


def test_the_command_of_a_refusal_is_one(artefacts, engines):
    command = shlex.split(refusal(artefacts, engines, trt=LATER).partition("; build it: ")[2])
    assert command[3:] == [str(artefacts), str(engines), "--precision", "f16"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert "usage: build_engines.py" in done.stdout, done.stderr


class Runtime:
    """TensorRT's runtime where it does not take an engine."""

    def __init__(self, logger) -> None: ...

    def deserialize_cuda_engine(self, plan):
        return None


def test_what_tensorrt_does_not_take_is_an_error(artefacts, engines, monkeypatch):
    monkeypatch.setattr("scaphoid.export.tensorrt_engines.load_engines.gpu_name", lambda: GPU)
    trt = SimpleNamespace(**vars(TRT), Runtime=Runtime, Logger=lambda level: None)
    trt.Logger.ERROR = 1
    with pytest.raises(EngineError, match=r"TensorRT does not take .*; build it: .* --precision f16"):
        load_engine(artefacts, engines, "encoder", trt=trt)


TRTEXEC = """#!{python}
import argparse, pathlib, re, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in ("stronglyTyped", "noTF32", "skipInference"):
    parser.add_argument("--" + flag, action="store_true", required=True)
for flag in ("onnx", "saveEngine", "timingCacheFile"):
    parser.add_argument("--" + flag, type=pathlib.Path, required=True)
for flag in ("minShapes", "optShapes", "maxShapes"):
    parser.add_argument("--" + flag, type=re.compile(r"([a-z_]+:\\d+(x\\d+)+)").fullmatch, required=True)
parser.add_argument("--memPoolSize", type=re.compile(r"workspace:\\d+").fullmatch, required=True)
given = parser.parse_args()
shapes = [shape.group() for shape in (given.minShapes, given.optShapes, given.maxShapes)]
given.saveEngine.write_text("\\n".join([given.onnx.read_text(), *shapes, given.memPoolSize.group()]))
"""


@pytest.fixture
def script(artefacts):
    write_device_files(artefacts, json.loads((artefacts / "manifest.json").read_text())["stages"])
    return artefacts / FOLDER / SCRIPT


@pytest.mark.parametrize("precision", ["f16", "f32"])
def test_the_script_builds_every_stage_by_trtexec_and_lists_it(artefacts, script, driver, tmp_path, precision):
    programs, engines = tmp_path / "bin", tmp_path / "two words"
    programs.mkdir()
    (programs / "trtexec").write_text(TRTEXEC.format(python=sys.executable))
    (programs / "trtexec").chmod(0o755)
    (programs / "python3").symlink_to(sys.executable)
    (programs / "tensorrt.py").write_text("__version__ = '10.3.0'")
    path = f"{programs}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(programs)}
    command = ["sh", script, engines, precision, "512"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = find_engine(artefacts, engines, "encoder", TRT, GPU, precision).read_text().splitlines()
    assert built[0] == f"encoder {precision} first"
    assert [line.partition(":")[2] for line in built[1:]] == ["1x1x90x90", "4x1x90x90", "8x1x90x90", "512"]
    assert {entry["key"]["builder"] for entry in read_entries(engines).values()} == {"trtexec"}
    assert {entry["stage"] for entry in read_entries(engines).values()} == {"encoder", "parts_encoder"}


def test_the_script_has_a_line_for_each_stage(script):
    lines = re.findall(r"^    build (.*)$", script.read_text(), re.M)
    assert [line.split()[:2] for line in lines[:2]] == [
        ["onnx/encoder.f16.onnx", "encoder"],
        ["onnx/parts_encoder.f16.onnx", "parts_encoder"],
    ]
    assert lines[1].split()[2:] == [f"part_images:{batch}x7x1x50x50" for batch in (1, 4, 8)]
    assert len(lines) == 4


def test_the_script_says_what_it_wants(script, tmp_path):
    done = subprocess.run(["sh", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: sh" in done.stderr
    done = subprocess.run(["sh", script, tmp_path / "engines", "int8"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no ONNX of precision int8: expected f16|f32" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
