import io
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("scaphoid.kernels.library")

from openvino.frontend import OpConversionFailure  # noqa: E402
from torch import nn  # noqa: E402

from scaphoid.export import model_card  # noqa: E402
from scaphoid.export.artefacts import OPS_LIBRARY, ManifestError, verify  # noqa: E402
from scaphoid.export.doors import Door, DoorError, check_door  # noqa: E402
from scaphoid.export.export import ExportError, export, export_stage  # noqa: E402
from scaphoid.export.flow_parity import Parity, answers  # noqa: E402
from scaphoid.export.formats import FORMATS  # noqa: E402
from scaphoid.export.precision import PRECISIONS, effective_precision, fallback  # noqa: E402
from scaphoid.export.runner import OpenVinoStage, Runner, eager_stages, load_served  # noqa: E402
from scaphoid.export.torch_to_openvino import torch_to_openvino  # noqa: E402
from scaphoid.export.torch_to_torchscript import torch_to_torchscript  # noqa: E402
from scaphoid.export.trained import flows_of  # noqa: E402
from scaphoid.trainer.checkpoint import save_model  # noqa: E402
from scaphoid.trainer.contracts import STAGES  # noqa: E402
from scaphoid.trainer.flows import FLOWS  # noqa: E402
from scaphoid.trainer.models.kalm import Kalm, KalmConfig  # noqa: E402
from scaphoid.trainer.models.plain import Plain, PlainConfig  # noqa: E402


class Maps(nn.Module):
    """As small as an encoder can be."""

    def forward(self, image):
        pooled = nn.functional.avg_pool2d(image.float(), 16).squeeze(1)
        return pooled.mean((1, 2)).unsqueeze(1).repeat(1, 2), pooled, 2 * pooled


