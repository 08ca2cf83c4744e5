import json
import shutil

import pytest

from scaphoid.export.artefacts import DOCUMENTS, MANIFEST, OPS_LIBRARY, ManifestError, verify, write_manifest
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import CONFIGS, assemble
from scaphoid.triton_repo.configs import ACCEPTED, CONFIG, TRAINED_ON_PHANTOMS, WEIGHTS, ConfigError, check, read

SIZES = {"height": 230, "width": 230, "map_height": 8, "map_width": 9, "part_height": 115, "part_width": 115}
SIZES |= {"key_height": 115, "key_width": 115, "bytes": 33}


def describe(tensors):
    return [{"name": t.name, "dtype": t.dtype, "dims": [SIZES.get(dim, dim) for dim in t.dims]} for t in tensors]


def make_artefacts(folder, flows=("msfm", "msfm_fma", "kalm"), precision="f32", weights="ab12", origins=None):
    """Artefacts as scaphoid-export lays them out, with words for engines: assembling does not look inside."""
    stages = {}
    for name in {name for flow in flows for name in FLOWS[flow].stages}:
        stage = STAGES[name]
        (folder / name).mkdir(parents=True)
        (folder / name / "model.bin").write_text(f"engine of {name}")
        stages[name] = {"kind": stage.kind, "inputs": describe(stage.inputs), "outputs": describe(stage.outputs)}
    (folder / OPS_LIBRARY).write_text("library")
    content = {"flows": list(flows), "precision": precision, "image_size": 230, "stages": stages}
    origins = origins or [{"file": "w.safetensors", "sha256": weights, "flows": list(flows)}]
    write_manifest(folder, content | {"weights": origins})
    return folder


@pytest.fixture
def artefacts(tmp_path):
    return make_artefacts(tmp_path / "artefacts")


def test_repository_layout(artefacts, tmp_path):
    repository = tmp_path / "repository"
    assemble(artefacts, repository)
    manifest = verify(repository)
    assert manifest["flows"] == ["msfm", "msfm_fma", "kalm"]
    for stage in STAGES:
        assert (repository / stage / "1" / "model.bin").read_text() == f"engine of {stage}"
        assert f"{stage}/{CONFIG}" in manifest["files"]
    for flow in FLOWS:
        assert (repository / flow / "1").is_dir()


def test_open_dims_become_the_artefacts_numbers(artefacts, tmp_path):
    assemble(artefacts, tmp_path / "repository")
    encoder = check(tmp_path / "repository" / "encoder" / CONFIG)
    assert [list(tensor.dims) for tensor in [*encoder.input, *encoder.output]] == [[1, 230, 230], [2], [8, 9], [8, 9]]
    preprocess = check(tmp_path / "repository" / "preprocess" / CONFIG)
    assert list(preprocess.input[0].dims) == [-1]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_engines_get_the_precision_of_the_artefacts(tmp_path, precision):
    assemble(make_artefacts(tmp_path / "artefacts", ["kalm"], precision), tmp_path / "repository")
    for name in ("global_encoder", "local_encoder"):
        parameters = read(tmp_path / "repository" / name / CONFIG).parameters
        assert parameters["INFERENCE_PRECISION_HINT"].string_value == precision
        assert ("HINT_BF16" in parameters) == (precision == "bf16")


def test_retrained_weights_show_in_every_flow(tmp_path):
    found = []
    for name, weights in (("first", "ab12"), ("again", "ab12"), ("retrained", "cd34")):
        assemble(make_artefacts(tmp_path / name, weights=weights), tmp_path / "repository")
        found.append(
            {check(tmp_path / "repository" / flow / CONFIG).parameters[WEIGHTS].string_value for flow in FLOWS}
        )
    assert all(len(each) == 1 and len(*each) == 8 for each in found)
    assert found[0] == found[1] != found[2]


