import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scaphoid.kernels.library")

from scaphoid.export import export as export_module  # noqa: E402
from scaphoid.export import gate  # noqa: E402
from scaphoid.export.artefacts import MANIFEST, MODEL_CARD, PARITY, PARITY_REPORT, ManifestError, verify  # noqa: E402
from scaphoid.export.export import export  # noqa: E402
from scaphoid.export.format_parity import Errors, ExportedStage  # noqa: E402
from scaphoid.export.formats import FORMATS  # noqa: E402
from scaphoid.export.gate_images import PHANTOMS, GateImages, gate_images, of_files  # noqa: E402
from scaphoid.export.manifest import FIGURES  # noqa: E402
from scaphoid.export.markdown import table  # noqa: E402
from scaphoid.export.parity_report import markdown  # noqa: E402
from scaphoid.export.pipeline_to_dali import pipeline_to_dali  # noqa: E402
from scaphoid.export.publish import REJECTED, GateError  # noqa: E402
from scaphoid.export.runner import PREPROCESS_BATCH  # noqa: E402
from scaphoid.trainer.checkpoint import save_model  # noqa: E402
from scaphoid.trainer.contracts import IMAGE, ORIGINAL_SIZE, STAGES  # noqa: E402
from scaphoid.trainer.data.index import Index, Radiograph, write_index  # noqa: E402
from scaphoid.trainer.data.phantom.generate import TEST, TRAINING  # noqa: E402
from scaphoid.trainer.data.pipeline import decode_batch  # noqa: E402
from scaphoid.trainer.flows import FLOWS  # noqa: E402
from scaphoid.trainer.models.kalm import Kalm, KalmConfig  # noqa: E402
from scaphoid.trainer.models.msfm import Msfm, MsfmConfig  # noqa: E402


def test_the_gates_phantoms_are_nobody_elses():
    assert PHANTOMS.seed not in (TRAINING.seed, TEST.seed)
    first, again = gate_images(3), gate_images(3)
    assert first.encoded == again.encoded
    assert len(first.radiographs) == 3
    assert first.names == first.places == ["phantom 1", "phantom 2", "phantom 3"]
    assert "52561" in first.origin
    with pytest.raises(ValueError, match="--gate-images: expected at least 1, got 0"):
        gate_images(0)


def test_your_own_index_gives_whole_patients(tmp_path):
    radiographs = []
    for number in range(24):
        (tmp_path / f"{number}.pgm").write_bytes(b"P5\n1 1\n255\n" + bytes([number]))
        label = int(number % 8 >= 4)
        radiographs.append(Radiograph(f"{number}.pgm", f"p{number // 4}", "s", "", "wrist", label, None, 1, 1, "valid"))
    path = write_index(Index(tmp_path, tuple(radiographs)))
    chosen = gate_images(8, path)
    assert {each.patient for each in chosen.radiographs} == {each.patient for each in chosen.radiographs[::4]}
    assert sum(each.label for each in chosen.radiographs) == 4
    assert [data[-1] for data in chosen.encoded] == [int(each.image[:-4]) for each in chosen.radiographs]
    assert len(gate_images(99, path)) == len(of_files([path])) == 24
    assert of_files([tmp_path / "3.pgm"]).radiographs == ()
    assert chosen.names == [each.image for each in chosen.radiographs]
    assert chosen.places == [f"radiograph {int(each.image[:-4]) + 1}" for each in chosen.radiographs]
    assert of_files([tmp_path / "3.pgm"]).names == [str(tmp_path / "3.pgm")]
    assert of_files([tmp_path / "3.pgm"]).places == ["image 1"]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    """As the index, or the user, names it: neither by its place in a batch nor by more than that."""
    (tmp_path / "preprocess").mkdir()
    pipeline_to_dali(tmp_path / "preprocess" / "model.dali", 96, PREPROCESS_BATCH)
    good = gate_images(1).encoded[0]
    bad = PREPROCESS_BATCH + 1
    names = [f"valid/{number}.png" for number in range(bad + 2)]
    encoded = [good[:-40] if number == bad else good for number in range(len(names))]
    eager = {"preprocess": lambda encoded: tuple(map(torch.from_numpy, decode_batch(encoded, 96)))}
    with pytest.raises(ValueError, match=rf"^valid/{bad}\.png: .*truncated.*: mend it, or leave it out"):
        list(gate._preprocess(tmp_path, {}, eager, GateImages(encoded, names, (), (), ""), Errors()))


