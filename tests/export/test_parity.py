import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scaphoid.kernels.library")

from scaphoid.export import parity as command  # noqa: E402
from scaphoid.export.flow_parity import Parity  # noqa: E402
from scaphoid.export.format_parity import Engine, Errors, OutputError, errors_of  # noqa: E402
from scaphoid.export.gate import report_of  # noqa: E402
from scaphoid.export.gate_images import GateImages  # noqa: E402
from scaphoid.export.tolerances import DECIDING_PIXELS, EXACT, TOLERANCES, at_most, precision_of  # noqa: E402
from scaphoid.trainer.contracts import ACTIVATION, STAGES  # noqa: E402
from scaphoid.trainer.data.index import Radiograph  # noqa: E402
from scaphoid.trainer.flows import FLOWS  # noqa: E402

KALM = FLOWS["kalm"]
BOX = np.float32([10, 20, 30, 50])
MAP_ERROR = 1e-3


def answers(images: int) -> dict[str, np.ndarray]:
    """Probabilities over the whole range, far from the threshold; boxes all the same; margins far above MAP_ERROR."""
    probability = np.linspace(0.05, 0.95, images, dtype=np.float32).reshape(-1, 1)
    values = {name: probability.copy() for name in KALM.outputs}
    return values | {"box": np.tile(BOX, (images, 1)), "margin": np.full((images, 1), 0.5, np.float32)}


def parity(images: int, precision: str, change=lambda expected, found: None, **more) -> Parity:
    expected, found = answers(images), answers(images)
    change(expected, found)
    return Parity(KALM, "openvino", precision, expected, found, MAP_ERROR, **more)


