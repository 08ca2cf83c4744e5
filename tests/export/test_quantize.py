import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("nncf")

from onnx import TensorProto, numpy_helper  # noqa: E402

from scaphoid.export.artefacts import MODEL_CARD, PARITY, PARITY_REPORT, verify  # noqa: E402
from scaphoid.export.calibration import (  # noqa: E402
    CALIBRATION,
    VALIDATION,
    CalibrationError,
    Figures,
    choose_images,
    compare_flow,
    inputs_of,
    prepare,
)
from scaphoid.export.export import ExportError, export  # noqa: E402
from scaphoid.export.onnx_stage import OnnxStage  # noqa: E402
from scaphoid.export.onnx_to_openvino import onnx_to_openvino  # noqa: E402
from scaphoid.export.publish import REJECTED, GateError  # noqa: E402
from scaphoid.export.quantize import quantize, relative_error, search, simulate  # noqa: E402
from scaphoid.export.runner import OpenVinoStage, Runner  # noqa: E402
from scaphoid.export.tolerances import TOLERANCES  # noqa: E402
from scaphoid.export.torch_to_onnx import check_door, torch_to_onnx  # noqa: E402
from scaphoid.trainer.checkpoint import save_model  # noqa: E402
from scaphoid.trainer.contracts import STAGES  # noqa: E402
from scaphoid.trainer.data.index import Index, Radiograph, write_index  # noqa: E402
from scaphoid.trainer.flows import FLOWS  # noqa: E402
from scaphoid.trainer.models.backbone import create_encoder  # noqa: E402
from scaphoid.trainer.models.kalm import Kalm, KalmConfig  # noqa: E402
from scaphoid.trainer.models.msfm import Msfm, MsfmConfig  # noqa: E402

GOOD = Figures(auroc=0.001, kappa=0.0, probability=0.02, iou_median=1.0, iou_p5=0.9)
BAD = Figures(auroc=0.1, kappa=0.0, probability=0.4, iou_median=1.0, iou_p5=0.9)
STAGE = STAGES["encoder"]


def radiographs(counts, split="train"):
    """An index with counts[label] radiographs, two for each patient."""
    rows = [
        Radiograph(
            f"{split}/{label}_{n}.png", f"{split}{label}_{n // 2}", "study1", "", "wrist", label, None, 9, 7, split
        )
        for label, count in enumerate(counts)
        for n in range(count)
    ]
    return rows


@pytest.fixture
def folder(tmp_path):
    return lambda *rows: Index(tmp_path, tuple(row for part in rows for row in part))


def test_images_are_balanced_disjoint_and_of_the_training_split(folder):
    index = folder(radiographs((300, 500)), radiographs((300, 300), "valid"))
    calibration, validation = choose_images(index)
    assert (len(calibration), len(validation)) == (CALIBRATION, VALIDATION)
    for chosen in (calibration, validation):
        assert {each.split for each in chosen.radiographs} == {"train"}
        assert 2 * sum(each.label for each in chosen.radiographs) == len(chosen)
    patients = [{each.patient for each in chosen.radiographs} for chosen in (calibration, validation)]
    assert not patients[0] & patients[1]


def test_images_are_the_same_whatever_the_order_and_others_by_another_seed(folder):
    rows = radiographs((300, 500))
    first, again, other = (
        choose_images(folder(each), seed)[0] for each, seed in ((rows, 0), (rows[::-1], 0), (rows, 1))
    )
    assert first.radiographs == again.radiographs
    assert first.radiographs != other.radiographs


@pytest.mark.parametrize(
    ("counts", "split", "message"),
    [
        ((50, 50), "valid", "no radiograph of the split 'train', only of valid"),
        ((90, 0), "train", "all 90 training radiographs are normal"),
        ((0, 90), "train", "all 90 training radiographs are abnormal"),
        ((31, 90), "train", "31 normal and 90 abnormal training radiographs, expected at least 32 of each"),
    ],
)
def test_a_set_that_cannot_calibrate_is_refused(folder, counts, split, message):
    with pytest.raises(CalibrationError, match=message):
        choose_images(folder(radiographs(counts, split)))


