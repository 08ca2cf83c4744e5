"""The GPU's plan on this machine: its own CUDA sources under the SIMT executor, "the GPU's" memory plain memory, the
engines OpenVINO's. What is proved: which step runs where, sizes, order and copies. Not run on hardware."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from scaphoid.export.artefacts import read_manifest
from scaphoid.export.edge.cuda_plan import CudaPlan, reckons
from scaphoid.export.edge.cuda_runtime import CudaRuntime
from scaphoid.export.edge.decode import decode
from scaphoid.export.edge.flow import BATCH, encoders
from scaphoid.export.edge.openvino_engine import OpenVinoEngine
from scaphoid.export.edge.ops import OpError, Ops, load_library
from scaphoid.export.edge.plan import HostPlan
from scaphoid.export.tensorrt_engines.build_engines import BATCHES
from scaphoid.kernels.simt import build as simt
from scaphoid.trainer.flows import FLOWS


@dataclass
class Place:
    """Plain memory in the place of a GPU's: numpy does not see it, but through `array`."""

    array: np.ndarray

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def shape(self) -> tuple:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype


class PlainRuntime:
    """Runs in order and at once, and counts."""

    stream = 0

    def __init__(self) -> None:
        self.allocated = self.copied = self.launches = 0

    def empty(self, shape, dtype) -> Place:
        self.allocated += 1
        return Place(np.full(shape, 0x5A, dtype))

    def pinned(self, shape, dtype) -> np.ndarray:
        return np.full(shape, 0x5A, dtype)

    def upload(self, array) -> Place:
        return Place(array.copy())

    def copy(self, to, of) -> None:
        assert isinstance(to, Place) != isinstance(of, Place)
        (to.array if isinstance(to, Place) else to)[...] = of.array if isinstance(of, Place) else of
        self.copied += 1

    def synchronise(self) -> None:
        pass

    def capture(self, calls):
        def launch() -> None:
            self.launches += 1
            for call in calls:
                call()

        return launch


class OnPlaces:
    def __init__(self, engine: OpenVinoEngine) -> None:
        self.engine = engine

    def bind(self, inputs, outputs):
        return self.engine.bind(*({name: place.array for name, place in each.items()} for each in (inputs, outputs)))


class Both(ctypes.CDLL):
    """The op library with the executor's CUDA functions: what a library built with nvcc offers by itself."""

    def __init__(self, host: ctypes.CDLL, cuda: ctypes.CDLL) -> None:
        self.host, self.cuda = host, cuda

    def __getattr__(self, name):
        return getattr(self.cuda if name.endswith("_cuda") else self.host, name)


@pytest.mark.slow
@pytest.mark.parametrize("flow", list(FLOWS))
def test_the_gpus_plan_answers_as_the_hosts(flow, artefacts, radiograph):
    if reason := simt.missing_tools():
        pytest.skip(reason)
    manifest, outputs, host = read_manifest(artefacts), FLOWS[flow].outputs, load_library()
    engines = {name: OpenVinoEngine(artefacts / name / "model.xml", "f32", 1) for name in encoders(flow)}
    runtime, library = PlainRuntime(), Both(host, simt.load_library())
    reference = HostPlan(flow, manifest, outputs, 2, Ops(host), engines)
    on_places = {name: OnPlaces(engine) for name, engine in engines.items()}
    plan = CudaPlan(flow, manifest, outputs, 2, library, on_places, runtime)
    allocated = runtime.allocated
    for seeds in ((1, 2), (3, 4)):
        decoded = [decode(radiograph(seed), 160) for seed in seeds]
        for row, (image, size) in enumerate(decoded):
            for each in (reference, plan):
                each.arrays["image"][row], each.arrays["original_size"][row] = image, size
        reference()
        plan()
        for name in outputs:
            np.testing.assert_array_equal(plan.arrays[name], reference.arrays[name], err_msg=name)
    assert (runtime.launches, runtime.allocated) == (2, allocated)
    assert "object_image" not in plan.arrays  # pixels stay where they are made
    assert "key_image" not in plan.arrays


def test_engines_are_built_for_every_batch_that_a_flow_forms():
    assert min(BATCHES) == 1
    assert max(BATCHES) >= BATCH


def test_only_results_are_reckoned_on_the_host():
    for flow in FLOWS.values():
        on_host = {step.stage.name for step in flow.steps if reckons(flow, step)}
        assert on_host == {name for name in flow.stages if name.endswith("result")}
        made = {name for step in flow.steps if step.stage.name in on_host for name in step.outputs.values()}
        assert made == set(flow.outputs)


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so():
    with pytest.raises(OpError, match="CUDA"):
        CudaRuntime()


def test_the_calls_of_tensorrt_exist():
    """TensorRT for RTX has the interface of TensorRT 11 and installs without a GPU."""
    tensorrt = pytest.importorskip("tensorrt_rtx")
    for kind, names in {
        tensorrt.Runtime: ("deserialize_cuda_engine",),
        tensorrt.ICudaEngine: ("create_execution_context", "get_tensor_name", "num_io_tensors"),
        tensorrt.IExecutionContext: ("set_input_shape", "set_tensor_address", "execute_async_v3"),
    }.items():
        for name in names:
            assert hasattr(kind, name)
