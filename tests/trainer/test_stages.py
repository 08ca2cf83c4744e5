"""The glue stages on cases small enough to compute by hand, and as TorchScript in a process without this package."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from scaphoid.kernels import library
from scaphoid.trainer.contracts import STAGES, WINDOWS
from scaphoid.trainer.stages.key_area_crop import KeyAreaCrop
from scaphoid.trainer.stages.object_crop import ObjectCrop
from scaphoid.trainer.stages.part_crops import KEPT, PartCrops, window_groups
from scaphoid.trainer.stages.result import KeyAreaResult, MainResult, PartsResult, Result
from scaphoid.trainer.stages.suppress import Suppress

# Glue stages ship as TorchScript although torch discourages it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

THIRD = math.log(0.5)  # logits (0, log 1/2): probability of abnormal 1/3


def radiographs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def patch(rows: slice, columns: slice, side: int = 4) -> Tensor:
    """A map of zeros, [1, side, side], with ones in the patch."""
    cells = torch.zeros(1, side, side)
    cells[:, rows, columns] = 1
    return cells


# -- suppress


def test_suppress_dims_the_hot_cells_to_r():
    image = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    activation = torch.ones(1, 2, 2)  # constant: every pixel reaches theta * max
    assert (Suppress(0.6, 0.15)(image, activation) == 30).all()
    activation[0, :, 1] = 0.0  # the right half is cold at its outer pixels, hot in the left half
    dimmed = Suppress(0.6, 0.15)(image, activation)[0, 0]
    assert (dimmed[:, :2] == 30).all()
    assert (dimmed[:, -2:] == 200).all()
    assert dimmed.dtype == torch.uint8


# -- object_crop


def test_object_crop_is_the_crop_of_the_box_that_both_maps_agree_on():
    image = radiographs(1, 1, 8, 8)
    box, crop, margin = ObjectCrop()(image, patch(slice(1, 4), slice(0, 2)), patch(slice(0, 3), slice(0, 4)))
    assert box.tolist() == [[0.0, 2.0, 4.0, 6.0]]  # rows 1..2, columns 0..1 of cells of two pixels
    assert margin.shape == (1, 1)
    assert margin.item() == pytest.approx(1 / 4)  # means 6/16 and 12/16, maximum 1
    # A crop enlarged twofold: outputs 2k - 1 and 2k mix pixels k - 1 and k as 3 : 1 and 1 : 3, the border repeats.
    cut = image[0, 0, 2:6, 0:4].double()
    one, other = image[0, 0, 3, 1].double(), image[0, 0, 3, 2].double()
    below, beside = image[0, 0, 4, 1].double(), image[0, 0, 4, 2].double()
    wanted = (9 * one + 3 * other + 3 * below + beside) / 16
    assert crop.shape == (1, 1, 8, 8)
    assert crop[0, 0, 3, 3].item() == wanted.round().item()  # reads row 2 + 1.25, column 1.25
    assert crop.double().mean().item() == pytest.approx(cut.mean().item(), abs=25)


def test_object_crop_without_agreement_is_the_image_itself():
    image = radiographs(2, 1, 12, 12)
    left, right = patch(slice(0, 4), slice(0, 2)), patch(slice(0, 4), slice(2, 4))
    box, crop, _ = ObjectCrop()(image, torch.cat((left, left)), torch.cat((right, right)))
    assert box.tolist() == [[0.0, 0.0, 12.0, 12.0]] * 2
    assert torch.equal(crop, image)


def test_no_gradient_through_the_object_box():
    image = radiographs(1, 1, 8, 8).float().requires_grad_()
    maps = [torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    box, crop, margin = ObjectCrop()(image, *maps)
    assert not box.requires_grad
    assert not margin.requires_grad
    crop.sum().backward()
    assert image.grad.abs().sum() > 0
    assert [one.grad for one in maps] == [None, None]


# -- part_crops


def test_window_groups_of_the_paper():
    assert window_groups(14, 14) == [[(6, 6), (7, 5)], [(8, 8), (6, 10), (7, 9)], [(10, 10), (9, 11), (8, 12)]]
    assert KEPT == (2, 2, 3)
    assert sum(KEPT) == WINDOWS == 7


def test_window_groups_of_coarser_and_oblong_maps():
    # Halves, rounded half to even: 3.5 -> 4, 2.5 -> 2, 4.5 -> 4, 5.5 -> 6; what becomes the same counts once.
    assert window_groups(7, 7) == [[(3, 3), (4, 2)], [(4, 4), (3, 5)], [(5, 5), (4, 6)]]
    assert window_groups(28, 7) == [[(12, 3), (14, 2)], [(16, 4), (12, 5), (14, 4)], [(20, 5), (18, 6), (16, 6)]]
    assert window_groups(1, 1) == [[(1, 1)]] * 3


def test_part_crops_keep_two_two_and_three():
    """One bright blob in a corner: each group's first window covers it; the boxes are cut from the object image."""
    activation = torch.rand(2, 14, 14, generator=torch.Generator().manual_seed(0)) * 0.01
    activation[:, 2:8, 1:7] += 1
    image = radiographs(2, 1, 56, 56)
    boxes, scores, crops, margin = PartCrops((14, 14), 24)(image, activation)
    assert boxes.shape == (2, 7, 4)
    assert crops.shape == (2, 7, 1, 24, 24)
    assert margin.shape == (2, 1)
    assert boxes[0, 0].tolist() == [4.0, 8.0, 28.0, 32.0]  # the 6 x 6 blob, cells of 4 pixels
    assert scores[0, 0].item() == pytest.approx(activation[0, 2:8, 1:7].mean().item())
    sides = ((boxes[0, :, 2:] - boxes[0, :, :2]) / 4).tolist()  # width, height in cells
    groups = [{(w, h) for h, w in group} for group in window_groups(14, 14)]
    assert [tuple(side) in groups[group] for side, group in zip(sides, (0, 0, 1, 1, 2, 2, 2), strict=True)] == [
        True
    ] * 7
    for start, end in ((0, 2), (2, 4), (4, 7)):
        assert scores[0, start:end].tolist() == sorted(scores[0, start:end].tolist(), reverse=True)
    x0, y0, x1, y1 = boxes[1, 0].int().tolist()
    assert torch.equal(crops[1, 0, 0], image[1, 0, y0:y1, x0:x1])  # 24 pixels to 24


