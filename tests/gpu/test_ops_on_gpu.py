"""What only a GPU shows: streams, graphs, a second device, no waiting for the host, no hidden memory. That each op
computes there what it computes on the CPU is the business of its own tests, which run on every device there is."""

import pytest
import torch
from torch import Tensor

from scaphoid.kernels import library

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU on this machine", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*sync_debug_mode")]
OPS = torch.ops.scaphoid
NAMES = [
    "activation_maps",
    "object_box",
    "key_area_box",
    "part_windows",
    "crop_resize",
    "crop_resize_float",
    "crop_resize_backward",
    "crop_resize_backward_deterministic",
    "suppress_artifacts",
    "map_boxes",
]


def call(name: str, batch: int = 3, seed: int = 0, device: str = "cuda"):
    """An op and inputs for it, the same for every device: sizes off tile boundaries."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    image = torch.randint(0, 256, (batch, 1, 53, 47), dtype=torch.uint8, generator=generator).to(device)
    boxes = (rand(batch, 2, 2, 2).sort(dim=2).values * 60 - 5).reshape(batch, 2, 4)
    sizes = torch.full((batch, 2), 100, dtype=torch.int32).to(device)
    maps = rand(batch, 13, 11)
    return {
        "activation_maps": lambda: (OPS.activation_maps, (rand(batch, 37, 13, 11), rand(2, 37))),
        "object_box": lambda: (OPS.object_box, (maps, rand(batch, 13, 11), 53, 47)),
        "key_area_box": lambda: (OPS.key_area_box, (maps, rand(11), rand(1), rand(13), rand(1), 53, 47)),
        "part_windows": lambda: (OPS.part_windows, (maps, 53, 47, [2, 3, 3, 2, 5, 4], [2, 1], [3, 2], 0.25)),
        "crop_resize": lambda: (OPS.crop_resize, (image, boxes, 29)),
        "crop_resize_float": lambda: (OPS.crop_resize, (rand(batch, 3, 53, 47), boxes, 29)),
        "crop_resize_backward": lambda: (OPS.crop_resize_backward, (rand(batch, 2, 1, 9, 9), image.float(), boxes)),
        "crop_resize_backward_deterministic": lambda: (
            OPS.crop_resize_backward,
            (rand(batch, 2, 1, 9, 9), image.float(), boxes, True),
        ),
        "suppress_artifacts": lambda: (OPS.suppress_artifacts, (image, maps, 0.6, 0.15)),
        "map_boxes": lambda: (OPS.map_boxes, (boxes, rand(batch, 2), 0.5, boxes[:, 0], 53, 47, sizes)),
    }[name]()


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def on_cpu(name: str, **how) -> tuple[Tensor, ...]:
    op, arguments = call(name, device="cpu", **how)
    return tensors(op(*arguments))


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(tuple(tensor.cpu() for tensor in ours), expected)


def test_the_library_has_code_for_this_gpu():
    major, minor = torch.cuda.get_device_capability()
    code = library.cuda_architectures()
    assert code, "the op library was built without CUDA: rebuild it with SCAPHOID_CUDA=1"
    newest = int(code[-1].removeprefix("compute_"))
    assert f"sm_{major}{minor}" in code or major * 10 + minor > newest or f"sm_{major}0" in code, code


def test_every_op_is_here():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ops = {name.removeprefix("scaphoid::") for name in registered if name.startswith("scaphoid::")}
    assert ops == set(NAMES) - {"crop_resize_float", "crop_resize_backward_deterministic"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [0, 1, 3, 70_001])  # the last is more than a grid's y and z hold
def test_like_the_cpu(name, batch):
    op, arguments = call(name, batch)
    same(tensors(op(*arguments)), on_cpu(name, batch=batch))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name):
    if name == "crop_resize_backward":
        pytest.skip("adds in any order; its deterministic variant is tested")
    op, arguments = call(name, 257)
    first = tensors(op(*arguments))
    for _ in range(5):
        for ours, again in zip(first, tensors(op(*arguments)), strict=True):
            assert torch.equal(ours, again)


@pytest.mark.parametrize("name", NAMES)
def test_never_waits_for_the_host(name):
    op, arguments = call(name)
    op(*arguments)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name):
    op, arguments = call(name)
    expected = on_cpu(name)
    inputs = [a for a in arguments if isinstance(a, Tensor)]
    copies = [a.clone() for a in inputs]
    for argument in inputs:
        argument.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an op on another stream would find zeros
        for argument, copy in zip(inputs, copies, strict=True):
            argument.copy_(copy)
        ours = tensors(op(*arguments))
    stream.synchronize()
    same(ours, expected)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(name):
    op, arguments = call(name, seed=1)
    op(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = tensors(op(*arguments))
    for seed in (2, 3):
        _, others = call(name, seed=seed)
        for argument, other in zip(arguments, others, strict=True):
            if isinstance(argument, Tensor):
                argument.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        same(ours, on_cpu(name, seed=seed))


@pytest.mark.parametrize("name", NAMES)
def test_on_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU; this needs two")
    op, arguments = call(name, device="cuda:1")
    with torch.cuda.device(0):
        ours = tensors(op(*arguments))
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in ours)
    same(ours, on_cpu(name))


@pytest.mark.parametrize("name", NAMES)
def test_takes_no_memory_but_its_outputs_and_leaves_none_behind(name):
    op, arguments = call(name, 64)
    op(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = tensors(op(*arguments))
    outputs = sum(-(-tensor.nbytes // 512) * 512 for tensor in kept)
    # The backward alone has a workspace: 32 bytes for every 16 rows of a crop.
    workspace = 64 * 2 * 32 if name.startswith("crop_resize_backward") else 0
    assert torch.cuda.max_memory_allocated() - before <= outputs + workspace
    del kept
    assert torch.cuda.memory_allocated() == before


def test_maps_too_large_for_a_block_are_refused():
    with pytest.raises(RuntimeError, match=r"object_box: activation must have at most .* on CUDA; got float32"):
        OPS.object_box(torch.zeros(1, 300, 4).cuda(), torch.zeros(1, 300, 4).cuda(), 10, 10)


def test_tensors_of_two_devices_are_refused():
    op, (activation, class_activation, *rest) = call("object_box")
    with pytest.raises(RuntimeError, match=r"class_activation must be on the device of the first argument"):
        op(activation, class_activation.cpu(), *rest)
