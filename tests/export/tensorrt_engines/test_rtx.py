"""The builder with TensorRT for RTX, which has TensorRT's interface and compiles without a GPU; and torch-tensorrt as
far as it goes without one."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from scaphoid.export import torch_to_tensorrt as to_tensorrt  # noqa: E402
from scaphoid.export.artefacts import MANIFEST, write_manifest  # noqa: E402
from scaphoid.export.tensorrt_engines import build_engines  # noqa: E402
from scaphoid.export.tensorrt_engines.build_engines import COMPILED, BuildError, onnx_file, read_entries  # noqa: E402
from scaphoid.export.tensorrt_engines.load_engines import EngineError, find_engine  # noqa: E402
from scaphoid.export.torch_to_onnx import torch_to_onnx  # noqa: E402
from scaphoid.trainer.contracts import STAGES  # noqa: E402
from scaphoid.trainer.models.kalm import Kalm, KalmConfig  # noqa: E402

RTX = pytest.mark.skipif(
    importlib.util.find_spec(build_engines.RTX) is None, reason="needs tensorrt_rtx: pip install 'scaphoid[rtx]'"
)
TORCH_TENSORRT = pytest.mark.skipif(
    importlib.util.find_spec(to_tensorrt.MODULE) is None,
    reason="needs torch-tensorrt-rtx: pip install --no-deps torch-tensorrt-rtx dllist",
)
SM = 86


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """The f16 ONNX of KALM's local encoder, and beside it a file that is none."""
    pytest.importorskip("onnx", reason="needs onnx: pip install 'scaphoid[onnx]'")
    torch.manual_seed(5)
    folder, name = tmp_path_factory.mktemp("artefacts"), "local_encoder"
    module = Kalm(KalmConfig("test_resnet", image_size=160, key_size=96)).stages()[name]
    (folder / "onnx").mkdir()
    image = torch.zeros(2, 1, 96, 96, dtype=torch.uint8)
    torch_to_onnx(module, (image,), STAGES[name], folder / onnx_file(name, "f16"), "f16")
    (folder / onnx_file("fma_encoder", "f16")).write_text("not a model")
    stages = {
        each: {"kind": "encoder", "inputs": [{"name": STAGES[each].inputs[0].name, "dims": [1, 96, 96]}]}
        for each in ("fma_encoder", name)
    }
    write_manifest(folder, {"stages": stages})
    return folder