def test_the_last_window_repeats_when_fewer_survive():
    boxes, scores, _, _ = PartCrops((1, 1), 5)(radiographs(1, 1, 9, 9), torch.ones(1, 1, 1))
    assert boxes.tolist() == [[[0.0, 0.0, 9.0, 9.0]] * 7]
    assert scores.tolist() == [[1.0] * 7]


# -- key_area_crop


def peak(row: int, column: int, side: int = 4) -> Tensor:
    return patch(slice(row, row + 1), slice(column, column + 1), side)


def test_key_area_starts_at_its_initial_size():
    stage = KeyAreaCrop((4, 4), 8, initial_size=0.25)
    image = radiographs(1, 1, 16, 16)
    box, crop, margin = stage(image, peak(1, 2))
    # Centre of cell (1, 2): x = 10, y = 6 of 16; half extents 0.25 * 8 pixels.
    torch.testing.assert_close(box, torch.tensor([[8.0, 4.0, 12.0, 8.0]]))
    assert crop.shape == (1, 1, 8, 8)
    assert crop[0, 0, 0, 0].item() == pytest.approx(image[0, 0, 4, 8].item(), abs=100)
    assert margin.tolist() == [[0.25]]  # one peak among the four cells of each sum
    moved, _, _ = stage(image, peak(3, 0))  # centred in a corner cell: (2, 14), moved inside it stays
    torch.testing.assert_close(moved, torch.tensor([[0.0, 12.0, 4.0, 16.0]]))