QUANTIZED = {
    **{"flow": "msfm", "calibration_images": 40, "validation_images": 50, "layers": {"encoder": 9}},
    "rounds": [{**dict.fromkeys(FIGURES, 0.25), "fp32_layers": {"encoder": ["/stem"]}}],
}


def test_int8_that_missed_its_bar_fails_and_the_report_tells_all_of_it():
    told = {"notes": ["fma_encoder stays"], "failures": ["kappa differs"]}
    manifest = {"precision": "f32", "formats": [], "quantization": [QUANTIZED | told]}
    images = GateImages((), (), (), (), "")
    report = gate.report_of(manifest, images, [], [])
    assert (report["passed"], report["failures"]) == (False, ["kappa differs"])
    assert report["notes"][0] == "fma_encoder stays"
    read = markdown(report)
    assert "int8 of flow msfm beside fp32, 40 calibration and 50 validation images" in read
    assert "| 8 of 9 | 0.2500 |" in read
    assert gate.report_of(manifest | {"quantization": [QUANTIZED]}, images, [], [])["passed"]


def test_a_name_does_not_break_the_report():
    *_, row = table(("", "", ""), [("a|b", "c\nd\x1b[1m", "<i>")])
    assert row == "| a\\|b | c d \\[1m | \\<i> |"


class Stub:
    """An engine whose stages are eager's, some of them changed."""

    format, precision = FORMATS["openvino"], "f32"

    def __init__(self, modules, **changed) -> None:
        self.modules, self.changed, self.calls = modules, changed, dict.fromkeys(modules, 0)

    def stages(self, artefacts, flow, manifest, threads):
        def counted(name):
            def call(*inputs):
                self.calls[name] += 1
                outputs = self.modules[name](*inputs)
                return self.changed[name](outputs) if name in self.changed else outputs

            return call

        names = [name for name in flow.stages if name in self.modules]
        return {name: ExportedStage(STAGES[name], "openvino", "f32", counted(name)) for name in names}

    def whole(self, artefacts, flow, threads):
        return None


@pytest.fixture(scope="module")
def msfm():
    torch.manual_seed(3)
    return Msfm(MsfmConfig("test_resnet", image_size=96, part_size=64)).eval().stages()


@torch.inference_mode()
def judged(flow, modules, **changed):
    """The flow over a stub, three images in two batches; its parities, the rows of its outputs, and the stub."""
    coarse = torch.rand(3, 1, 9, 8, generator=torch.Generator().manual_seed(2)) * 255
    images = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 255).to(torch.uint8)
    given = {IMAGE.name: images, ORIGINAL_SIZE.name: torch.tensor([[120, 150]] * 3, dtype=torch.int32)}
    whole = flow.run(modules, given, flow.outputs)
    batches = [{name: each[rows] for name, each in whole.items()} for rows in (slice(0, 2), slice(2, 3))]
    engine, errors = Stub(modules, **changed), Errors()
    found = gate._flow_parities(None, {}, flow, engine, batches, GateImages((), (), (), (), ""), errors, 1)
    failed = {(row.stage.name, row.output) for row in errors.rows.values() if row.failure}
    return found, failed, engine


def test_what_equals_eager_passes_and_runs_once(msfm):
    (found,), failed, engine = judged(FLOWS["msfm"], msfm)
    assert found.failures == []
    assert not failed
    assert found.probability["probability"].max() == 0
    batches = 2
    assert engine.calls["encoder"] == 2 * batches  # main and object, each once: the flow takes what the stages gave
    assert engine.calls["parts_encoder"] == engine.calls["object_crop"] == batches