def build(artefacts: Path, engines: Path, target: int = SM) -> subprocess.CompletedProcess:
    """The builder as a device runs it."""
    command = [sys.executable, build_engines.__file__, artefacts, engines, "--compile-check", str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@RTX
@pytest.mark.slow
def test_the_second_build_is_from_the_cache_and_neighbours_are_left_alone(artefacts, tmp_path):
    first = build(artefacts, tmp_path)
    assert first.returncode == 1
    assert "fma_encoder: failed: exit 1: does not parse" in first.stderr
    assert "local_encoder: compiles, which is no engine" in first.stdout
    ((file, entry),) = read_entries(tmp_path).items()
    assert (entry["stage"], entry["kind"]) == ("local_encoder", COMPILED)
    assert entry["sha256"] == build_engines.sha256(tmp_path / file)
    assert entry["key"]["shapes"] == {"key_image": [[batch, 1, 96, 96] for batch in build_engines.BATCHES]}
    assert (tmp_path / build_engines.TIMING_CACHE).stat().st_size > 0
    written = (tmp_path / file).stat().st_mtime_ns
    second = build(artefacts, tmp_path)
    assert f"local_encoder: kept {file}" in second.stdout
    assert (tmp_path / file).stat().st_mtime_ns == written


@RTX
@pytest.mark.slow
def test_what_was_compiled_is_refused_as_an_engine(artefacts, tmp_path):
    import tensorrt_rtx

    build(artefacts, tmp_path)
    with pytest.raises(EngineError, match="is an RTX compile check, not an engine"):
        find_engine(artefacts, tmp_path, "local_encoder", tensorrt_rtx, f"none, compiled for compute capability {SM}")


@RTX
@pytest.mark.slow
def test_a_builder_that_gives_up_is_tried_with_less_and_then_resumed(artefacts, tmp_path):
    copy = shutil.copytree(artefacts, tmp_path / "artefacts")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["stages"]["local_encoder"]["inputs"][0]["dims"] = [1, 97, 97]  # the network's are fixed to 96
    (copy / MANIFEST).write_text(json.dumps(manifest))
    given_up = build(copy, tmp_path / "engines")
    assert given_up.returncode == 1
    assert "local_encoder: workspace of 512 MiB: exit 3" in given_up.stderr
    assert "local_encoder: failed: not built in workspaces of 2048, 512, 128 MiB" in given_up.stderr
    assert not list((tmp_path / "engines").glob("*.rtx*"))
    assert "local_encoder: compiles" in build(artefacts, tmp_path / "engines").stdout


@RTX
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_plan(artefacts, tmp_path):
    """Of the process that builds, whose files may not grow beyond some bytes."""
    limit = ["sh", "-c", 'ulimit -f 40; exec "$0" "$@"']  # blocks of 512 bytes
    command = [sys.executable, "-W", "ignore", build_engines.__file__, artefacts, tmp_path, "--compile-check", str(SM)]
    done = subprocess.run([*limit, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    said = f"no space left in {tmp_path} (File too large): free some, and run the same command again"
    assert f"local_encoder: failed: exit 1: {said}" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # which has no content


@RTX
def test_an_architecture_that_rtx_lacks_is_named(artefacts, tmp_path):
    done = build(artefacts, tmp_path, 90)
    assert done.stderr.startswith("build_engines: TensorRT for RTX")
    assert "does not compile for SM 90" in done.stderr


def test_without_torch_tensorrt_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, to_tensorrt.MODULE, None)
    with pytest.raises(BuildError, match=r"pip install 'scaphoid\[gpu\]'"):
        to_tensorrt.load_torch_tensorrt()


PRETEND = """
import json, types
import torch
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (8, 6)
torch.cuda.get_device_name = lambda *_: "none"
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(name="none", major=8, minor=6, total_memory=2**33)
import tensorrt_rtx as trt
compile_network, found = trt.Builder.build_serialized_network, {}
def build(builder, network, config):
    plan = compile_network(builder, network, config)
    found["inputs"] = [network.get_input(i).name for i in range(network.num_inputs)]
    found["outputs"] = [network.get_output(i).name for i in range(network.num_outputs)]
    names = {network.get_layer(i).get_output_type(0).name for i in range(network.num_layers)}
    print(json.dumps({**found, "bytes": plan.nbytes if plan else 0, "types": sorted(names)}), flush=True)
    return plan
trt.Builder.build_serialized_network = build
from scaphoid.export.torch_to_tensorrt import torch_to_tensorrt
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.models.kalm import Kalm, KalmConfig
module = Kalm(KalmConfig("resnet18", image_size=160, key_size=96)).stages()["global_encoder"]
torch_to_tensorrt(module, STAGES["global_encoder"], [[batch, 1, 160, 160] for batch in (1, 4, 8)])
"""


@RTX
@TORCH_TENSORRT
@pytest.mark.slow
def test_torch_tensorrt_compiles_and_stops_at_the_missing_gpu(tmp_path):
    """The driver's answers are pretended; everything up to and with compiling is real."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRETEND],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found, stage = json.loads(line), STAGES["global_encoder"]
    assert found["inputs"] == [tensor.name for tensor in stage.inputs]
    assert found["outputs"] == [tensor.name for tensor in stage.outputs]
    assert found["bytes"] > 0
    assert "HALF" in found["types"]
    assert "BuildError: torch-tensorrt does not convert global_encoder" in done.stderr
