import json
import sys
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scaphoid.kernels.library")

from scaphoid.export import export as export_module  # noqa: E402
from scaphoid.export import rtx_compile_check  # noqa: E402
from scaphoid.export.artefacts import ManifestError, verify, write_manifest  # noqa: E402
from scaphoid.export.export import export, main  # noqa: E402
from scaphoid.export.formats import FORMATS, SERVED, Format, FormatError, choose  # noqa: E402
from scaphoid.export.gate import hold  # noqa: E402
from scaphoid.export.gate_images import of_files  # noqa: E402
from scaphoid.export.runner import eager_stages, load_served  # noqa: E402
from scaphoid.export.tensorrt_engines.build_engines import BATCHES  # noqa: E402
from scaphoid.trainer.checkpoint import save_model  # noqa: E402
from scaphoid.trainer.contracts import STAGES  # noqa: E402
from scaphoid.trainer.models.kalm import Kalm, KalmConfig  # noqa: E402
from scaphoid.trainer.models.msfm import Msfm, MsfmConfig  # noqa: E402

GRADIENT = b"P5\n90 70\n255\n" + bytes((3 * x + 2 * y + x * y // 9) % 256 for y in range(70) for x in range(90))
KALM_ENCODERS = ("global_encoder", "local_encoder")
PROFILE = {"key_image": [[batch, 1, 96, 96] for batch in BATCHES]}
KALM_GLUE = ("key_area_crop", "key_area_result")


def test_what_is_served_is_in_the_table():
    assert all(kind in FORMATS[name].kinds for kind, name in SERVED.items() if kind != "preprocess")
    assert {stage.kind for stage in STAGES.values()} == set(SERVED)
    assert all(each.write and each.load for each in FORMATS.values() if each.files)


@pytest.mark.parametrize("name", ["caffe", "eager", "tensorrt"])
def test_a_format_that_cannot_be_written_is_named(name):
    with pytest.raises(FormatError, match=rf"{name}.*expected some of torchscript, exported, onnx, openvino"):
        choose(["onnx", name] if not FORMATS["onnx"].missing() else [name])


def test_a_missing_package_is_one_line_with_what_to_install():
    absent = Format("absent", "", ("encoder",), {"no_such_module": "pip install 'scaphoid[onnx]'"})
    with pytest.raises(FormatError) as error:
        absent.require()
    assert str(error.value) == "format absent needs pip install 'scaphoid[onnx]' (no_such_module)"


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaphoid-export", "formats", "--json"])
    main()
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["eager", "torchscript", "exported", "onnx", "openvino", "tensorrt"]
    assert rows["eager"]["here"]
    assert rows["onnx"]["stages"] == ["encoder"]
    assert rows["openvino"]["served"] == ["encoder"]
    monkeypatch.setattr(sys, "argv", ["scaphoid-export", "formats"])
    main()
    assert "torchscript" in capsys.readouterr().out


def test_compile_check_without_the_package_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(rtx_compile_check, "available", lambda: False)
    with pytest.raises(SystemExit, match=r"check-rtx: .*not run.*scaphoid\[rtx\]"):
        rtx_compile_check.main([str(tmp_path)])


def test_compile_check_wants_onnx(tmp_path):
    write_manifest(tmp_path, {"stages": {}, "formats": ["openvino"]})
    with pytest.raises(ManifestError, match="--formats onnx"):
        rtx_compile_check.check_artefacts(tmp_path, (86,))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "kalm.safetensors"
    save_model(path, Kalm(KalmConfig("test_resnet", image_size=160, key_size=96)))
    return path


@pytest.fixture(scope="module")
def artefacts(weights):
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}: pip install 'scaphoid[onnx]'")
    folder = weights.parent / "artefacts"
    export([weights], folder, formats=["torchscript", "exported", "onnx"], images=2)
    return folder


def test_parts_are_cast_before_they_are_reshaped(tmp_path):
    """TensorRT reshapes no uint8."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from scaphoid.export.onnx_stage import OnnxStage

    stage, path = STAGES["parts_encoder"], tmp_path / "parts.onnx"
    module = Msfm(MsfmConfig("test_resnet", image_size=160, part_size=96)).stages()[stage.name]
    parts = torch.randint(0, 256, (2, 7, 1, 96, 96), dtype=torch.uint8)
    FORMATS["onnx"].write(module, (parts,), stage, path)
    nodes = onnx.load(path).graph.node
    assert [node.op_type for node in nodes if stage.inputs[0].name in node.input and node.op_type != "Shape"] == [
        "Cast"
    ]
    with torch.no_grad():
        torch.testing.assert_close(OnnxStage(path, stage)(parts[:1])[0], module(parts[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "half"), [("fma_encoder", False), ("encoder", True)])
def test_the_encoder_whose_map_decides_each_pixel_is_written_in_full_precision(name, half, tmp_path):
    onnx = pytest.importorskip("onnx")
    stage, path = STAGES[name], tmp_path / f"{name}.f16.onnx"
    module = Msfm(MsfmConfig("test_resnet", image_size=96, part_size=64)).stages()[name]
    FORMATS["onnx"].write(module, (torch.zeros(2, 1, 96, 96, dtype=torch.uint8),), stage, path)
    types = {each.data_type for each in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types) == half


def test_a_full_disk_leaves_nothing_half_written(weights, tmp_path, monkeypatch):
    out, exported = tmp_path / "artefacts", []

    def full(stage, *_):
        exported.append(stage.name)
        raise OSError(28, "No space left on device", "model.xml")

    monkeypatch.setattr(export_module, "export_stage", full)
    monkeypatch.setattr(sys, "argv", ["scaphoid-export", str(weights), "--out", str(out), "--gate-images", "1"])
    with pytest.raises(SystemExit, match=r"scaphoid-export: .*No space left on device"):
        main()
    assert exported
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_exported_file_agrees_with_eager(weights, artefacts, tmp_path):
    (tmp_path / "gradient.pgm").write_bytes(GRADIENT)
    model = load_served(weights)
    eager = eager_stages(model, model.config.image_size)
    report = hold(artefacts, verify(artefacts), eager, of_files([tmp_path / "gradient.pgm"]), threads=1)
    assert report["failures"] == []
    stages = {name: {row["stage"] for row in report["stages"] if row["format"] == name} for name in FORMATS}
    assert stages["exported"] == stages["torchscript"] == {*KALM_ENCODERS, *KALM_GLUE}
    assert stages["onnx"] == stages["openvino"] == set(KALM_ENCODERS)
    flows = {(each["engine"], each["precision"]) for each in report["flows"]}
    assert any(each["note"].startswith("one file") for each in report["flows"])
    assert flows >= {("onnx", "f32"), ("onnx", "f16"), ("exported", "f32"), ("torchscript", "f32")}
    half = [row["largest"] for row in report["stages"] if row["precision"] == "f16"]
    assert any(error > 1e-6 for error in half), "f16 gave f32's results: nothing was computed in half precision"


def rounded(report):
    """The gate's report, every number to 1e-4: far below what may be wrong, above what the machine may round."""
    if isinstance(report, dict):
        return {name: rounded(each) for name, each in report.items()}
    if isinstance(report, list):
        return [rounded(each) for each in report]
    return pytest.approx(report, abs=1e-4) if isinstance(report, float) else report


@pytest.mark.slow
def test_onnx_has_the_contracts_door_and_every_file_the_same_bytes_twice(weights, artefacts, tmp_path):
    import onnx

    model = onnx.load(artefacts / "onnx" / "local_encoder.f16.onnx")
    assert [port.name for port in model.graph.input] == ["key_image"]
    assert [port.name for port in model.graph.output] == ["logits"]
    half = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT16]
    assert sum(np.prod(each.dims) for each in half) > 0.9 * sum(np.prod(each.dims) for each in model.graph.initializer)
    assert b"trainer/stages" not in model.SerializeToString()

    export([weights], tmp_path / "again", formats=["torchscript", "exported", "onnx"], images=2)
    files = [verify(folder)["files"] for folder in (artefacts, tmp_path / "again")]
    reports = [json.loads((folder / "parity.json").read_text()) for folder in (artefacts, tmp_path / "again")]
    assert reports[0] == rounded(reports[1])
    rounding = {"parity.json", "parity.md"}  # errors of engines whose sums depend on how many threads were free
    assert {name: files[0][name] for name in files[0].keys() - rounding} == {
        name: files[1][name] for name in files[1].keys() - rounding
    }
    for name in files[0]:
        if name.endswith((".pt", ".pt2")):
            with zipfile.ZipFile(artefacts / name) as archive:
                assert not [entry for entry in archive.namelist() if b"trainer/stages" in archive.read(entry)], name


@pytest.mark.slow
@pytest.mark.skipif(not rtx_compile_check.available(), reason=rtx_compile_check.MISSING)
@pytest.mark.parametrize("suffix", [".onnx", ".f16.onnx"])
def test_rtx_compile_check(artefacts, suffix):
    onnx = artefacts / "onnx" / f"local_encoder{suffix}"
    found = rtx_compile_check.check(onnx, PROFILE, 86)
    assert found.error == ""
    assert found.layers > 10
    assert ("HALF" in found.precisions) == (suffix == ".f16.onnx")
    assert found.mebibytes > 0


@pytest.mark.slow
@pytest.mark.skipif(not rtx_compile_check.available(), reason=rtx_compile_check.MISSING)
def test_rtx_compile_check_names_what_does_not_parse(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    assert "does not parse" in rtx_compile_check.check(tmp_path / "broken.onnx", PROFILE, 86).error
