"""An edited manifest is refused in one line, where it is read, by whatever reads it."""

import copy

import pytest

from scaphoid.export.artefacts import MANIFEST, ManifestError, accepted, read_manifest, verify, write_manifest
from scaphoid.export.edge.settings import settings
from scaphoid.export.manifest import REMEDY, RULES, SETTINGS, check
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS

SIZES = {"height": 160, "width": 160, "part_height": 96, "part_width": 96, "key_height": 96, "key_width": 96}
SIZES |= {"map_height": 5, "map_width": 6, "bytes": 99}
NUMBERS = {
    "suppress": {"theta": 0.6, "r": 0.15},
    "part_crops": {
        **{"part_size": 96, "shapes": [2, 2, 3, 2, 4, 4], "group_sizes": [2, 1], "kept": [3, 4]},
        "iou_threshold": 0.25,
    },
    "result": {"image_size": 160, "gamma": 0.5},
    "key_area_crop": {
        **{"key_size": 96, "height_weight": [0.1] * 5, "height_bias": [0.0]},
        **{"width_weight": [0] * 6, "width_bias": [-1e-3]},
    },
    "key_area_result": {"image_size": 160},
}


def described(tensors) -> list[dict]:
    return [
        {"name": tensor.name, "dtype": tensor.dtype, "dims": [SIZES.get(dim, dim) for dim in tensor.dims]}
        for tensor in tensors
    ]


@pytest.fixture
def manifest() -> dict:
    """As scaphoid-export writes it, but for the files."""
    stages = {
        name: {"kind": stage.kind, "inputs": described(stage.inputs), "outputs": described(stage.outputs)}
        | ({"settings": copy.deepcopy(NUMBERS.get(name, {}))} if stage.kind == "glue" else {})
        for name, stage in STAGES.items()
    }
    layers = {"global_encoder": ["/conv_stem/Conv"], "local_encoder": []}
    figures = dict.fromkeys(("auroc", "kappa", "probability", "iou_median", "iou_p5"), 0.5)
    quantized = {"flow": "kalm", "calibration_images": 40, "validation_images": 40, "layers": {"global_encoder": 9}}
    return {
        "flows": list(FLOWS),
        "precision": "int8",
        "image_size": 160,
        "weights": [{"sha256": "ab", "flows": ["kalm"], "phantoms": "1.0.0"}],
        "thresholds": {"msfm": 0.3, "kalm": 1},
        "versions": {"torch": "2.14.1"},
        "formats": ["torchscript", "openvino"],
        "stages": stages,
        "quantization": [quantized | {"rounds": [{**figures, "fp32_layers": layers}], "notes": [], "failures": []}],
        "parity": {"passed": False, "failures": ["kappa"], "accepted": "a trial", "images": {"origin": "phantoms"}},
        "reference": {"msfm": {"margin": {"edges": [0.1, 2], "counts": [5, 0, 9]}}},
    }


def put(content: dict, place: str, value: object) -> None:
    """Edit the part at `place`, as an error names it; LOST removes it."""
    keys = place.replace("[", ".").replace("]", "").split(".")
    *path, last = [int(each) if each.isdecimal() else each for each in keys]
    for each in path:
        content = content[each]
    if value is LOST:
        del content[last]
    else:
        content[last] = value


