import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from scaphoid.export import workspace
from scaphoid.export.artefacts import (
    DOCUMENTS,
    GPU_FILES,
    MANIFEST,
    OPS_LIBRARY,
    WARMUP,
    ManifestError,
    verify,
    write_manifest,
)
from scaphoid.export.tensorrt_engines import build_engines
from scaphoid.export.tensorrt_engines.build_engines import build_all, make_jobs, onnx_file
from scaphoid.export.tensorrt_engines.load_engines import EngineError
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import CONFIGS, GUARD_MODULES, PACKAGE, Engines, assemble, main
from scaphoid.triton_repo.configs import ACCEPTED, CONFIG, TRAINED_ON_PHANTOMS, WEIGHTS, ConfigError, check, read
from scaphoid.triton_repo.memory import BOUNDED, SERVER_FLAGS
from scaphoid.triton_repo.rules import check_assembled
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.installation import installation

SIZES = {"height": 230, "width": 230, "map_height": 8, "map_width": 9, "part_height": 115, "part_width": 115}
SIZES |= {"key_height": 115, "key_width": 115, "bytes": 33}
BYTES = {"UINT8": 1, "INT32": 4, "FP32": 4}
TENSORRT = SimpleNamespace(__name__="tensorrt", __version__="10.13.0")
GPU = "a GPU, compute capability 9.0"


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


def add_gpu_files(folder):
    """What an export with --formats onnx adds."""
    content = {key: value for key, value in verify(folder).items() if key != "files"}
    (folder / "onnx").mkdir()
    (folder / GPU_FILES).mkdir()
    (folder / GPU_FILES / "model.dali").write_text("the pipeline of a GPU")
    for name, stage in content["stages"].items():
        if stage["kind"] == "encoder":
            (folder / onnx_file(name, "f16")).write_text(f"ONNX of {name}")
        for tensor in stage["inputs"]:
            path = folder / GPU_FILES / WARMUP / name / tensor["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(math.prod(tensor["dims"]) * BYTES[tensor["dtype"]]))
    write_manifest(folder, content)
    return folder


def build(artefacts, folder, trt=TENSORRT, gpu=GPU):
    """Words for engines, with the manifest that building leaves."""
    assert build_all(make_jobs(artefacts, "f16", trt, gpu), folder, lambda job, _, plan, __: plan.write_text(job.stage))
    return Engines(folder, trt, gpu)


@pytest.fixture
def gpu_artefacts(tmp_path):
    return add_gpu_files(make_artefacts(tmp_path / "artefacts"))


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


def test_a_repository_is_not_taken_for_artefacts(artefacts, tmp_path):
    assemble(artefacts, tmp_path / "repository")
    with pytest.raises(ManifestError, match=r"repository is a model repository: give the artefacts") as refused:
        assemble(tmp_path / "repository", tmp_path / "another")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "another").exists()


