"""The glue stages over the C interface against those of trainer/stages: boxes and pixels to the bit."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scaphoid.export.edge.glue import GLUE  # noqa: E402
from scaphoid.export.edge.ops import DTYPES, OpError, Ops, load_library  # noqa: E402
from scaphoid.export.edge.settings import settings  # noqa: E402
from scaphoid.trainer.contracts import STAGES, WINDOWS  # noqa: E402
from scaphoid.trainer.stages.key_area_crop import KeyAreaCrop  # noqa: E402
from scaphoid.trainer.stages.object_crop import ObjectCrop  # noqa: E402
from scaphoid.trainer.stages.part_crops import PartCrops  # noqa: E402
from scaphoid.trainer.stages.result import KeyAreaResult, MainResult, PartsResult, Result  # noqa: E402
from scaphoid.trainer.stages.suppress import Suppress  # noqa: E402

SIDE, MAP, BATCH = 75, (5, 7), 3
MODULES = {
    "suppress": Suppress(),
    "object_crop": ObjectCrop(),
    "part_crops": PartCrops(MAP, 33),
    "key_area_crop": KeyAreaCrop(MAP, 31),
    "main_result": MainResult(),
    "result": Result(SIDE),
    "parts_result": PartsResult(),
    "key_area_result": KeyAreaResult(SIDE),
}
SIZES = {"height": SIDE, "width": SIDE, "map_height": MAP[0], "map_width": MAP[1]}


def drawn(tensor, rng: np.random.Generator) -> np.ndarray:
    """A batch of a contract's tensor; the second image's floats are degenerate: not finite, or boxes of no size."""
    shape = (BATCH, *(SIZES.get(dim, dim) for dim in tensor.dims))
    if tensor.dtype == "UINT8":
        return rng.integers(0, 256, shape, np.uint8)
    if tensor.dtype == "INT32":
        return rng.integers(40, 3000, shape, np.int32)
    values = rng.integers(-9, 9, shape).astype(np.float32)
    if tensor.name.endswith("box") or tensor.name.endswith("boxes"):
        values = np.sort(rng.uniform(0, SIDE, (*shape[:-1], 2, 2)), axis=-2).reshape(shape).astype(np.float32)
        values[1, ..., 2:] = values[1, ..., :2]
    elif "activation" in tensor.name or tensor.name == "part_scores":
        values[1, ..., 1] = np.nan
    elif "logits" in tensor.name:
        values[1, ..., 0] = 200
    return values


def test_every_glue_stage_is_there():
    assert set(GLUE) == set(MODULES) == {name for name, stage in STAGES.items() if stage.kind == "glue"}


@pytest.mark.parametrize("name", MODULES)
def test_glue_as_torch_has_it(name):
    stage, module, rng = STAGES[name], MODULES[name].eval(), np.random.default_rng(5)
    inputs = [drawn(tensor, rng) for tensor in stage.inputs]
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
        expected = module(*map(torch.from_numpy, inputs))
    expected = [tensor.numpy() for tensor in (expected if isinstance(expected, tuple) else (expected,))]
    outputs = [np.empty(each.shape, DTYPES[tensor.dtype]) for tensor, each in zip(stage.outputs, expected, strict=True)]
    calls = GLUE[name](Ops(load_library()), settings(module), *inputs, *outputs)
    for _ in range(2):  # the same arrays are filled again
        for output in outputs:
            output[...] = 77
        for call in calls:
            call()
        for tensor, found, wanted in zip(stage.outputs, outputs, expected, strict=True):
            tolerance = 1e-6 if tensor.name.find("probability") >= 0 else 0
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=tensor.name)


def test_a_bound_stage_reads_what_its_arrays_hold_when_it_is_called():
    logits, probability = np.zeros((1, 2), np.float32), np.empty((1, 1), np.float32)
    (call,) = GLUE["main_result"](None, {}, logits, probability)
    for normal, wanted in ((0, 0.5), (200, 0), (-200, 1)):
        logits[0, 0] = normal
        call()
        assert probability.item() == wanted


def test_settings_come_back_from_json_to_the_bit():
    import json

    module = KeyAreaCrop(MAP, 31, initial_size=0.3)
    kept = json.loads(json.dumps(settings(module)))
    assert kept["key_size"] == 31
    np.testing.assert_array_equal(np.float32(kept["width_bias"]), module.width_bias.detach().numpy())
    assert sum(settings(MODULES["part_crops"])["kept"]) == WINDOWS


def test_a_library_without_cuda_or_missing_says_what_to_do(tmp_path):
    with pytest.raises(OpError, match="make edge"):
        load_library(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(OpError, match="cannot be loaded"):
        load_library(tmp_path / "text.so")