def test_gradient_reaches_the_four_size_parameters_through_a_float_crop():
    stage = KeyAreaCrop((4, 4), 7, initial_size=0.37)
    ramp = torch.arange(16.0)
    image = (3 * ramp + 5 * ramp[:, None]).expand(2, 1, 16, 16)  # the crop is linear in the box
    activation = torch.cat((peak(1, 2), peak(3, 0)))
    _, crop, _ = stage(image, activation)
    weighting = torch.rand(crop.shape, generator=torch.Generator().manual_seed(3))
    (crop * weighting).sum().backward()
    parameters = dict(stage.named_parameters())
    assert set(parameters) == {"width_weight", "width_bias", "height_weight", "height_bias"}
    for name, parameter in parameters.items():
        assert parameter.grad.abs().sum() > 0, name
    step = 1e-2
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            stage.width_bias += sign * step
            sums.append((stage(image, activation)[1].double() * weighting).sum().item())
            stage.width_bias -= sign * step
    assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(stage.width_bias.grad.item(), rel=0.01)


def test_a_uint8_key_area_is_the_float_one_rounded():
    stage, image = KeyAreaCrop((4, 4), 8, 0.3), radiographs(1, 1, 19, 19)
    assert torch.equal(stage(image, peak(1, 2))[1].float(), stage(image.float(), peak(1, 2))[1].detach().round())


# -- results


def test_main_and_parts_result():
    third, half = torch.tensor([[0.0, THIRD]]), torch.zeros(1, 2)
    torch.testing.assert_close(MainResult()(third), torch.tensor([[1 / 3]]))
    parts = torch.zeros(1, 7, 2)
    parts[0, 0, 1] = THIRD
    mean = (1 / 3 + 6 / 2) / 7
    parts_probability, with_parts = PartsResult()(third, half, parts)
    torch.testing.assert_close(parts_probability, torch.tensor([[mean]]))
    torch.testing.assert_close(with_parts, torch.tensor([[(1 / 3 + 1 / 2 + mean) / 3]]))


def msfm_case() -> tuple[Tensor, ...]:
    """Image of 100 x 100, object box its right lower quarter, original 300 high and 200 wide; windows 2 and 6 of seven
    score best (1/2 and 1/4 of the weight before the share of the sum, 127/128)."""
    windows = torch.zeros(1, 7, 4)
    windows[0, :] = torch.tensor([0.0, 0.0, 100.0, 100.0])
    windows[0, 2] = torch.tensor([20.0, 40.0, 60.0, 80.0])
    windows[0, 6] = torch.tensor([0.0, 0.0, 50.0, 50.0])
    scores = torch.tensor([[0.5, 0.4, 0.9, 0.3, 0.2, 0.1, 0.8]])
    object_box, original = torch.tensor([[50.0, 50.0, 100.0, 100.0]]), torch.tensor([[300, 200]], dtype=torch.int32)
    main, objects = torch.tensor([[0.0, THIRD]]), torch.zeros(1, 2)
    return main, objects, object_box, torch.tensor([[0.2]]), windows, scores, torch.tensor([[0.1]]), original


def test_result_maps_boxes_to_the_original():
    probability, object_probability, box, main_box, window_boxes, scores, margin = Result(100)(*msfm_case())
    torch.testing.assert_close(probability, torch.tensor([[(1 / 3 + 1 / 2) / 2]]))
    torch.testing.assert_close(object_probability, torch.tensor([[0.5]]))
    torch.testing.assert_close(main_box, torch.tensor([[100.0, 150.0, 200.0, 300.0]]))
    # Object pixels halve, then x doubles and y triples: (x, y) -> (100 + x, 150 + 1.5 y).
    torch.testing.assert_close(window_boxes[0, 2], torch.tensor([120.0, 210.0, 160.0, 270.0]))
    torch.testing.assert_close(window_boxes[0, 6], torch.tensor([100.0, 150.0, 150.0, 225.0]))
    torch.testing.assert_close(window_boxes[0, 0], torch.tensor([100.0, 150.0, 200.0, 300.0]))
    best, second, rest = 64 / 127, 32 / 127, 31 / 127
    x0, y0 = best * 20, best * 40
    x1, y1 = best * 60 + second * 50 + rest * 100, best * 80 + second * 50 + rest * 100
    torch.testing.assert_close(box, torch.tensor([[100 + x0, 150 + 1.5 * y0, 100 + x1, 150 + 1.5 * y1]]))
    assert torch.equal(scores, msfm_case()[5])
    assert margin.tolist() == [[pytest.approx(0.1)]]