def test_a_place_that_a_repository_cannot_take_is_refused(artefacts, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(artefacts)
    for place in (artefacts, artefacts / "repository", tmp_path, tmp_path / "link", tmp_path / "link" / "repository"):
        with pytest.raises(OSError, match="are the same or lie in one another"):
            assemble(artefacts, place)
    verify(artefacts)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (Path(), Path("..", "here")):
        with pytest.raises(OSError, match="is the current directory"):
            assemble(artefacts, place)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mount")
    with pytest.raises(OSError, match="mount is a mount point"):
        assemble(artefacts, tmp_path / "mount")
    assert {each.name for each in tmp_path.iterdir()} == {"artefacts", "here", "link"}


def test_behind_a_link_the_repository_is_replaced_and_not_the_link(artefacts, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "repository")
    for weights in ("cd34", "ef56"):
        assemble(make_artefacts(tmp_path / weights, weights=weights), tmp_path / "link")
        assert verify(tmp_path / "repository")["weights"][0]["sha256"] == weights
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_repository_that_cannot_be_replaced_stays(artefacts, tmp_path, monkeypatch, error):
    repository, rename = tmp_path / "repository", Path.rename
    assemble(artefacts, repository)
    before = verify(repository)

    def failing(path: Path, target: Path) -> Path:
        if (path.name, target) == ("new", repository):
            assert not repository.exists()
            raise error("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    retrained = make_artefacts(tmp_path / "retrained", weights="cd34")
    with pytest.raises(error, match="no"):
        assemble(retrained, repository)
    assert verify(repository) == before
    assert not (tmp_path / "repository.partial").exists()


def test_what_was_killed_between_two_renames_is_put_back(artefacts, tmp_path):
    repository, work = tmp_path / "repository", tmp_path / "repository.partial"
    assemble(artefacts, repository)
    workspace.make(work)
    repository.rename(work / "old")
    broken = make_artefacts(tmp_path / "broken")
    configs = tmp_path / "configs"
    configs.mkdir()
    with pytest.raises((ConfigError, OSError)):
        assemble(broken, repository, configs=configs)
    verify(repository)
    assert not work.exists()


def test_a_foreign_folder_beside_the_repository_stays(artefacts, tmp_path):
    foreign = tmp_path / "repository.partial"
    foreign.mkdir()
    (foreign / "old").mkdir()
    with pytest.raises(FileExistsError, match="partial is in the way and is not deleted unasked") as refused:
        assemble(artefacts, tmp_path / "repository")
    assert "\n" not in str(refused.value)
    assert [each.name for each in foreign.iterdir()] == ["old"]
    assert not (tmp_path / "repository").exists()


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
    shutil.copytree(CONFIGS["cpu"], configs)
    path = configs / "parts_result" / CONFIG
    text = path.read_text()
    swapped = text.replace('"parts_probability"', '"x"').replace('"probability_with_parts"', '"parts_probability"')
    path.write_text(swapped.replace('"x"', '"probability_with_parts"'))
    with pytest.raises(ConfigError, match="output names, in order"):
        assemble(artefacts, tmp_path / "repository", configs=configs)


def test_a_rule_that_is_broken_is_found_before_a_repository_is_replaced(artefacts, tmp_path):
    assemble(artefacts, tmp_path / "repository")
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS["cpu"], configs)
    path = configs / "encoder" / CONFIG
    path.write_text(path.read_text().replace("count: 1", "count: 1, kind: KIND_GPU"))
    with pytest.raises(ConfigError, match="kind of an instance_group"):
        assemble(artefacts, tmp_path / "repository", configs=configs)
    verify(tmp_path / "repository")


def test_a_repository_for_a_gpu(gpu_artefacts, tmp_path):
    repository = tmp_path / "repository"
    assemble(gpu_artefacts, repository, build(gpu_artefacts, tmp_path / "engines"))
    manifest = verify(repository)
    assert (manifest["target"], manifest["gpu"], manifest["tensorrt"]) == ("gpu", GPU, "10.13.0")
    assert (repository / "guard" / "1" / "model.py").is_file()
    for name, stage in STAGES.items():
        (file,) = (repository / name / "1").iterdir()
        expected = {"preprocess": ("model.dali", "the pipeline of a GPU"), "encoder": ("model.plan", name)}
        assert (file.name, file.read_text()) == expected.get(stage.kind, ("model.bin", f"engine of {name}"))
    encoder = check(repository / "encoder" / CONFIG, "gpu")
    assert {tuple(spec.input["image"].dim) for spec in encoder.optimization.cuda.graph_spec} == {(1, 230, 230)}
    assert {tuple(warmup.inputs["image"].dims) for warmup in encoder.model_warmup} == {(1, 230, 230)}
    for name in ("guard", "preprocess"):
        config = check(repository / name / CONFIG, "gpu")
        assert list(config.model_warmup[0].inputs["encoded"].dims) == [33]
    for flow in FLOWS:
        bounded = read(repository / flow / BOUNDED)
        limit = bounded.ensemble_scheduling.max_inflight_requests
        assert limit > 32 + 32  # both queues of the first step, so that a thread never waits for it
        bounded.ensemble_scheduling.ClearField("max_inflight_requests")
        assert bounded == read(repository / flow / CONFIG)
    assert "--cuda-memory-pool-byte-size=0:" in (repository / SERVER_FLAGS).read_text()


GUARD_ALONE = """
import sys
sys.dont_write_bytecode = True
sys.path += sys.argv[1:]  # numpy, as the vendor's image has it; site-packages are left out by -S
import types
backend = types.ModuleType("triton_python_backend_utils")
sys.modules["triton_python_backend_utils"] = backend
exec(open(sys.argv[1] + "/model.py").read(), {"__file__": sys.argv[1] + "/model.py", "__name__": "1.model"})
from scaphoid.trainer.data.guard import RejectedImage, check_encoded
try:
    check_encoded(b"a radiograph, honestly")
except RejectedImage as rejected:
    print(rejected.reason)
ours = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("scaphoid.")}
print(*sorted(ours))
assert all(path.startswith(sys.argv[1]) for path in ours.values()), ours
assert "PIL" not in sys.modules
"""


def test_the_guard_is_the_packages_and_needs_nothing_but_numpy(gpu_artefacts, tmp_path):
    """Byte for byte, in the manifest, and complete: it runs where neither this package nor Pillow is."""
    repository = tmp_path / "repository"
    assemble(gpu_artefacts, repository, build(gpu_artefacts, tmp_path / "engines"))
    files = verify(repository)["files"]
    folder = repository / "guard" / "1"
    for name in GUARD_MODULES:
        assert (folder / "scaphoid" / name).read_bytes() == (PACKAGE / name).read_bytes()
        assert f"guard/1/scaphoid/{name}" in files
    assert "guard/1/model.py" in files
    assert len(list(folder.rglob("*.py"))) == len(GUARD_MODULES) + 1
    numpy_alone = tmp_path / "numpy_alone"
    numpy_alone.mkdir()
    for path in Path(numpy.__file__).parents[1].glob("numpy*"):
        (numpy_alone / path.name).symlink_to(path)
    command = [sys.executable, "-I", "-S", "-c", GUARD_ALONE, str(folder), str(numpy_alone)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reason, modules = done.stdout.splitlines()
    assert reason.startswith("not an image")
    modules_of = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in GUARD_MODULES}
    assert set(modules.split()) == {f"scaphoid.{name}" for name in modules_of}
    verify(repository)


def test_the_wheel_serves_no_repository_for_a_gpu(gpu_artefacts, tmp_path):
    assemble(gpu_artefacts, tmp_path / "repository", build(gpu_artefacts, tmp_path / "engines"))
    with pytest.raises(ServerError, match="is for a GPU: serve it in the vendor's container"):
        installation(tmp_path / "repository", tmp_path)


def test_engines_of_another_gpu_are_refused_with_the_command_that_builds_them(gpu_artefacts, tmp_path):
    build(gpu_artefacts, tmp_path / "engines", gpu="another GPU")
    engines = Engines(tmp_path / "engines", TENSORRT, GPU)
    with pytest.raises(EngineError, match="built for another GPU") as error:
        assemble(gpu_artefacts, tmp_path / "repository", engines)
    command = f"-m {build_engines.__name__} {gpu_artefacts} {tmp_path / 'engines'} --precision f16"
    assert str(error.value).endswith(command)
    assert not list(tmp_path.glob("repository*"))


def test_engines_by_another_tensorrt_of_other_onnx_or_changed_are_refused(gpu_artefacts, tmp_path):
    older = SimpleNamespace(__name__="tensorrt", __version__="10.9.0")
    build(gpu_artefacts, tmp_path / "older", older)
    with pytest.raises(EngineError, match=r"another TensorRT: tensorrt 10\.9\.0, here it is tensorrt 10\.13\.0"):
        assemble(gpu_artefacts, tmp_path / "repository", Engines(tmp_path / "older", TENSORRT, GPU))
    engines = build(gpu_artefacts, tmp_path / "engines")
    next(engines.folder.glob("encoder-*.plan")).write_text("fma_encoder")
    with pytest.raises(EngineError, match="changed since it was built"):
        assemble(gpu_artefacts, tmp_path / "repository", engines)
    engines = build(gpu_artefacts, tmp_path / "engines")
    (gpu_artefacts / onnx_file("kalm", "f16")).unlink(missing_ok=True)
    (gpu_artefacts / onnx_file("encoder", "f16")).write_text("ONNX of retrained weights")
    content = json.loads((gpu_artefacts / MANIFEST).read_text())
    write_manifest(gpu_artefacts, {key: value for key, value in content.items() if key != "files"})
    with pytest.raises(EngineError, match="other ONNX"):
        assemble(gpu_artefacts, tmp_path / "repository", engines)


def test_artefacts_without_what_a_gpu_needs_say_how_to_export_them(artefacts, tmp_path):
    (tmp_path / "engines").mkdir()
    with pytest.raises((ManifestError, EngineError), match="export it with --formats onnx"):
        assemble(artefacts, tmp_path / "repository", Engines(tmp_path / "engines", TENSORRT, GPU))


def test_what_was_changed_after_assembling_is_found(gpu_artefacts, tmp_path):
    repository = tmp_path / "repository"
    content = assemble(gpu_artefacts, repository, build(gpu_artefacts, tmp_path / "engines"))
    check_assembled(repository, content)

    def changed(name, told, change):
        path = repository / name
        original = path.read_bytes()
        change(path)
        with pytest.raises(ConfigError, match=told):
            check_assembled(repository, content)
        path.write_bytes(original)

    flags = r"flags: expected \['--model-config-name=bounded', '--cuda-memory-pool-byte-size=0:\d+'\], got \[\]"
    changed(SERVER_FLAGS, flags, lambda path: path.write_text(""))
    changed(
        f"kalm/{BOUNDED}",
        "max_inflight_requests",
        lambda path: path.write_text(path.read_text() + 'metric_tags { key: "a", value: "b" }'),
    )
    changed("encoder/warmup/image", "bytes of image: expected 52900, got 3", lambda path: path.write_text("abc"))
    changed("result/warmup/part_boxes", "it is missing", lambda path: path.unlink())
    open_dims = lambda path: path.write_text(path.read_text().replace("dims: 8", "dims: -1"))  # noqa: E731
    changed(f"suppress/{CONFIG}", "suppress", open_dims)
    check_assembled(repository, content)


def test_the_command_wants_engines_for_a_gpu_and_a_gpu_for_engines(monkeypatch, gpu_artefacts, tmp_path):
    arguments = ["assemble", str(gpu_artefacts), str(tmp_path / "repository"), "--target", "gpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="--target gpu and --engines DIR go together"):
        main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--engines", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"assemble: no (Python package tensorrt|NVIDIA driver)"):
        main()
    monkeypatch.setattr(sys, "argv", arguments[:3])
    main()
    assert verify(tmp_path / "repository")["target"] == "cpu"
