"""Random inputs for the ops, reproducible from a seed, drawn so that ties and equal means are common; the devices that
op tests run on; the op library built with and without CUDA."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from scaphoid.kernels import build_ops, library
from scaphoid.kernels.simt import build as simt_build

OPS = {source.stem for source in build_ops.sources("registration/*.cpp")}


class OnGpu(TorchDispatchMode):
    """Every scaphoid op called on CPU tensors runs on the GPU, and its results come back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "scaphoid":
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("cuda"), (args, kwargs or {}))
        return tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), func(*args, **kwargs))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of an op (tests/kernels/test_<op>.py) runs on every device there is."""
    if metafunc.module.__name__.rpartition("test_")[2] in OPS:
        devices = ["cpu"]
        if torch.cuda.is_available() and library.cuda_architectures():
            devices.append(pytest.param("cuda", marks=pytest.mark.gpu))
        metafunc.fixturenames.append("device")
        metafunc.parametrize("device", devices, indirect=True, scope="module")


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "cpu":
        yield
    else:
        with OnGpu():
            yield


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], SimpleNamespace]:
    """Builds the "torch" or the "edge" library with SCAPHOID_CUDA "0" or "1": its path and what the build said."""

    def run(kind: str, cuda: str) -> SimpleNamespace:
        if cuda == "1" and build_ops.find_nvcc() is None:
            pytest.skip("there is no nvcc; pip install -e '.[dev]' brings one")
        out = tmp_path_factory.mktemp("library") / f"lib{kind}{cuda}.so"
        command = [sys.executable, build_ops.__file__, kind, "--out", str(out)]
        built = subprocess.run(command, env={**os.environ, "SCAPHOID_CUDA": cuda}, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
        return SimpleNamespace(path=out, said=built.stdout)

    return run


@pytest.fixture(scope="session")
def libraries(build) -> dict[str, Path]:
    """The torch library built without CUDA ("cpu") and with it for every architecture ("cuda")."""
    return {"cpu": build("torch", "0").path, "cuda": build("torch", "1").path}


@pytest.fixture(scope="session")
def simt() -> ctypes.CDLL:
    """The CUDA sources under the SIMT executor: scaphoid_*_cuda, scaphoid_simt_seed (kernels/simt/build.py)."""
    if reason := simt_build.missing_tools():
        pytest.skip(reason)
    return simt_build.load_library()


@pytest.fixture(scope="session")
def random_maps() -> Callable[..., Tensor]:
    def draw(seed: int, shape: tuple[int, ...], levels: int, transposed: bool = False) -> Tensor:
        """Maps of small whole numbers (sums and means are exact), as a non-contiguous view if asked for."""
        generator = torch.Generator().manual_seed(seed)
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        maps = torch.randint(-levels, levels + 1, shape, generator=generator).float()
        return maps.transpose(-2, -1) if transposed else maps

    return draw


@pytest.fixture(scope="session")
def random_boxes() -> Callable[..., Tensor]:
    def draw(seed: int, batch: int, n: int, height: int, width: int, overhang: float = 0.3) -> Tensor:
        """Boxes of positive size in float64, some of which reach over the border."""
        generator = torch.Generator().manual_seed(seed)
        corners = torch.rand(batch, n, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values
        corners = corners * (1 + 2 * overhang) - overhang
        corners[..., 1, :] += 0.01
        return (corners * torch.tensor([width, height])).reshape(batch, n, 4)

    return draw
