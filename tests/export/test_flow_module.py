"""A whole flow in one file, without this package's Python: in a fresh Python process and from C++."""

import functools
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scaphoid.kernels.library")

from scaphoid.export.flow_module import FlowModule, flow_stage  # noqa: E402
from scaphoid.export.formats import FORMATS  # noqa: E402
from scaphoid.kernels.library import path as ops_library  # noqa: E402
from scaphoid.trainer.checkpoint import SYSTEMS  # noqa: E402
from scaphoid.trainer.flows import FLOWS  # noqa: E402

SIZE = 160
NAMES = ("msfm", "kalm")
PROGRAM = Path(__file__).parents[2] / "export" / "cpp" / "run_flow.cpp"


@functools.cache
def flow_module(name: str) -> FlowModule:
    torch.manual_seed(5)
    model_class, config_class = SYSTEMS["kalm" if name == "kalm" else "msfm"]
    size = {"key_size": 96} if name == "kalm" else {"part_size": 96}
    return FlowModule(FLOWS[name], model_class(config_class("test_resnet", image_size=SIZE, **size)).stages()).eval()


def radiographs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    coarse = torch.rand(count, 1, 9, 8, generator=torch.Generator().manual_seed(2)) * 255
    image = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return image, torch.tensor([[2 * SIZE + 3 * i, SIZE + i] for i in range(count)], dtype=torch.int32)


def eager(name: str, *inputs: torch.Tensor) -> dict[str, np.ndarray]:
    module = flow_module(name)  # before: parameters made in inference mode cannot be exported
    with torch.inference_mode():
        outputs = module(*inputs)
    return {output: tensor.numpy() for output, tensor in zip(FLOWS[name].outputs, outputs, strict=True)}


def write(form: str, name: str, folder: Path) -> Path:
    (suffix,) = FORMATS[form].files
    FORMATS[form].write(flow_module(name), radiographs(2), flow_stage(FLOWS[name]), folder / f"{name}{suffix}")
    return folder / f"{name}{suffix}"


@pytest.mark.parametrize("name", list(FLOWS))
def test_the_door_of_a_flow_is_its_tables(name):
    stage = flow_stage(FLOWS[name])
    assert [tensor.name for tensor in stage.outputs] == list(FLOWS[name].outputs)
    found = eager(name, *radiographs(3))
    assert [found[tensor.name].shape for tensor in stage.outputs] == [(3, *tensor.dims) for tensor in stage.outputs]


FRESH = """
import sys
packages, library, *flows = sys.argv[1:]
sys.path.append(packages)  # alone: no .pth file of an editable install is read
sys.modules["scaphoid"] = None  # importing it would fail
import numpy, torch
torch.set_num_threads(1)
torch.ops.load_library(library)
for path in flows:
    flow = torch.export.load(path).module() if path.endswith(".pt2") else torch.jit.load(path)
    given = [torch.from_numpy(array) for array in numpy.load("inputs.npz").values()]
    for batch in (1, 3):
        with torch.no_grad():
            outputs = flow(*(tensor[:batch] for tensor in given))
        numpy.savez(f"{path}.{batch}.npz", *(tensor.numpy() for tensor in outputs))
assert not [name for name in sys.modules if name.startswith("scaphoid.")]
"""


@pytest.mark.slow
def test_fresh_process_without_this_package_runs_flows(tmp_path):
    inputs = radiographs(3)
    np.savez(tmp_path / "inputs.npz", *(tensor.numpy() for tensor in inputs))
    paths = {(form, name): write(form, name, tmp_path) for form in ("torchscript", "exported") for name in NAMES}
    command = [sys.executable, "-I", "-S", "-c", FRESH, sysconfig.get_path("purelib"), ops_library(), *paths.values()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (form, name), path in paths.items():
        for batch in (1, 3):
            expected = eager(name, *(tensor[:batch] for tensor in inputs))
            with np.load(f"{path}.{batch}.npz") as found:
                for output, array in zip(expected, found.values(), strict=True):
                    np.testing.assert_allclose(array, expected[output], 1e-5, 1e-5, err_msg=f"{form} {name} {output}")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_libtorch_program_runs_a_flow(tmp_path):
    home, program = Path(torch.__file__).parent, tmp_path / "run_flow"
    include = [f"-I{home / folder}" for folder in ("include", "include/torch/csrc/api/include")]
    link = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    build = ["g++", "-std=c++20", "-O0", str(PROGRAM), "-o", str(program), *include, *link]
    subprocess.run(build, check=True, timeout=500)
    image, _ = radiographs(1)
    (tmp_path / "image.pgm").write_bytes(b"P5\n%d %d\n255\n" % (SIZE, SIZE) + image.numpy().tobytes())
    for name in NAMES:
        command = [str(program), str(ops_library()), str(write("torchscript", name, tmp_path)), "image.pgm"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        found = {line.split()[0]: np.array(line.split()[1:], float) for line in done.stdout.splitlines()}
        expected = eager(name, image, torch.tensor([[SIZE, SIZE]], dtype=torch.int32))
        assert list(found) == list(expected)
        for output, array in expected.items():
            np.testing.assert_allclose(found[output], array.ravel(), 1e-4, 1e-5, err_msg=output)
    broken = subprocess.run([*command[:3], "none.pgm"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (broken.returncode, "none.pgm: expected a binary PGM" in broken.stderr) == (1, True)
