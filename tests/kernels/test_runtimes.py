"""The ops under opcheck, TorchScript, torch.export and torch.compile, and in a process without this package."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from scaphoid.kernels import library
from scaphoid.kernels.activation_maps import activation_maps
from scaphoid.kernels.crop_resize import crop_resize
from scaphoid.kernels.key_area_box import key_area_box
from scaphoid.kernels.map_boxes import map_boxes
from scaphoid.kernels.object_box import object_box
from scaphoid.kernels.part_windows import part_windows
from scaphoid.kernels.suppress_artifacts import suppress_artifacts

# Glue stages ship as TorchScript although torch discourages it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


class EveryOp(nn.Module):
    """Uses each wrapper once, as stages do."""

    def __init__(self) -> None:
        super().__init__()
        self.width_weight, self.width_bias = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(1))
        self.height_weight, self.height_bias = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(1))
        self.class_weight = nn.Parameter(torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.5, 1.0]]))

    def forward(self, image: Tensor, activation: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        height, width = image.shape[2], image.shape[3]
        image = suppress_artifacts(image, activation, 0.6, 0.15)
        features = torch.stack((activation, activation.flip(1), activation.flip(2)), 1)
        channel_sum, class_activation = activation_maps(features, self.class_weight)
        box, margin = object_box(channel_sum, class_activation, height, width)
        crops = crop_resize(image, box[:, None], 31)
        windows, scores, _ = part_windows(activation, height, width, [2, 3, 3, 2], [2], [3], 0.25)
        key, _ = key_area_box(
            activation, self.width_weight, self.width_bias, self.height_weight, self.height_bias, height, width
        )
        mapped = map_boxes(windows, scores, 0.5, box, height, width, sizes)
        return crops, mapped, key.detach(), margin


def example(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 1, 53, 47), dtype=torch.uint8, generator=generator)
    return image, torch.rand(batch, 6, 7, generator=generator), torch.full((batch, 2), 100, dtype=torch.int32)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=0, atol=0)


def samples() -> list:
    image, activation, sizes = example()
    boxes = torch.tensor([[[1.3, 2.1, 30.2, 40.7], [-5.0, 3.0, 60.0, 20.0]]] * 2)
    layers = [torch.rand(n, requires_grad=True) for n in (7, 1, 6, 1)]
    floats, grad = image.float().requires_grad_(), torch.rand(2, 2, 1, 9, 9)
    ops = torch.ops.scaphoid
    features, class_weight = torch.rand(2, 5, 6, 7, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    halves = torch.rand(2, 5, 6, 7).to(torch.bfloat16, memory_format=torch.channels_last)
    calls = [
        (ops.activation_maps, (features, class_weight)),
        (ops.activation_maps, (halves, class_weight)),
        (ops.object_box, (activation, activation, 53, 47)),
        (ops.key_area_box, (activation, *layers, 53, 47)),
        (ops.part_windows, (activation, 53, 47, [2, 3, 3, 2], [2], [3], 0.25)),
        (ops.crop_resize, (image, boxes, 9)),
        (ops.crop_resize, (floats, boxes.clone().requires_grad_(), 9)),
        (ops.crop_resize_backward, (grad, image.float(), boxes)),
        (ops.suppress_artifacts, (image, activation, 0.6, 0.15)),
        (ops.map_boxes, (boxes, torch.rand(2, 2), 0.5, boxes[:, 0], 53, 47, sizes)),
    ]
    return [pytest.param(op.default, arguments, id=op.__name__) for op, arguments in calls]


@pytest.mark.parametrize(("op", "arguments"), samples())
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


def test_library_uses_the_stable_abi_alone():
    audit = pytest.importorskip("torch_abi_audit.cli", reason="torch-abi-audit is not installed")
    assert audit.main(["--check", "torch", str(library.path())]) == 0


def test_torchscript(tmp_path):
    module, inputs = EveryOp().eval(), example()
    script = torch.jit.script(module)
    same(script(*inputs), module(*inputs))
    script.save(str(tmp_path / "ops.pt"))
    same(torch.jit.load(str(tmp_path / "ops.pt"))(*example(3)), module(*example(3)))


def test_torchscript_in_a_process_without_the_package(tmp_path):
    module, inputs = EveryOp().eval(), example()
    torch.jit.script(module).save(str(tmp_path / "ops.pt"))
    torch.save(inputs, tmp_path / "inputs.pt")
    program = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "outputs = torch.jit.load('ops.pt')(*torch.load('inputs.pt'))\n"
        "assert not any(name.startswith('scaphoid') for name in sys.modules)\n"
        "torch.save(outputs, 'outputs.pt')\n"
    )
    command = [sys.executable, "-c", program, str(library.path())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    same(torch.load(tmp_path / "outputs.pt"), module(*inputs))


def test_export_with_any_batch():
    module, inputs = EveryOp().eval(), example()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.scaphoid.part_windows.default in targets
    same(program.module()(*example(5)), module(*example(5)))


def test_compile_in_one_graph_with_gradient():
    def loss(image: Tensor, boxes: Tensor) -> Tensor:
        return crop_resize(image, boxes, 9).square().mean()

    boxes = torch.tensor([[[1.3, 2.1, 30.2, 40.7]]] * 2)
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = boxes.clone().requires_grad_()
        run(example()[0].float(), leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_errors_reach_torchscript():
    with pytest.raises(RuntimeError, match=r"height must be at least 1; got 0"):
        torch.jit.script(object_box)(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 0, 4)


def test_a_missing_library_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(ImportError, match=r"libscaphoid_ops.so is missing from .*pip install"):
        library.path()