LOST = object()
EDITS = {
    "flows": [None, [], "msfm", ["unknown"], [["msfm"]], ["kalm", "kalm"], 3],
    "precision": [None, "zz", ["f32"], "f16"],
    "image_size": [None, "x", -3, 0, 1.5, True, 10**400, 161],
    "weights": [None, {}, "x", []],
    "weights[0]": [None, []],
    "weights[0].sha256": [LOST, 5],
    "weights[0].flows": ["kalm"],
    "thresholds": [[0.5], None],
    "thresholds.msfm": ["0.5", float("nan"), 1.5, -0.1, True, 10**400],
    "versions": [[1], "x"],
    "formats": [None, "onnx", {"onnx": 1}],
    "formats[1]": [7],
    "stages": [None, [], "x"],
    "stages.encoder": [LOST, None, [], "x"],
    "stages.encoder.kind": [LOST, "glue", None, []],
    "stages.encoder.outputs": [LOST, None, [], [{}], {}, 5],
    "stages.encoder.outputs[1]": [None, []],
    "stages.encoder.outputs[1].name": [LOST, "other", 5],
    "stages.encoder.outputs[1].dtype": [LOST, "FP16"],
    "stages.encoder.outputs[1].dims": [LOST, None, [5], [5, -6], [5, 6.0], [True, 6], "56", [10**9, 6]],
    "stages.encoder.inputs[0].dims": [[1, 160, 161], [3, 160, 160]],
    "stages.part_crops.outputs[0].dims": [[8, 4]],
    "stages.part_crops.outputs[2].dims": [[7, 1, 96, 97]],
    "stages.object_crop.inputs[1].dims": [[5, 7]],  # the encoder makes [5, 6]
    "stages.suppress.settings": [None, [], {}],
    "stages.suppress.settings.theta": [LOST, None, "x", float("inf")],
    "stages.part_crops.settings.shapes": [LOST, [], [2, 2], [2, 2, 3, 2, 6, 4], [2, 2, 3, 2, 4, -4], 3],
    "stages.part_crops.settings.group_sizes": [[0, 1], "x"],
    "stages.part_crops.settings.kept": [[3], [3, 3], [3, 4.0]],
    "stages.part_crops.settings.iou_threshold": [-0.1, 1.1],
    "stages.result.settings.image_size": [161, LOST],
    "stages.result.settings.gamma": [-0.5, 0],
    "stages.key_area_crop.settings.width_weight": [[0] * 5, [0] * 7, [], [None] * 6, LOST],
    "stages.key_area_crop.settings.width_bias": [[], [0, 0]],
    "quantization": [{}],
    "quantization[0].layers": [LOST, {"encoder": "9"}],
    "quantization[0].rounds[0].kappa": [LOST, None],
    "parity": [None, [], True],
    "parity.passed": [LOST, "yes"],
    "parity.failures": [LOST, "kappa", [1]],
    "parity.accepted": [1, LOST],
    "parity.images": ["x", None],
    "parity.images.origin": [5],
    "reference": ["x", [], None],
    "reference.msfm": ["x", []],
    "reference.msfm.margin": [[], {}],
    "reference.msfm.margin.edges": ["x", LOST, [0.1, float("nan")], [2, 0.1], [2, 2]],
    "reference.msfm.margin.counts": [[5, 9], [5, 0, -1], [5, 0, 9.0], LOST],
}
CASES = [(place, value) for place, values in EDITS.items() for value in values]


def test_one_as_exported_passes_and_so_does_any_part_of_it(manifest, tmp_path):
    assert check(tmp_path / MANIFEST, manifest) == manifest
    for part, content in manifest.items():
        assert check(tmp_path / MANIFEST, {part: content}) == {part: content}
    assert set(RULES) - {"files"} == set(manifest)


@pytest.mark.parametrize(("place", "value"), CASES)
def test_an_edited_part_is_named(manifest, tmp_path, place, value):
    put(manifest, place, value)
    with pytest.raises(ManifestError) as error:
        check(tmp_path / MANIFEST, manifest)
    line = str(error.value)
    assert line.startswith(f"{tmp_path / MANIFEST}: {place}")
    assert ": expected " in line
    assert ", got " in line
    assert line.endswith(REMEDY)
    assert "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize("name", ["../esc", "a\nb", "décor"])
def test_a_stage_of_another_version_is_named(manifest, tmp_path, name):
    manifest["stages"][name] = {"kind": "encoder"}
    with pytest.raises(ManifestError, match="expected no stage but preprocess") as error:
        check(tmp_path / MANIFEST, manifest)
    assert "\n" not in str(error.value)


def test_a_file_whose_name_would_move_the_cursor_is_refused_and_shown_as_text(tmp_path):
    with pytest.raises(ManifestError, match="expected a name that can be printed") as error:
        check(tmp_path / MANIFEST, {"files": {"card\n\x1b[2J.md": "ab"}})
    assert str(error.value).isprintable()


def test_a_part_that_is_missing_is_missed_by_who_asks_for_it(tmp_path):
    write_manifest(tmp_path, {"flows": ["kalm"]})
    found = verify(tmp_path)
    assert found["flows"] == ["kalm"]
    assert found.get("stages") is None
    with pytest.raises(ManifestError, match=r"manifest\.json: stages: expected an object, got nothing: it was edited"):
        found["stages"]