def test_weights_that_know_phantoms_alone_mark_their_flows(tmp_path):
    origins = [
        {"file": "m", "sha256": "ab12", "flows": ["msfm", "msfm_fma"]},
        {"file": "k", "sha256": "cd34", "flows": ["kalm"], "phantoms": "1.0.0"},
    ]
    assemble(make_artefacts(tmp_path / "artefacts", origins=origins), tmp_path / "repository")
    parameters = {flow: check(tmp_path / "repository" / flow / CONFIG).parameters for flow in FLOWS}
    assert parameters["kalm"][TRAINED_ON_PHANTOMS].string_value == "1.0.0"
    assert TRAINED_ON_PHANTOMS not in parameters["msfm"]
    assert TRAINED_ON_PHANTOMS not in parameters["msfm_fma"]


def test_artefacts_that_failed_their_gate_mark_every_flow(artefacts, tmp_path):
    content = verify(artefacts)
    assemble(artefacts, tmp_path / "repository")
    assert ACCEPTED not in check(tmp_path / "repository" / "kalm" / CONFIG).parameters
    for name in DOCUMENTS:
        (artefacts / name).write_text(f"{name} of the gate")
    content["parity"] = {"passed": False, "failures": ["encoder: logits differ by 0.2"], "accepted": "a trial"}
    write_manifest(artefacts, {key: value for key, value in content.items() if key != "files"})
    assemble(artefacts, tmp_path / "repository")
    for flow in FLOWS:
        line = check(tmp_path / "repository" / flow / CONFIG).parameters[ACCEPTED].string_value
        assert "logits differ by 0.2" in line
        assert "a trial" in line
    assert {*DOCUMENTS} < set(verify(tmp_path / "repository")["files"])


def test_one_flow_brings_its_models_only(tmp_path):
    assemble(make_artefacts(tmp_path / "artefacts", ["kalm"]), tmp_path / "repository")
    models = {path.parent.name for path in (tmp_path / "repository").glob(f"*/{CONFIG}")}
    assert models == {"kalm", *FLOWS["kalm"].stages}


def test_an_earlier_repository_is_replaced_and_a_foreign_folder_is_not(artefacts, tmp_path):
    assemble(artefacts, tmp_path / "repository")
    assemble(artefacts, tmp_path / "repository")
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis"):
        assemble(artefacts, foreign)
    assert (foreign / "chapter1.tex").exists()


def test_changed_missing_and_added_files_are_named(artefacts, tmp_path):
    repository = tmp_path / "repository"
    assemble(artefacts, repository)
    engine = repository / "encoder" / "1" / "model.bin"
    original = engine.read_text()
    engine.write_text("another engine")
    with pytest.raises(ManifestError, match=r"encoder/1/model\.bin changed"):
        verify(repository)
    engine.unlink()
    with pytest.raises(ManifestError, match=r"encoder/1/model\.bin is missing"):
        verify(repository)
    engine.write_text(original)
    (repository / "encoder" / "2").mkdir()
    (repository / "encoder" / "2" / "model.bin").write_text("a version that nobody assembled")
    with pytest.raises(ManifestError, match=r"encoder/2/model\.bin is not in the manifest"):
        verify(repository)


def test_damaged_artefacts_are_not_assembled(artefacts, tmp_path):
    (artefacts / "encoder" / "model.bin").write_text("other weights")
    with pytest.raises(ManifestError, match="encoder"):
        assemble(artefacts, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_no_manifest_and_another_format(artefacts, tmp_path):
    with pytest.raises(ManifestError, match=f"no {MANIFEST}"):
        verify(tmp_path)
    manifest = json.loads((artefacts / MANIFEST).read_text())
    (artefacts / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ManifestError, match="format 99"):
        verify(artefacts)


def test_permuted_outputs_are_refused(artefacts, tmp_path):
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    path = configs / "parts_result" / CONFIG
    text = path.read_text()
    swapped = text.replace('"parts_probability"', '"x"').replace('"probability_with_parts"', '"parts_probability"')
    path.write_text(swapped.replace('"x"', '"probability_with_parts"'))
    with pytest.raises(ConfigError, match="output names, in order"):
        assemble(artefacts, tmp_path / "repository", configs)