def test_a_missing_nncf_is_named_with_its_extra(folder, monkeypatch):
    path = write_index(folder(radiographs((50, 50))))
    assert len(prepare(path)) == 2
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(CalibrationError, match=r"pip install 'scaphoid\[int8\]'"):
        prepare(path)


def test_precision_and_calibration_go_together(tmp_path):
    with pytest.raises(ExportError, match="--calibration"):
        export([tmp_path / "kalm.safetensors"], tmp_path / "out", "int8")
    with pytest.raises(ExportError, match="--precision int8"):
        export([tmp_path / "kalm.safetensors"], tmp_path / "out", calibration=tmp_path)


def test_an_encoder_is_calibrated_on_what_its_steps_are_fed():
    tensors = {name: np.full((3, 1), value) for value, name in enumerate(("image", "object_image", "part_images"))}
    assert inputs_of(STAGES["encoder"], FLOWS["msfm"], tensors).ravel().tolist() == [0, 0, 0, 1, 1, 1]
    assert inputs_of(STAGES["parts_encoder"], FLOWS["msfm"], tensors).ravel().tolist() == [2, 2, 2]


def test_a_flow_is_judged_by_its_final_probabilities_and_boxes():
    labels = [0, 1, 0, 1]
    reference = {
        "probability": np.array([[0.1], [0.9], [0.2], [0.6]], np.float32),
        "probability_with_parts": np.array([[0.1], [0.9], [0.2], [0.8]], np.float32),
        "box": np.tile(np.array([0, 0, 10, 10], np.float32), (4, 1)),
    }
    assert compare_flow(FLOWS["msfm"], labels, reference, reference) == Figures(0, 0, 0, 1, 1)
    moved = reference["box"] + np.array([5, 0, 5, 0], np.float32)
    flipped = reference["probability"].copy()
    flipped[3] = 0.15
    figures = compare_flow(FLOWS["msfm"], labels, reference, reference | {"probability": flipped, "box": moved})
    expected = {"auroc": 0.25, "kappa": 0.5, "probability": 0.45, "iou_median": 1 / 3, "iou_p5": 1 / 3}
    assert asdict(figures) == pytest.approx(expected)
    assert GOOD.missed == []
    lines = figures.missed
    assert [line.split(",")[0] for line in lines] == [
        *("AUROC differs by 0.2500", "kappa differs by 0.5000"),
        *("IoU of the box has median 0.333", "IoU of the box has 5th percentile 0.333"),
    ]
    assert "at most 0.008 wanted" in lines[0]
    assert len(replace(GOOD, kappa=float("nan")).missed) == 1


