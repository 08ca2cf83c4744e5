"""The builder without TensorRT: keys, profiles, resuming, giving up, bad input, and that the file stands by itself."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaphoid.export.edge.flow import BATCH, built_precision
from scaphoid.export.formats import FORMATS
from scaphoid.export.tensorrt_engines import build_engines
from scaphoid.export.tensorrt_engines.build_engines import (
    BATCHES,
    SHRINK,
    BuilderGaveUp,
    BuildError,
    build_all,
    load_tensorrt,
    make_jobs,
    onnx_file,
    read_entries,
    shapes_of,
)
from scaphoid.trainer.contracts import STAGES
from scaphoid.triton_repo.assemble import CONFIGS
from scaphoid.triton_repo.configs import CONFIG, read

FILE = Path(build_engines.__file__)
TRT = SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
GPU = "Orin, compute capability 8.7"
ENCODERS = ["encoder", "parts_encoder"]


class Builder:
    """Builds an engine that says what it was built from, in a workspace of `most` MiB at most."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.built = most, []

    def __call__(self, job, workspace, plan, timing_cache) -> None:
        self.built.append((job.stage, workspace))
        plan.write_bytes(b"begun")
        if workspace > self.most:
            raise BuilderGaveUp("out of memory")
        plan.write_bytes(f"{job.key}".encode())


def jobs_of(artefacts, precision="f16", trt=TRT, gpu=GPU, **more):
    return make_jobs(artefacts, precision, trt, gpu, **more)


def partial_files(folder):
    return [path.name for path in folder.iterdir() if "partial" in path.name]


def test_onnx_files_are_those_that_are_exported():
    form = FORMATS["onnx"]
    found = {suffix: form.path(Path(), STAGES["encoder"], suffix).as_posix() for suffix in form.files}
    assert found == {suffix: onnx_file("encoder", precision) for suffix, precision in form.files.items()}


def test_profiles_have_the_contracts_names_and_count_images(artefacts):
    (parts,) = STAGES["parts_encoder"].inputs
    manifest = json.loads((artefacts / "manifest.json").read_text())
    assert shapes_of(manifest, "parts_encoder") == {parts.name: [[batch, 7, 1, 50, 50] for batch in BATCHES]}
    assert BATCHES[0] == 1
    assert list(BATCHES) == sorted(BATCHES)


def test_profiles_take_every_batch_that_is_sent():
    served = {
        name: read(CONFIGS["gpu"] / name / CONFIG).max_batch_size for name in STAGES if STAGES[name].kind == "encoder"
    }
    assert len(served) >= 5
    assert max([*served.values(), BATCH]) <= BATCHES[-1]


def test_what_is_built_is_kept_and_a_changed_file_built_again(artefacts, tmp_path, capsys):
    engines, builder = tmp_path / "engines", Builder()
    assert build_all(jobs_of(artefacts), engines, builder)
    assert build_all(jobs_of(artefacts), engines, builder)
    assert [stage for stage, _ in builder.built] == ENCODERS
    assert capsys.readouterr().out.count("kept") == 2
    damaged = engines / jobs_of(artefacts)[1].file
    damaged.write_bytes(b"other")
    assert build_all(jobs_of(artefacts), engines, builder)
    assert [stage for stage, _ in builder.built[2:]] == [ENCODERS[1]]
    assert damaged.read_bytes() != b"other"


@pytest.mark.parametrize("other", ["onnx", "version", "gpu", "precision", "builder"])
def test_another_key_is_another_engine_beside_the_old_one(artefacts, write_artefacts, tmp_path, other):
    engines, builder = tmp_path / "engines", Builder()
    build_all(jobs_of(artefacts), engines, builder)
    changed = {
        "version": {"trt": SimpleNamespace(__name__="tensorrt", __version__="10.4.0")},
        "gpu": {"gpu": "NVIDIA L4, compute capability 8.9"},
        "precision": {"precision": "f32"},
        "builder": {"builder": "trtexec"},
    }
    if other == "onnx":
        write_artefacts("trained again")
    jobs = jobs_of(artefacts, **changed.get(other, {}))
    assert build_all(jobs, engines, builder)
    assert len(builder.built) == 4
    assert len(set(read_entries(engines)) & {path.name for path in engines.iterdir()}) == 4


def test_a_builder_that_gives_up_gets_less_workspace(artefacts, tmp_path):
    engines, builder = tmp_path / "engines", Builder(most=256)
    assert build_all(jobs_of(artefacts), engines, builder, workspace=1024)
    assert builder.built == [(stage, size) for stage in ENCODERS for size in (1024, 256)]
    assert {entry["workspace_mib"] for entry in read_entries(engines).values()} == {256}