def radiographs(images: int) -> tuple[Radiograph, ...]:
    """The later half abnormal, so that `answers` rank them perfectly; two images a patient."""
    return tuple(
        Radiograph("", str(n // 2), "", "", "", int(n >= images // 2), (tuple(BOX),) if n % 2 else None, 60, 60, "")
        if n >= images // 2
        else Radiograph("", str(n // 2), "", "", "", 0, None, 60, 60, "")
        for n in range(images)
    )


def move(numbers, pixels: float, probability: float, margin: float):
    def change(expected, found):
        found["box"][numbers] += np.float32(pixels)
        found["local_probability"][numbers] += np.float32(probability)
        expected["margin"][numbers] = margin

    return change


def test_equal_answers_pass_in_every_precision():
    for precision in TOLERANCES:
        found = parity(120, precision, radiographs=radiographs(120))
        assert found.failures == []
        assert found.scores["auroc"][:2] == (1, 1)
        assert found.scores["centre_hit"][:2] == (1, 1)
        assert found.scores["kappa"][2].value == 0


def test_full_precision_allows_few_images_and_each_needs_its_margin():
    few, sure = move([3], 20, 0.3, MAP_ERROR / 2), move([3], 20, 0.3, 2 * MAP_ERROR)
    assert parity(200, "f32", few).failures == []
    assert parity(200, "f32", few).summary()["images_beyond"][0]["image"] == "image 3"
    (line,) = parity(200, "f32", sure).failures
    assert "image 3: probability differs by 0.3" in line
    places = [f"radiograph {number + 1}" for number in range(200)]
    (line,) = parity(200, "f32", sure, places=places).failures
    assert ": radiograph 4: probability differs by 0.3" in line
    assert any("2 of 200" in line for line in parity(200, "f32", move([3, 4], 20, 0.3, 0)).failures)
    assert any("2 of 32" in line for line in parity(32, "f32", move([3, 4], 0, 0.002, 0)).failures)


def test_reduced_precision_is_judged_by_its_share_boxes_and_scores():
    assert parity(100, "bf16", move(range(5), 1, 0.3, 0.5)).failures == []
    assert any("6 of 100" in line for line in parity(100, "bf16", move(range(6), 1, 0.3, 0.5)).failures)
    assert parity(100, "int8", move(range(100), 0.2, 0.3, 0.5)).failures == []
    assert any("median" in line for line in parity(100, "int8", move(range(100), 3, 0, 0.5)).failures)
    assert any("5th percentile" in line for line in parity(100, "int8", move(range(10), 15, 0, 0.5)).failures)


def shift(expected, found):
    found["probability"] += np.float32(0.05)


def test_scores_are_judged_from_enough_images_on():
    """Seven of 120 verdicts flip, the ranking stays."""
    many = parity(120, "int8", shift, radiographs=radiographs(120))
    (line,) = many.failures
    assert "kappa 0.8" in line
    assert many.scores["auroc"][2].value == 0
    low, high = many.scores["kappa"][2].low, many.scores["kappa"][2].high
    assert low < many.scores["kappa"][2].value < high < 0
    assert len(many.flips) == 7
    places = [f"radiograph {n + 1}" for n in range(120)]
    named = parity(120, "int8", shift, radiographs=radiographs(120), places=places)
    assert [each["image"] for each in named.summary()["verdicts_flipped"]] == [places[n] for n in many.flips]
    assert parity(60, "int8", shift, radiographs=radiographs(60)).failures == []
    assert parity(120, "int8", shift).scores == {}


def test_no_number_never_passes_and_the_report_stays_json():
    def broken(expected, found):
        found["probability"][7] = np.nan

    found = parity(120, "int8", broken, radiographs=radiographs(120), each_image=False)
    (line,) = found.failures
    assert "1 of 120 images gave no number" in line
    assert json.loads(json.dumps(found.summary(), allow_nan=False))["probability"]["probability"]["largest"] is None


def test_the_error_of_a_map_is_relative_to_its_own_image_and_nan_never_passes():
    expected = np.float32([[[10, 0]], [[1, 0]]])
    assert errors_of("activation", expected, expected + 1).ravel() == pytest.approx([0.1, 0.1, 1, 1])
    assert errors_of("logits", np.float32([[0.5, 0]]), np.float32([[0.5, 0.1]])).max() == pytest.approx(0.1)
    assert errors_of("logits", np.float32([[10, 0]]), np.float32([[10, 1]])).max() == pytest.approx(0.1)
    assert errors_of("key_box", np.float32([[10, 0]]), np.float32([[10, 1]])).max() == 1
    assert errors_of("logits", np.float32([[10, 0]]), np.float32([[10, np.nan]])).max() == np.inf
    assert errors_of("logits", np.zeros((1, 2), np.float32), np.zeros(2, np.float32)).max() == np.inf
    assert errors_of("key_image", np.uint8([[0]]), np.uint8([[255]])).max() == 255


def test_glue_is_exact_whatever_the_encoders_compute_in():
    assert {at_most(STAGES["key_area_crop"], precision) for precision in TOLERANCES} == {(EXACT, None)}
    assert at_most(STAGES["encoder"], "f32") == (1e-4, None)
    assert at_most(STAGES["encoder"], "int8") == (None, None)


def test_a_file_of_the_int8_set_that_is_not_in_int8_is_held_to_full_precision_under_its_sets_name(
    tmp_path, monkeypatch
):
    flow, asked = FLOWS["msfm_fma"], []
    (tmp_path / "file").touch()
    form = SimpleNamespace(name="onnx", kinds=("encoder",), path=lambda *_: tmp_path / "file")
    form.load = lambda path, stage, precision, threads: asked.append((stage.name, precision))
    monkeypatch.setattr("scaphoid.export.format_parity.load_stage", lambda *_: None)
    stages = Engine(form, ".int8.onnx", "int8").stages(tmp_path, flow, {}, 1)
    assert {("fma_encoder", "f32"), ("encoder", "int8")} <= set(asked)
    errors, map_ = Errors(), torch.ones(1, 10, 10)
    stage = replace(stages["fma_encoder"], stage=replace(STAGES["fma_encoder"], outputs=(ACTIVATION,)))
    errors.add(replace(stage, precision="f32"), [map_], [map_])
    errors.add(stage, [map_], [map_ + 0.01])
    full, int8 = errors.rows.values()
    assert full.failure == ""
    assert int8.failure == "fma_encoder, onnx int8: activation differs by 0.01, at most 0.0001"


def test_the_command_judges_what_it_runs_and_repeats_the_notes_of_quantising(tmp_path, monkeypatch, capsys):
    quantized = {"flow": "msfm", "notes": ["fma_encoder stays"], "failures": ["kappa differs"]}
    manifest = {"flows": ["msfm", "kalm"], "precision": "int8", "formats": [], "quantization": [quantized]}
    model = SimpleNamespace(config=SimpleNamespace(image_size=96))
    monkeypatch.setattr(command, "verify", lambda folder: dict(manifest))
    monkeypatch.setattr(command, "load_served", lambda weights: model)
    monkeypatch.setattr(command, "eager_stages", lambda model, size: dict.fromkeys(FLOWS["kalm"].stages))
    monkeypatch.setattr(command, "of_files", lambda paths: GateImages((), (), (), (), ""))
    monkeypatch.setattr(command, "hold", lambda artefacts, manifest, *rest: report_of(manifest, rest[1], [], []))
    monkeypatch.setattr("sys.argv", ["parity", "kalm.safetensors", "artefacts", "1.png", "--flow", "kalm"])
    with pytest.raises(SystemExit) as error:
        command.main()
    assert error.value.code == 0
    told = capsys.readouterr().out
    assert "fma_encoder stays" in told
    assert "kappa differs" not in told


def test_the_encoder_whose_map_decides_each_pixel_stays_in_full_precision():
    assert {"fma_encoder"} == DECIDING_PIXELS
    assert [precision_of(STAGES["fma_encoder"], each) for each in TOLERANCES] == ["f32", "f32", "bf16", "f32"]
    assert [precision_of(STAGES["encoder"], each) for each in TOLERANCES] == ["f32", "f16", "bf16", "int8"]


def test_one_far_element_passes_in_half_precision_and_a_small_error_everywhere_does_not():
    def error(precision, found):
        row = OutputError("onnx", precision, STAGES["encoder"], "activation")
        row.add(np.ones((1, 10, 10), np.float32), np.float32(found))
        return row.failure

    far = np.ones((1, 10, 10))
    far[0, 3, 3] = 1.04
    assert error("f16", far) == ""
    assert "differs by 0.04, at most 0.0001" in error("f32", far)
    far[0, 3, 3] = 1.06
    assert "differs by 0.06, at most 0.0488" in error("f16", far)
    assert "differs by 0.006 in the mean, at most 0.0049" in error("f16", np.full((1, 10, 10), 1.006))
    assert error("bf16", np.full((1, 10, 10), 1.006)) == ""
    assert "no number" in error("int8", np.full((1, 10, 10), np.nan))