@pytest.fixture(scope="module")
def tiny():
    """A small encoder and images for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = create_encoder("test_resnet", pretrained=False).eval()
    images = torch.nn.functional.interpolate(torch.rand(24, 1, 9, 7) * 255, (96, 64), mode="bicubic").clamp(0, 255)
    yield encoder, images.to(torch.uint8)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    torch_to_onnx(tiny[0], (tiny[1][:2],), STAGE, path)
    return quantize(onnx.load(path), tiny[1].numpy())


def test_q_dq_pairs_are_what_tensorrt_takes(quantized):
    model = quantized.int8
    check_door(model, STAGE)
    onnx.checker.check_model(model, full_check=True)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name for node in layers] == quantized.layers
    for layer in layers:
        activation, weight = (made[name] for name in layer.input[:2])
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert constants[activation.input[1]].size == 1
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        values = constants[weight.input[0]]
        assert values.dtype == np.int8
        assert np.abs(values).max() <= 64, "7 bits, or a CPU without VNNI overflows"
        assert constants[weight.input[1]].shape == values.shape[:1]
    taken = {name for node in model.graph.node if node.op_type != "Conv" for name in node.input}
    assert not taken & {node.output[0] for node in pairs if node.op_type == "DequantizeLinear"}
    assert all(port.type.tensor_type.elem_type == TensorProto.FLOAT for port in model.graph.output)


def test_engines_agree_on_the_int8_file(quantized, tiny, tmp_path):
    path = tmp_path / "encoder.int8.onnx"
    onnx.save(quantized.int8, path)
    onnx_to_openvino(path, STAGE, tmp_path / "model.xml")
    images = tiny[1][:5]
    expected = simulate(quantized.int8, images.numpy())
    with torch.inference_mode():
        eager = tiny[0](images)
    for engine in (
        OnnxStage(path, STAGE, 1),
        OpenVinoStage(path, STAGE, "int8", 1),
        OpenVinoStage(tmp_path / "model.xml", STAGE, "int8", 1),
    ):
        for found, simulated, exact in zip(engine(images), expected, eager, strict=True):
            assert relative_error(simulated, found.numpy()) < 0.02
            assert 0 < relative_error(exact.numpy(), found.numpy()) < 0.1


def test_a_layer_that_is_kept_is_fp32_again(quantized):
    exact = simulate(quantized.full, quantized.samples)
    assert [
        relative_error(a, b)
        for a, b in zip(exact, simulate(quantized.keeping(quantized.layers), quantized.samples), strict=True)
    ] == [0, 0, 0]
    kept = quantized.keeping(quantized.layers[:1])
    onnx.checker.check_model(kept, full_check=True)
    count = sum(node.op_type == "QuantizeLinear" for node in quantized.int8.graph.node)
    assert sum(node.op_type == "QuantizeLinear" for node in kept.graph.node) < count
    assert sum(quantized.stretches, ()) == tuple(quantized.layers)


def in_fp32(model) -> list[str]:
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    return [n.name for n in model.graph.node if n.op_type == "Conv" and made.get(n.input[0]) != "DequantizeLinear"]


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_the_search_keeps_as_few_as_pass_the_most_harmful_first(quantized, needed):
    harm = quantized.harm()
    assert min(harm.values()) >= 0 < max(harm.values())
    worst = sorted(harm, key=harm.get, reverse=True)[:needed]
    seen = []

    def measure(models):
        seen.append(in_fp32(models["encoder"]))
        return GOOD if set(sum(worst, ())) <= set(seen[-1]) else BAD

    models, rounds = search({"encoder": quantized}, measure)
    assert seen[0] == []
    assert rounds[-1].figures == GOOD
    assert set(in_fp32(models["encoder"])) == set(rounds[-1].kept["encoder"]) == set(sum(worst, ()))
    assert sorted(map(len, seen)) == sorted(len(each.kept["encoder"]) for each in rounds)


@pytest.mark.parametrize("good", [{1}, {1, 3}])
def test_a_search_of_two_stages_ends_with_one_that_passed_even_if_more_in_fp32_did_worse(quantized, good):
    calls = []

    def measure(models):
        calls.append({name: in_fp32(model) for name, model in models.items()})
        return GOOD if len(calls) - 1 in good else BAD

    models, rounds = search({"encoder": quantized, "parts_encoder": quantized}, measure)
    passed = [sum(map(len, kept.values())) for number, kept in enumerate(calls) if number in good]
    assert passed
    assert rounds[-1].figures.passed
    assert sum(map(len, rounds[-1].kept.values())) == min(passed)
    assert {name: in_fp32(model) for name, model in models.items()} == rounds[-1].kept
    assert len(rounds) == len(calls)


def test_a_search_that_nothing_passes_ends_with_the_most_that_it_left_in_fp32(quantized):
    models, rounds = search({"encoder": quantized}, lambda _: BAD)
    assert not rounds[-1].figures.passed
    assert len(rounds[-1].kept["encoder"]) == max(len(each.kept["encoder"]) for each in rounds)
    assert in_fp32(models["encoder"]) == rounds[-1].kept["encoder"]


TWICE = """
import hashlib, sys, numpy, onnx
from scaphoid.export.quantize import quantize
quantized = quantize(onnx.load(sys.argv[1]), numpy.load(sys.argv[2]))
print(hashlib.sha256(quantized.int8.SerializeToString(deterministic=True)).hexdigest())
"""


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes_in_another_process(quantized, tiny, tmp_path):
    onnx.save(quantized.full, tmp_path / "encoder.onnx")
    np.save(tmp_path / "images.npy", tiny[1].numpy())
    command = [sys.executable, "-c", TWICE, str(tmp_path / "encoder.onnx"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()[-1]
    assert found == hashlib.sha256(quantized.int8.SerializeToString(deterministic=True)).hexdigest()


@pytest.fixture
def trained_on(tmp_path):
    """A data set of small pictures, and a KALM that never saw them."""
    rows = radiographs((40, 40))
    random = np.random.default_rng(5)
    for row in rows:
        (tmp_path / row.image).parent.mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (7, 9), dtype=np.uint8))
        small.resize((97, 79), Image.Resampling.BICUBIC).save(tmp_path / row.image)
    write_index(Index(tmp_path, tuple(replace(row, width=97, height=79) for row in rows)))
    torch.manual_seed(3)
    save_model(tmp_path / "kalm.safetensors", Kalm(KalmConfig("test_resnet", image_size=160, key_size=96)))
    return tmp_path


@pytest.mark.slow
def test_an_int8_export_is_served_and_says_what_it_did(trained_on):
    weights, out = trained_on / "kalm.safetensors", trained_on / "artefacts"
    export([weights], out, "int8", images=4, calibration=trained_on)
    manifest = verify(out)
    (report,) = manifest["quantization"]
    assert (report["flow"], report["calibration_images"], report["validation_images"]) == ("kalm", 40, 40)
    assert set(report["layers"]) == {"global_encoder", "local_encoder"}
    assert not Figures(**{name: report["rounds"][-1][name] for name in asdict(GOOD)}).missed
    assert report["failures"] == report["notes"] == []
    for name in report["layers"]:
        model = onnx.load(out / "onnx" / f"{name}.int8.onnx")
        int8 = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
        assert (int8 > 0) == (len(report["rounds"][-1]["fp32_layers"][name]) < report["layers"][name])
        assert (out / name / "model.bin").stat().st_size < (out / "onnx" / f"{name}.onnx").stat().st_size
    image = (trained_on / "train/0_0.png").read_bytes()
    assert set(Runner(out, "kalm", threads=1)([image], ["probability"])) == {"probability"}


@pytest.mark.slow
def test_int8_that_misses_its_bar_is_rejected_unless_accepted_and_the_fma_encoder_is_not_quantised(
    trained_on, monkeypatch
):
    monkeypatch.setattr("scaphoid.export.calibration.SPARE", -1)  # which nothing passes
    monkeypatch.setattr("scaphoid.export.quantize.STRETCHES", 2)
    weights, out = trained_on / "msfm.safetensors", trained_on / "artefacts"
    save_model(weights, Msfm(MsfmConfig("test_resnet", image_size=160, part_size=96)))
    with pytest.raises(
        GateError, match=r"not published.*--accept[^\n]*\n  int8 of flow msfm, \d+ of \d+ layers in int8: "
    ):
        export([weights], out, "int8", images=1, calibration=trained_on)
    rejected = trained_on / f"artefacts{REJECTED}"
    report = json.loads((rejected / PARITY).read_text())
    (quantized,) = report["quantization"]
    assert len(quantized["rounds"]) > 1, "what the quantiser did, round by round"
    assert quantized["failures"][0] in report["failures"]
    assert f"of {sum(quantized['layers'].values())} |" in (rejected / PARITY_REPORT).read_text()
    assert not out.exists()

    export([weights], out, "int8", images=1, calibration=trained_on, accept="a trial")
    manifest = verify(out)
    assert manifest["parity"]["accepted"] == "a trial"
    assert quantized["failures"][0] in manifest["parity"]["failures"]
    assert manifest["quantization"] == [quantized]
    card = (out / MODEL_CARD).read_text()
    assert "accepted: a trial" in card

    note = "fma_encoder is not in int8 but in fp32: its map decides for every pixel"
    assert note in manifest["parity"]["notes"]
    assert note in card
    assert set(quantized["layers"]) == {"encoder", "parts_encoder"}
    hashes = manifest["files"]
    assert hashes["onnx/fma_encoder.int8.onnx"] == hashes["onnx/fma_encoder.onnx"]
    assert hashes["onnx/encoder.int8.onnx"] != hashes["onnx/encoder.onnx"]
    largest = {(row["format"], row["stage"], row["precision"]): row["at_most"]["largest"] for row in report["stages"]}
    assert largest["openvino", "encoder", "int8"] is None
    for row in (("openvino", "int8"), ("onnx", "f32"), ("onnx", "f16"), ("onnx", "int8")):
        assert largest[row[0], "fma_encoder", row[1]] == TOLERANCES["f32"].largest, "each file of it, in fp32"