def test_one_that_does_not_fit_leaves_the_others_alone(artefacts, tmp_path, capsys):
    engines, fits = tmp_path / "engines", Builder()

    def build(job, workspace, plan, timing_cache):
        (Builder(most=0) if job.stage == "encoder" else fits)(job, workspace, plan, timing_cache)

    assert not build_all(jobs_of(artefacts), engines, build, workspace=1600)
    sizes = ", ".join(str(1600 // each) for each in SHRINK)
    assert f"encoder: failed: not built in workspaces of {sizes} MiB" in capsys.readouterr().err
    assert [entry["stage"] for entry in read_entries(engines).values()] == ["parts_encoder"]
    assert not partial_files(engines)


def test_two_builds_into_one_folder_take_turns(artefacts, tmp_path, capsys):
    engines, first, second = tmp_path / "engines", Builder(), Builder()
    other = threading.Thread(target=build_all, args=(jobs_of(artefacts, "f32"), engines, second))

    def build(*request):
        first(*request)
        if not other.ident:
            other.start()
            other.join(timeout=0.3)  # time to write its list, were it not for the lock

    assert build_all(jobs_of(artefacts), engines, build)
    other.join(timeout=30)
    assert "another build writes into" in capsys.readouterr().out
    assert set(read_entries(engines)) == {path.name for path in engines.glob("*.plan")}
    assert len(read_entries(engines)) == 4


def test_a_flow_takes_the_engines_that_were_built(artefacts, write_artefacts, tmp_path):
    engines = tmp_path / "engines"

    def chosen() -> str:
        return built_precision(artefacts, engines, build_engines.read_manifest(artefacts), "encoder")

    assert chosen() == "f16"  # to be told that it is missing
    build_all(jobs_of(artefacts, "f32"), engines, Builder())
    assert chosen() == "f32"
    build_all(jobs_of(artefacts), engines, Builder())
    assert chosen() == "f16"
    write_artefacts("trained again")
    build_all(jobs_of(artefacts, "f32"), engines, Builder())
    assert chosen() == "f32"  # f16 is of other ONNX


def test_a_builder_without_memory_gave_up(artefacts, tmp_path, monkeypatch, capsys):
    lines = ["__version__ = '10.3.0'", "class Logger:", "    ERROR = 1", "    def __init__(self, level):"]
    (tmp_path / "tensorrt.py").write_text("\n".join([*lines, "        raise MemoryError"]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BuilderGaveUp, match=r"^exit 3: out of memory$"):
        build_engines.build_apart(jobs_of(artefacts)[0], 64, tmp_path / "plan", tmp_path / "timing.cache")
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_what_was_there(artefacts, write_artefacts, tmp_path, capsys):
    engines = tmp_path / "engines"
    build_all(jobs_of(artefacts), engines, Builder())
    before = {path.name: path.read_bytes() for path in engines.iterdir()}
    write_artefacts("trained again")

    def full(job, workspace, plan, timing_cache):
        plan.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    assert not build_all(jobs_of(artefacts), engines, full)
    said = f"encoder: failed: no space left in {engines} (No space left on device): free some, and run the same command"
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in engines.iterdir()} == before


def test_bad_input_is_named(artefacts, tmp_path):
    with pytest.raises(BuildError, match=r"no manifest of scaphoid-export: name its --out folder"):
        jobs_of(tmp_path)
    with pytest.raises(BuildError, match=r"holds no onnx/encoder\.int8\.onnx: export it"):
        jobs_of(artefacts, precision="int8")
    (artefacts / onnx_file("parts_encoder", "f16")).write_text("tampered")
    with pytest.raises(BuildError, match=r"parts_encoder\.f16\.onnx is not what the manifest lists"):
        jobs_of(artefacts)
    (tmp_path / build_engines.MANIFEST).write_text("[]")
    with pytest.raises(BuildError, match=r"engines\.json lists no scaphoid\.engines/1: remove it"):
        build_all([], tmp_path, Builder())


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda stages: stages.update({"../esc": stages["encoder"]}), r"has a stage '\.\./esc': expected letters"),
        (
            lambda stages: stages["encoder"].pop("kind"),
            r"lacks the kind, or inputs with names and dims, of the stage encoder",
        ),
        (
            lambda stages: stages["encoder"].pop("inputs"),
            r"lacks the kind, or inputs with names and dims, of the stage encoder",
        ),
        (lambda stages: stages.update(encoder=None), r"lacks the kind, or inputs with names and dims, of the stage"),
        (lambda stages: stages["encoder"]["inputs"][0].pop("name"), r"lacks the kind, or inputs"),
        (lambda stages: stages["encoder"]["inputs"][0].update(dims="123"), r"lacks the kind, or inputs"),
        (lambda stages: stages["encoder"]["inputs"][0].update(dims=[1, -9, 9]), r"lacks the kind, or inputs"),
        (lambda stages: stages["encoder"].update(inputs=[]), r"lacks the kind, or inputs"),
    ],
)
def test_an_edited_manifest_is_refused(artefacts, edit, told):
    path = artefacts / build_engines.ARTEFACTS_MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest["stages"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(BuildError, match=told):
        jobs_of(artefacts)


@pytest.mark.parametrize("lost", sorted(build_engines.ENTRY))
def test_an_edited_list_of_engines_is_refused(artefacts, tmp_path, lost):
    build_all(jobs_of(artefacts), tmp_path, Builder())
    path = tmp_path / build_engines.MANIFEST
    content = json.loads(path.read_text())
    next(iter(content[build_engines.FORMAT].values())).pop(lost)
    path.write_text(json.dumps(content))
    with pytest.raises(BuildError, match=r"engines\.json lists no scaphoid\.engines/1: remove it"):
        build_all(jobs_of(artefacts), tmp_path, Builder())


def run(artefacts, engines, packages, driver, *options) -> subprocess.Popen:
    """The command beside a made-up tensorrt of these `packages`, whose builds never end."""
    packages.mkdir()
    for name in ("tensorrt", "tensorrt_rtx"):
        lines = ["import os, time, types", "__version__ = '10.3.0'", "ComputeCapability = types.SimpleNamespace()"]
        lines += ["def Logger(level): open(os.environ['BEGUN'], 'w').close(); time.sleep(60)", "Logger.ERROR = 1"]
        (packages / f"{name}.py").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(packages), "LD_LIBRARY_PATH": str(driver)}
    return subprocess.Popen(
        [sys.executable, FILE, artefacts, engines, *options],
        env={**environment, "BEGUN": str(packages / "begun")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_leaves_nothing_half_done(artefacts, tmp_path, driver, number):
    engines, packages = tmp_path / "engines", tmp_path / "packages"
    engines.mkdir()
    (engines / f"{jobs_of(artefacts)[0].file}.partial").write_bytes(b"half")
    process = run(artefacts, engines, packages, driver)
    try:
        deadline = time.monotonic() + 30
        while not (packages / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert told == "build_engines: interrupted: engines built so far are kept, run the same command again\n"
    assert not partial_files(engines)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--compile-check", "0"], "does not compile for SM 0"),
        (["--workspace", "0"], "argument --workspace: 0: expected 1 or more"),
        (["--workspace", "-5"], "argument --workspace: -5: expected 1 or more"),
        (["--precision", "int8"], "export it with --formats onnx --precision int8 --calibration INDEX"),
    ],
)
def test_wrong_options_are_one_line(artefacts, tmp_path, driver, options, told):
    process = run(artefacts, tmp_path / "engines", tmp_path / "packages", driver, *options)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0
    assert told in said.splitlines()[-1]
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(("version", "good"), [("8.6.1", False), ("10.3.0", True), ("11.4.0.106", True)])
def test_tensorrt_10_and_11_are_taken(monkeypatch, version, good):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__name__="tensorrt", __version__=version))
    if good:
        assert load_tensorrt().__version__ == version
    else:
        with pytest.raises(BuildError, match=r"TensorRT 8\.6\.1: expected 10 or 11"):
            load_tensorrt()


def test_the_file_stands_by_itself_on_python_3_10(artefacts, tmp_path):
    tree = ast.parse(FILE.read_text(), feature_version=(3, 10))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
    alone = shutil.copy(FILE, tmp_path)
    command = [sys.executable, "-I", "-S", alone, artefacts, tmp_path / "engines"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("build_engines: no Python package tensorrt")
    assert not (tmp_path / "engines").exists()


def test_the_gpu_is_asked_of_the_driver(driver):
    code = "from scaphoid.export.tensorrt_engines.build_engines import gpu_name; print(gpu_name())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == GPU, done.stderr


def test_without_a_driver_it_says_so(monkeypatch):
    monkeypatch.setattr(build_engines, "DRIVER", "libno_such_driver.so.1")
    with pytest.raises(BuildError, match=r"no NVIDIA driver here \(libno_such_driver\.so\.1\)"):
        build_engines.gpu_name()