def test_result_keeps_images_apart():
    """Two images at once give what each gives alone."""
    other = list(msfm_case())
    other[2], other[7] = torch.tensor([[0.0, 10.0, 40.0, 90.0]]), torch.tensor([[77, 500]], dtype=torch.int32)
    both = Result(100)(*(torch.cat(pair) for pair in zip(msfm_case(), other, strict=True)))
    for row, case in enumerate((msfm_case(), other)):
        for together, alone in zip(both, Result(100)(*case), strict=True):
            assert torch.equal(together[row : row + 1], alone)


def test_key_area_result():
    third, half = torch.tensor([[0.0, THIRD]]), torch.zeros(1, 2)
    box, original = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[50, 400]], dtype=torch.int32)
    fused, of_global, of_local, mapped, margin = KeyAreaResult(100)(third, half, box, torch.tensor([[0.3]]), original)
    torch.testing.assert_close(fused, torch.tensor([[5 / 12]]))
    torch.testing.assert_close(of_global, torch.tensor([[1 / 3]]))
    torch.testing.assert_close(of_local, torch.tensor([[1 / 2]]))
    torch.testing.assert_close(mapped, torch.tensor([[40.0, 10.0, 120.0, 30.0]]))
    assert margin.tolist() == [[pytest.approx(0.3)]]


# -- TorchScript


def every_stage() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    image = radiographs(2, 1, 53, 53)
    activation, class_activation = torch.rand(2, 2, 6, 6, generator=generator)
    logits = [torch.randn(2, 2, generator=generator) for _ in range(2)]
    result = tuple(torch.cat((tensor, tensor)) for tensor in msfm_case())
    return {
        "suppress": (Suppress(), (image, activation)),
        "object_crop": (ObjectCrop(), (image, activation, class_activation)),
        "part_crops": (PartCrops((6, 6), 17), (image, activation)),
        "main_result": (MainResult(), (logits[0],)),
        "result": (Result(100), result),
        "parts_result": (PartsResult(), (*logits, torch.randn(2, 7, 2, generator=generator))),
        "key_area_crop": (KeyAreaCrop((6, 6), 17), (image, activation)),
        "key_area_result": (KeyAreaResult(100), (*logits, result[2], result[3], result[7])),
    }


SERVE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for path in sys.argv[2:]:
    inputs, wanted = torch.load(path + ".tensors")
    with torch.no_grad():
        got = torch.jit.load(path)(*inputs)
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == len(wanted) and all(map(torch.equal, got, wanted)), path
assert not [name for name in sys.modules if name.startswith("scaphoid")]
"""


@pytest.mark.slow
def test_every_glue_stage_as_torchscript_in_a_process_without_this_package(tmp_path):
    stages = every_stage()
    assert set(stages) == {stage.name for stage in STAGES.values() if stage.kind == "glue"}
    for name, (stage, inputs) in stages.items():
        with torch.no_grad():
            outputs = stage(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        contract = STAGES[name]
        for tensor, output in zip(contract.outputs, outputs, strict=True):
            assert output.ndim == 1 + len(tensor.dims), (name, tensor.name)
            assert output.dtype == {"FP32": torch.float32, "UINT8": torch.uint8}[tensor.dtype]
        torch.jit.script(stage.eval()).save(str(tmp_path / name))
        torch.save((inputs, outputs), tmp_path / f"{name}.tensors")
    command = [sys.executable, "-c", SERVE, str(library.path()), *(str(tmp_path / name) for name in stages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_forward_arguments_are_called_as_the_contract_calls_them():
    """The server's PyTorch backend binds inputs by the forward arguments' names, then by order."""
    for name, (stage, _) in every_stage().items():
        arguments = [argument.name for argument in torch.jit.script(stage).forward.schema.arguments[1:]]
        assert arguments == [tensor.name for tensor in STAGES[name].inputs], name