def test_a_repository_has_parts_of_its_own(manifest, tmp_path):
    own = {"target": "gpu", "precision": "f16", "version": 2, "versions": [1, 2], "previous": None}
    assert check(tmp_path / MANIFEST, manifest | own)["versions"] == [1, 2]
    for part, value in (("versions", {"torch": "2"}), ("version", "2"), ("previous", 0), ("target", "tpu")):
        with pytest.raises(ManifestError, match=f": {part}: expected"):
            check(tmp_path / MANIFEST, manifest | own | {part: value})


NOT_ONE = ["[]", "5", "null", '{"files": []}', "[" * 9999, "\udcff", '{"files": {}, "format": 2}']


@pytest.mark.parametrize("text", NOT_ONE)
def test_what_is_no_manifest_is_said(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ManifestError, match=r"manifest\.json (is not JSON|lists no files|has format)"):
        read_manifest(tmp_path)


def test_accepted_without_a_reason_is_still_said(manifest):
    assert "does not say" in accepted({"parity": {"passed": False, "failures": [], "accepted": "a trial"}})


def test_the_settings_are_those_that_the_stages_have():
    pytest.importorskip("torch")
    pytest.importorskip("scaphoid.kernels.library")
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig
    from scaphoid.trainer.models.msfm import Msfm, MsfmConfig

    stages = Msfm(MsfmConfig("test_resnet", image_size=96, part_size=64)).stages()
    stages |= Kalm(KalmConfig("test_resnet", image_size=96, key_size=64)).stages()
    found = {name: settings(stages[name]) for name in stages if STAGES[name].kind == "glue"}
    assert {name for name, numbers in found.items() if numbers} == set(SETTINGS)
    for name, rules in SETTINGS.items():
        assert set(rules) <= set(found[name]) == set(NUMBERS[name])


@pytest.fixture
def edited(manifest, tmp_path):
    """Writes artefacts of nothing but an edited manifest."""

    def write(place: str, value: object):
        put(manifest, place, value)
        folder = tmp_path / "artefacts"
        folder.mkdir(exist_ok=True)
        write_manifest(folder, manifest)
        return folder

    return write


def checked(folder, tmp_path):
    from scaphoid.export.artefacts import main

    main([str(folder)])


def predicted(folder, tmp_path):
    from scaphoid.export.edge.flow import Flow

    Flow.load(folder, "msfm")


def run_in_process(folder, tmp_path):
    pytest.importorskip("torch")
    from scaphoid.export.runner import Runner

    Runner(folder, "msfm")


def reckoned(folder, tmp_path):
    from scaphoid.export.edge.memory import budgets

    budgets(folder, [1], "f32", 1)


def bundled(folder, tmp_path):
    from scaphoid.export.edge.bundle import bundle

    list(bundle(folder, tmp_path / "out", wheels=False))


def added(folder, tmp_path):
    from scaphoid.export.edge.versions import add

    add(tmp_path / "root", folder)


def compiled(folder, tmp_path):
    pytest.importorskip("rich")
    from scaphoid.export.rtx_compile_check import check_artefacts

    check_artefacts(folder, (86,))


def assembled(folder, tmp_path):
    from scaphoid.triton_repo.assemble import assemble

    assemble(folder, tmp_path / "repository")


READERS = [checked, added, predicted, run_in_process, reckoned, bundled, compiled, assembled]


@pytest.mark.parametrize("place", ["image_size", "stages.suppress.settings", "stages.encoder.outputs", "flows"])
@pytest.mark.parametrize("reader", READERS)
def test_whatever_reads_it_refuses_it_in_a_line(edited, tmp_path, reader, place):
    folder = edited(place, {})
    with pytest.raises((ManifestError, SystemExit), match=rf"manifest\.json: {place}[^\n]*: expected [^\n]*again$"):
        reader(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["artefacts"]


NEEDED = {predicted: ("stages", "precision", "flows"), run_in_process: ("flows",), bundled: ("stages",)}
NEEDED[assembled] = ("stages",)


@pytest.mark.parametrize(("reader", "place"), [(reader, part) for reader, parts in NEEDED.items() for part in parts])
def test_whatever_needs_a_part_misses_it_in_a_line(edited, tmp_path, reader, place, monkeypatch):
    folder = edited(place, LOST)
    monkeypatch.setattr("scaphoid.export.edge.flow.load_library", lambda: None)
    with pytest.raises(ManifestError, match=rf"manifest\.json: {place}: expected [^\n]* got nothing[^\n]*again$"):
        reader(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["artefacts"]
