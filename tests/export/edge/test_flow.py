"""A flow without torch: its answers are the runner's, one bad image fails alone, and torch and DALI stay out."""

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nvidia.dali")

from scaphoid.export.artefacts import ManifestError, read_manifest, write_manifest  # noqa: E402
from scaphoid.export.edge.decode import decode  # noqa: E402
from scaphoid.export.edge.flow import BATCH, Flow  # noqa: E402
from scaphoid.export.runner import Runner  # noqa: E402
from scaphoid.trainer.flows import FLOWS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")]


@pytest.fixture(scope="module", params=["msfm", "msfm_fma", "kalm"])
def flow(request, artefacts) -> Flow:
    return Flow.load(artefacts, request.param, threads=1)


def test_answers_are_the_runners(flow, artefacts, radiograph):
    """Both get the same decoded images: boxes to the bit, for maps and pixels are the same and the ops' C code too;
    probabilities to a rounding of the last bit in softmax."""
    encoded = [radiograph(seed) for seed in range(BATCH + 3)]
    found = flow.predict(encoded)
    decoded = [decode(each, 160) for each in encoded]
    runner = Runner(artefacts, flow.name, threads=1)
    for start in range(0, len(encoded), BATCH):  # the same batches: engines sum in an order that depends on them
        images, sizes = zip(*decoded[start : start + BATCH], strict=True)
        given = {"image": torch.from_numpy(np.stack(images)), "original_size": torch.tensor(sizes, dtype=torch.int32)}
        with torch.inference_mode():
            expected = runner.flow.run(runner.stages, given, runner.flow.outputs)
        for row, result in enumerate(found[start : start + BATCH]):
            wanted = {name: expected[name][row].numpy() for name in runner.flow.outputs}
            assert result.reason is None
            assert result.box == wanted["box"].tolist()
            assert result.margin == wanted["margin"].item()
            assert result.probability == pytest.approx(wanted["probability"].item(), abs=1e-6)
            for stage, probability in result.stages.items():
                assert probability == pytest.approx(wanted[f"{stage}_probability"].item(), abs=1e-6)
            if flow.name != "kalm":
                assert result.main_box == wanted["main_box"].tolist()
                assert [window["box"] for window in result.windows] == wanted["window_boxes"].tolist()
                assert [window["score"] for window in result.windows] == wanted["window_scores"].tolist()
                assert result.score == pytest.approx(wanted["probability_with_parts"].item(), abs=1e-6)
            assert (result.height, result.width) == sizes[row]


def test_one_bad_image_fails_alone(flow, radiograph, tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(radiograph(1))
    (tmp_path / "text.png").write_text("no image")
    reference, _ = flow.predict([good, good])  # a batch of two, as below
    images = [good, b"", tmp_path / "text.png", tmp_path / "missing.png", tmp_path, good, radiograph(2)[:-30]]
    results = flow.predict(images)
    assert [result.image for result in results[:3]] == [str(good), "image 1", str(tmp_path / "text.png")]
    assert results[0].box == results[5].box == reference.box
    assert results[0].probability == pytest.approx(reference.probability, abs=1e-5)
    reasons = [result.reason or "" for result in results]
    expected = ["", "empty", "not an image", "No such file", "directory", "", "truncated"]
    for reason, told in zip(reasons, expected, strict=True):
        assert told in reason
        assert bool(told) == bool(reason)
    assert results[1].probability is None
    assert flow.predict([]) == []


def test_only_what_is_asked_for_is_computed(flow, radiograph):
    (whole,) = flow.predict([radiograph(4)])
    (part,) = flow.predict([radiograph(4)], ["box", "probability"])
    assert (part.box, part.probability, part.stages, part.windows) == (whole.box, whole.probability, {}, [])
    plan = flow._plan_for(("probability", "box"), 1)
    assert "parts_logits" not in plan.arrays
    with pytest.raises(ValueError, match="has no output"):
        flow.predict([radiograph(4)], ["diagnosis"])


def test_arrays_are_allocated_once_for_each_batch_size(flow, radiograph):
    images = [radiograph(seed) for seed in range(3)]
    flow.predict(images)
    plan = flow._plan_for(flow.outputs, 3)
    places = {name: array.ctypes.data for name, array in plan.arrays.items()}
    first = [result.probability for result in flow.predict(images)]
    assert flow._plan_for(flow.outputs, 3) is plan
    assert {name: array.ctypes.data for name, array in plan.arrays.items()} == places
    assert [result.probability for result in flow.predict(images[::-1])] == pytest.approx(first[::-1], abs=1e-5)


def test_artefacts_that_do_not_fit_are_refused(artefacts, tmp_path):
    with pytest.raises(ManifestError, match="no flow plain"):
        Flow.load(artefacts, "plain")
    manifest = read_manifest(artefacts)
    for stage in manifest["stages"].values():
        stage.pop("settings", None)
    write_manifest(tmp_path, {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(ManifestError, match="export the weights again"):
        Flow.load(tmp_path, "msfm")


def test_neither_torch_nor_dali_is_imported(artefacts, radiograph, tmp_path):
    (tmp_path / "wrist.png").write_bytes(radiograph(1))
    program = (
        "import json, sys\n"
        "from scaphoid.export.edge.flow import Flow\n"
        "results = [Flow.load(sys.argv[1], name, threads=1).predict([sys.argv[2]])[0] for name in sys.argv[3:]]\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in ('torch', 'nvidia', 'timm', 'cv2')]\n"
        "print(json.dumps([heavy, [result.probability for result in results]]))\n"
    )
    command = [sys.executable, "-c", program, artefacts, tmp_path / "wrist.png", *FLOWS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy, probabilities = json.loads(done.stdout)
    assert heavy == []
    here = [Flow.load(artefacts, name, threads=1).predict([tmp_path / "wrist.png"])[0].probability for name in FLOWS]
    assert probabilities == pytest.approx(here, abs=1e-5)