def test_engine_takes_any_batch_and_names_its_tensors(tmp_path):
    image = torch.randint(0, 256, (2, 1, 112, 96), dtype=torch.uint8)
    torch_to_openvino(Maps(), (image,), STAGES["encoder"], tmp_path / "model.xml")
    engine = OpenVinoStage(tmp_path / "model.xml", STAGES["encoder"], "f32", threads=1)
    assert engine.precision == "f32"
    for batch in (1, 2, 5):
        images = image[:1].repeat(batch, 1, 1, 1)
        for found, expected in zip(engine(images), Maps()(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_engine_with_the_wrong_door_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the contract says UINT8"):
        torch_to_openvino(Maps(), (torch.rand(2, 1, 32, 32),), STAGES["encoder"], tmp_path / "model.xml")


def test_glue_whose_arguments_are_not_the_contracts_is_refused(tmp_path):
    class Renamed(nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    with pytest.raises(ValueError, match="main_logits"):
        torch_to_torchscript(Renamed(), (torch.zeros(2, 2),), STAGES["main_result"], tmp_path / "model.pt")


def test_flows_that_can_be_served():
    assert flows_of(["global_encoder", "key_area_crop", "local_encoder", "key_area_result"]) == [FLOWS["kalm"]]
    assert flows_of(["encoder"]) == []


@pytest.mark.parametrize(
    ("logits", "probability"),
    [
        (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 1)),
        (torch.zeros(2, 2), torch.zeros(2, 3)),
        (torch.zeros(2, 2), torch.zeros(2)),
    ],
)
def test_a_door_that_breaks_the_contract_is_named(logits, probability):
    with pytest.raises(DoorError, match="stage main_result"):
        check_door(STAGES["main_result"], Door((logits,), (probability,)))


def test_f32_is_everywhere_and_others_fall_back_to_it():
    assert effective_precision("f32") == "f32"
    assert all(effective_precision(precision) in (precision, "f32") for precision in PRECISIONS)
    assert all((fallback(each) == "") == (effective_precision(each) == each) for each in PRECISIONS)


def test_what_engines_run_in_is_told_without_openvinos_package_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "scaphoid.export.edge.openvino_engine")
    assert fallback("f32") == ""
    unknown = "exported for bf16; what they run in is unknown: OpenVINO's Python package is not installed here"
    assert fallback("bf16") == unknown
    program = (
        "import sys; sys.modules['openvino'] = None\n"
        "import scaphoid.triton_repo.serve as serve\n"
        "assert 'torch' not in sys.modules\n"
        "print(serve.fallback('bf16'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == unknown, done.stderr


def test_a_plain_classifier_is_refused_with_the_way_on(tmp_path):
    weights = tmp_path / "plain.safetensors"
    save_model(weights, Plain(PlainConfig("test_resnet", image_size=64)))
    with pytest.raises(ValueError, match=r"plain\.safetensors is a plain classifier.*--start"):
        export([weights], tmp_path / "artefacts")


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = Kalm(KalmConfig("test_resnet", image_size=96, key_size=64))
    name, weight = next(iter(model.named_parameters()))
    weight.data.view(-1)[3] = float("nan")
    save_model(tmp_path / "kalm.safetensors", model)
    with pytest.raises(ExportError, match=rf"kalm\.safetensors: {name} has numbers that are not finite"):
        export([tmp_path / "kalm.safetensors"], tmp_path / "artefacts")
    assert [each.name for each in tmp_path.iterdir()] == ["kalm.safetensors"]


@pytest.mark.parametrize("kind", [RuntimeError, OpConversionFailure])
def test_a_converter_that_fails_names_the_stage(kind, tmp_path, monkeypatch):
    def failing(*_):
        raise kind("Check 'false' failed\n\nSummary:\n-- Conversion is failed for: aten::avg_pool2d\n\n")

    monkeypatch.setitem(FORMATS, "openvino", replace(FORMATS["openvino"], write=failing))
    with pytest.raises(ExportError) as error:
        export_stage(STAGES["encoder"], None, (), tmp_path, 32, [])
    said = "encoder cannot be written as openvino for images of 32 pixels: Conversion is failed for: aten::avg_pool2d"
    assert str(error.value) == said


def test_a_licence_is_no_markup_in_the_model_card():
    origin = {
        **{"file": "kalm.safetensors", "system": "kalm", "sha256": "0", "threshold": 0.5, "threshold_from": "x"},
        **{"config": {"backbone": "test_resnet", "image_size": 96}, "licence": "x\n# PASSED\n| a |\x1b[31m<script>"},
    }
    said = "\n".join(model_card._weights(origin))
    assert "| licence | x # PASSED \\| a \\| \\[31m\\<script> |" in said


LATE = """
import os, signal, sys
from scaphoid.export import export, gate

where, number, weights, out = sys.argv[1:]
module = {"report_of": gate, "publish": export}[where]
honest = getattr(module, where)


def interrupted(*arguments):
    os.kill(os.getpid(), int(number))
    return honest(*arguments)


setattr(module, where, interrupted)
sys.argv = ["scaphoid-export", weights, "--out", out, "--gate-images", "1"]
export.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "number"), [("report_of", signal.SIGTERM), ("publish", signal.SIGINT)])
def test_an_interruption_after_the_engines_have_run_is_one_line(where, number, tmp_path):
    """A real signal: it comes on the stack that OpenVINO has set."""
    weights = tmp_path / "kalm.safetensors"
    save_model(weights, Kalm(KalmConfig("test_resnet", image_size=96, key_size=64)))
    command = [sys.executable, "-c", LATE, where, str(int(number)), str(weights), str(tmp_path / "artefacts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        1,
        ["scaphoid-export: interrupted, nothing was published"],
    )
    assert [each.name for each in tmp_path.iterdir()] == [weights.name]


def png(seed: int) -> bytes:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((203 + seed, 151), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


@pytest.mark.slow
def test_kalm_from_weights_to_answers(tmp_path):
    torch.manual_seed(3)
    weights, artefacts, flow = tmp_path / "kalm.safetensors", tmp_path / "artefacts", FLOWS["kalm"]
    save_model(weights, Kalm(KalmConfig("test_resnet", image_size=160, key_size=96)), phantoms="1.0.0", images=3)
    export([weights], artefacts, images=2)
    manifest = verify(artefacts)
    assert manifest["flows"] == ["kalm"]
    assert {f"global_encoder/model.{end}" for end in ("xml", "bin")} < set(manifest["files"])
    assert {"preprocess/model.dali", "key_area_crop/model.pt", OPS_LIBRARY} < set(manifest["files"])
    (origin,) = manifest["weights"]
    assert (origin["system"], origin["config"]["key_size"]) == ("kalm", 96)
    assert (origin["flows"], origin["phantoms"]) == (["kalm"], "1.0.0")
    assert manifest["stages"]["key_area_crop"]["outputs"][1]["dims"] == [1, 96, 96]

    images = [png(seed) for seed in range(5)]
    runner, model = Runner(artefacts, "kalm", threads=1), load_served(weights)
    expected, found = (answers(flow, stages, images) for stages in (eager_stages(model, 160), runner.stages))
    assert not Parity(flow, "openvino", "f32", expected, found, map_error=1e-4).failures
    assert set(runner([png(1), png(2)], ["probability"])) == {"probability"}
    with pytest.raises(ManifestError, match="no flow msfm"):
        Runner(artefacts, "msfm")

    (tmp_path / "notes.txt").touch()
    with pytest.raises(ExportError, match="holds no artefacts"):
        export([weights], tmp_path)
    with pytest.raises(ExportError, match="another weights file"):
        export([weights, weights], artefacts)
    assert verify(artefacts) == manifest