def test_a_stage_is_judged_on_eagers_inputs_and_the_flow_on_its_own(msfm):
    def flipped(outputs):
        return (outputs[0], outputs[1].flip(2), outputs[2])

    (found,), failed, _ = judged(FLOWS["msfm"], msfm, encoder=flipped)
    assert failed == {("encoder", "activation")}  # the crops after it are right for what they were given
    assert found.failures
    (found,), failed, _ = judged(FLOWS["msfm"], msfm, parts_encoder=lambda logits: logits + 0.01)
    assert failed == {("parts_encoder", "parts_logits")}


def test_suppression_is_judged_stage_by_stage_and_reported_end_to_end(msfm):
    flow = FLOWS["msfm_fma"]

    def another_pixel(image):
        return (image.int() - 9).clamp(min=0).to(torch.uint8)

    (pinned, free), failed, _ = judged(flow, msfm, suppress=another_pixel)
    assert failed == {("suppress", "image")}
    assert pinned.failures == []
    assert pinned.probability["probability"].max() == 0
    assert free.probability["probability"].max() > 0
    assert not free.each_image
    (_, _), failed, _ = judged(flow, msfm, fma_encoder=lambda activation: 1.001 * activation)
    assert failed == {("fma_encoder", "activation")}


@pytest.mark.slow
def test_what_fails_is_not_published_unless_accepted(tmp_path, monkeypatch, capsys):
    torch.manual_seed(5)
    weights, out = tmp_path / "kalm.safetensors", tmp_path / "artefacts"
    model = Kalm(KalmConfig("test_resnet", image_size=96, key_size=64))
    save_model(weights, model, phantoms="1.0.0", threshold=0.4)
    content = export([weights], out, images=2)
    assert verify(out)["parity"] == content["parity"]
    assert content["parity"]["passed"]
    assert content["thresholds"] == {"kalm": 0.4}
    assert content["container"]["release"] >= "26.07"
    report = json.loads((out / PARITY).read_text())
    assert {row["stage"] for row in report["stages"]} == {*FLOWS["kalm"].stages}
    card = (out / MODEL_CARD).read_text()
    for said in ("Not a medical device", "test_resnet", "96 pixels", "generator 1.0.0", "0.4 (the weights file)"):
        assert said in card
    before = (out / MANIFEST).read_bytes()

    honest = export_module.export_stage

    def wrong(stage, module, *rest):
        if stage.name == "local_encoder":
            module = copy.deepcopy(module)
            module.encoder.classifier.bias.data += 0.05
        honest(stage, module, *rest)

    monkeypatch.setattr(export_module, "export_stage", wrong)
    argv = ["scaphoid-export", str(weights), "--out", str(out), "--gate-images", "2"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as error:
        export_module.main()
    assert "not published" in str(error.value)
    assert "local_encoder, openvino f32: logits differs by 0.05, at most 0.0001" in str(error.value)
    assert (out / MANIFEST).read_bytes() == before
    verify(out)
    rejected = tmp_path / f"artefacts{REJECTED}"
    assert "FAILED" in (rejected / PARITY_REPORT).read_text()
    with pytest.raises(ManifestError, match="has no manifest"):
        verify(rejected)

    monkeypatch.setattr("sys.argv", [*argv, "--accept", "a trial"])
    export_module.main()
    assert "accepted as 'a trial'" in capsys.readouterr().out
    parity = verify(out)["parity"]
    assert (parity["passed"], parity["accepted"]) == (False, "a trial")
    assert any("local_encoder" in line for line in parity["failures"])
    assert "accepted: a trial" in (out / MODEL_CARD).read_text()
    assert not rejected.exists()
    with pytest.raises(GateError):
        export([weights], out, images=1)
    assert verify(out)["parity"] == parity
    np.testing.assert_equal(
        sorted(path.name for path in tmp_path.iterdir()), sorted([weights.name, out.name, rejected.name])
    )
