"""What goes to an edge device: Python 3.10 reads it, it needs no torch, and the installer says what is missing."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from scaphoid.export.artefacts import ManifestError, verify, write_manifest
from scaphoid.export.edge.bundle import INSTALL, bundle, needed_modules
from scaphoid.export.edge.memory import table
from scaphoid.trainer.contracts import STAGES

NEEDS = 'MEMORY_MIB=500\nDISK_MIB=1\nPRECISION=f16\nFLOWS="msfm kalm"\n'
MODULES = needed_modules()
# Newer than 3.10, of what the standard library offers a project like this one.
NEWER = {
    *("file_digest", "TaskGroup", "ExceptionGroup", "BaseExceptionGroup", "add_note", "StrEnum", "UTC", "tomllib"),
    *("Self", "LiteralString", "NotRequired", "Required", "Never", "assert_never", "assert_type", "reveal_type"),
    *("TypeVarTuple", "Unpack", "override", "batched", "sumprod", "cbrt", "exp2", "chdir", "walk_up", "onexc"),
}
HEAVY = {"torch", "torchvision", "timm", "nvidia", "tyro", "rich", "safetensors", "pydicom"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_python_3_10_reads_it_and_it_needs_no_torch(module):
    source = MODULES[module].read_text()
    tree = ast.parse(source, feature_version=(3, 10))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    used |= {alias.name for node in imported for alias in node.names}
    used |= {keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords}
    if module != "scaphoid.kernels.build_ops":  # its torch is asked for by the torch library alone
        roots = {alias.name.split(".")[0] for node in imported for alias in node.names}
        roots |= {(node.module or "").split(".")[0] for node in imported if isinstance(node, ast.ImportFrom)}
        assert not roots & HEAVY
    assert not used & NEWER


def test_the_scan_finds_what_it_looks_for():
    assert {"scaphoid.trainer.flows", "scaphoid.trainer.data.guard", "scaphoid.export.edge.cuda_plan"} <= set(MODULES)
    with pytest.raises(SyntaxError):
        ast.parse("try: pass\nexcept* OSError: pass", feature_version=(3, 10))


def test_a_real_python_3_10_compiles_it(tmp_path):
    python = shutil.which("python3.10")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip("no python3.10 here")
    program = "import sys\nfor path in sys.argv[1:]: compile(open(path).read(), path, 'exec')"
    subprocess.run([python, "-c", program, *MODULES.values()], check=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The installer's folder, and beside it `tools`, `etc` and `proc` of a machine that has what is put there."""
    shutil.copytree(INSTALL, tmp_path / "bundle")
    (tmp_path / "bundle" / "needs.env").write_text(NEEDS)
    for name in ("tools", "etc", "proc"):
        (tmp_path / name).mkdir()
    for tool in ("sh", "sed", "awk", "dirname", "df", "cat"):
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def check(folder: Path, *options: str) -> subprocess.CompletedProcess:
    script = folder / "bundle" / "install.sh"
    environment = {"PATH": str(folder / "tools"), "SCAPHOID_SYSTEM_ROOT": str(folder)}
    command = [folder / "tools" / "sh", script, "--root", folder / "root", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def tool(folder: Path, name: str, *lines: str) -> None:
    path = folder / "tools" / name
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


def test_every_missing_thing_is_said_and_nothing_is_changed(folder):
    tool(folder, "uname", "echo x86_64")
    for options in (["--check"], []):  # installing checks first
        done = check(folder, *options)
        assert done.returncode == 1
        for thing in ("64-bit Arm", "JetPack 6", "python3", "CUDA", "TensorRT", "g++", "memory", "nvpmodel"):
            assert f"MISSING  {thing}" in done.stdout
        assert "8 missing: nothing was changed" in done.stderr
        assert not (folder / "root").exists()


def test_a_relative_root_is_refused(folder):
    complete(folder)
    for options in (["--check"], []):
        done = check(folder, "--root", "rel/x", *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert "rel/x: --root needs an absolute path" in done.stderr


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("3.10", "ok       wheels for Python 3.10"),
        ("3.12", "MISSING  wheels for Python 3.12: numpy-2.2.6-cp310-cp310-manylinux2014_aarch64.whl is for another"),
    ],
)
def test_wheels_of_another_python_are_missing(folder, python, said):
    complete(folder)
    tool(folder, "python3", f'case "$*" in *tensorrt*) echo 10.3.0 ;; *version_info\\[*) echo {python} ;; esac')
    (folder / "bundle" / "wheels").mkdir()
    for wheel in ("numpy-2.2.6-cp310-cp310-manylinux2014_aarch64.whl", "ninja-1.13.0-py3-none-manylinux2014.whl"):
        (folder / "bundle" / "wheels" / wheel).touch()
    done = check(folder, "--check")
    assert said in done.stdout
    assert done.returncode == int("MISSING" in said)
    assert "bundle again with --python 3.12" in done.stdout or python == "3.10"


@pytest.mark.parametrize(
    ("flows", "flow"), [("kalm", "kalm"), ("kalm msfm_fma msfm", "msfm"), ("msfm_fma", "msfm_fma")]
)
def test_the_service_runs_a_flow_that_the_bundle_holds(folder, flows, flow):
    complete(folder)
    (folder / "bundle" / "needs.env").write_text(NEEDS.replace("msfm kalm", flows))
    (folder / "bundle" / "python").mkdir()
    (folder / "etc" / "systemd" / "system").mkdir(parents=True)
    for name in ("rm", "mkdir", "cp", "mv", "chmod"):
        (folder / "tools" / name).symlink_to(shutil.which(name))
    for name in ("id", "install", "systemctl"):
        tool(folder, name)
    venv = [f"mkdir -p {folder}/root/python/bin", f"cp {folder}/tools/python3 {folder}/root/python/bin/python"]
    tool(
        folder,
        "python3",
        'case "$*" in *tensorrt*) echo 10.3.0 ;; *" add "*) echo 0001-x ;; "-m venv"*)',
        *venv,
        f"mkdir -p {folder}/root/code.new ;; esac",
    )
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    unit = (folder / "etc" / "systemd" / "system" / "scaphoid-edge.service").read_text()
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert f" --flow {flow} " in start
    assert start.startswith(f"ExecStart={folder}/root/bin/scaphoid-edge watch {folder}/root/current/artefacts ")
    assert "@" not in start


def complete(folder: Path) -> None:
    tool(folder, "uname", "echo aarch64")
    tool(folder, "python3", 'case "$*" in *tensorrt*) echo 10.3.0 ;; --version) echo Python 3.10.12 ;; esac')
    tool(folder, "nvcc", "echo 'Cuda compilation tools, release 12.6, V12.6.68'")
    tool(folder, "nvpmodel", "echo 'NV Power Mode: MAXN'")
    tool(folder, "g++")
    (folder / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    (folder / "proc" / "meminfo").write_text("MemTotal: 7800000 kB\nMemAvailable: 6000000 kB\nSwapTotal: 8000000 kB\n")


def test_a_jetson_that_has_everything_passes(folder):
    complete(folder)
    done = check(folder, "--check")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for thing in ("Jetson Linux 36.4.3", "CUDA 12.6", "TensorRT 10.3.0", "5859 MiB of memory", "power mode MAXN"):
        assert f"ok       {thing}" in done.stdout
    assert "warning" not in done.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: tool(folder, "nvcc", "echo 'release 11.4, V11.4'"), "CUDA 12.6 or later with nvcc: 11.4"),
        (lambda folder: (folder / "bundle" / "needs.env").write_text(NEEDS.replace("500", "6000")), "memory: 5859 MiB"),
        (lambda folder: (folder / "bundle" / "needs.env").write_text(NEEDS.replace("=1\n", "=99999999\n")), "disk: "),
        (
            lambda folder: (folder / "etc" / "nv_tegra_release").write_text(
                "# R35 (release), REVISION: 4.1, GCID: 3\n"
            ),
            "JetPack 6 (Jetson Linux 36) or later: this is 35.4.1",
        ),
    ],
)
def test_one_thing_too_old_or_too_small(folder, change, said):
    complete(folder)
    change(folder)
    done = check(folder, "--check")
    assert done.returncode == 1
    assert f"MISSING  {said}" in done.stdout
    assert "1 missing" in done.stderr


def test_a_weaker_power_mode_and_little_swap_are_warnings(folder):
    complete(folder)
    tool(folder, "nvpmodel", "echo 'NV Power Mode: 15W'")
    (folder / "proc" / "meminfo").write_text("MemAvailable: 6000000 kB\nSwapTotal: 1024 kB\n")
    done = check(folder, "--check")
    assert done.returncode == 0
    assert done.stdout.count("warning") == 2


def test_an_unknown_option_shows_the_usage(folder):
    done = check(folder, "--help")
    assert done.returncode == 2
    assert "install.sh --check" in done.stdout


@pytest.mark.parametrize("tool_name", ["shellcheck", "systemd-analyze"])
def test_linters_find_nothing(tool_name, tmp_path):
    if shutil.which(tool_name) is None:
        pytest.skip(f"no {tool_name} here")
    if tool_name == "shellcheck":
        command = [tool_name, INSTALL / "install.sh"]
    else:
        unit = tmp_path / "scaphoid-edge.service"
        unit.write_text((INSTALL / unit.name).read_text().replace("@ROOT@", str(tmp_path)).replace("@FLOW@", "msfm"))
        (tmp_path / "bin").mkdir()
        shutil.copy(shutil.which("true"), tmp_path / "bin" / "scaphoid-edge")
        command = [tool_name, "verify", "--man=no", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("scaphoid.export.edge.bundle.needs", lambda *_: NEEDS)
    failed = subprocess.CompletedProcess([], 1, "", "a warning\nno network\n")
    monkeypatch.setattr("scaphoid.export.edge.bundle.subprocess.run", lambda *_, **__: failed)
    (tmp_path / "artefacts" / "onnx").mkdir(parents=True)
    (tmp_path / "artefacts" / "onnx" / "encoder.f16.onnx").touch()
    sides = (("inputs", STAGES["encoder"].inputs), ("outputs", STAGES["encoder"].outputs))
    doors = {
        side: [
            {"name": tensor.name, "dtype": tensor.dtype, "dims": [7 if isinstance(n, str) else n for n in tensor.dims]}
            for tensor in tensors
        ]
        for side, tensors in sides
    }
    write_manifest(tmp_path / "artefacts", {"stages": {"encoder": {"kind": "encoder", **doors}}})
    with pytest.raises(OSError, match=r"pip could not fetch the wheels \(no network\)"):
        list(bundle(tmp_path / "artefacts", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["artefacts"]
    monkeypatch.setattr("scaphoid.export.edge.bundle.shutil.copyfile", full_disk)
    with pytest.raises(OSError, match=rf"^no space left in {tmp_path} \(No space left on device\): free some"):
        list(bundle(tmp_path / "artefacts", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["artefacts"]


def full_disk(source, to):
    raise OSError(28, "No space left on device", str(to))


@pytest.mark.slow
def test_the_bundle_holds_what_the_device_needs(artefacts, tmp_path):
    out = tmp_path / "bundle"
    told = list(bundle(artefacts, out, "f16", wheels=False))
    assert told[-1].startswith(str(out))
    manifest = verify(out / "artefacts")
    assert sorted(manifest["files"]) == sorted(
        f"onnx/{name}.f16.onnx"
        for name in ("encoder", "fma_encoder", "global_encoder", "local_encoder", "parts_encoder")
    )
    assert 'FLOWS="msfm msfm_fma kalm"' in (out / "needs.env").read_text()
    kernels = out / "python" / "scaphoid" / "kernels"
    assert (kernels / "build_ops.py").is_file()
    assert (kernels / "csrc" / "scaphoid_ops.h").is_file()
    program = (
        "import sys, scaphoid.export.edge.command as c; print(c.__file__, 'torch' in sys.modules); c.main(['--help'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(out / "python"), "PYTHONNOUSERSITE": "1"}
    site = next(path for path in Path(pytest.__file__).parents if path.name == "site-packages")
    command = [shutil.which("python3"), "-S", "-c", f"import sys; sys.path.append({str(site)!r})\n{program}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"{out}/python/scaphoid/export/edge/command.py False"), done.stderr
    with pytest.raises(FileExistsError, match="choose another"):
        list(bundle(artefacts, out, "f16", wheels=False))
    with pytest.raises(ManifestError, match="export it with --formats onnx"):
        list(bundle(artefacts, tmp_path / "other", "int8", wheels=False))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_bundle_in_int8(artefacts, tmp_path):
    pytest.importorskip("nncf")
    import onnx

    from scaphoid.export.quantize import quantize

    shutil.copytree(artefacts, tmp_path / "artefacts")
    for half in (tmp_path / "artefacts" / "onnx").glob("*.f16.onnx"):
        model = onnx.load(half.with_name(half.name.replace(".f16", "")))
        sides = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:]]
        quantized = quantize(model, np.arange(2 * np.prod(sides)).reshape(2, *sides).astype(np.uint8)).int8
        onnx.save(quantized, half.with_name(half.name.replace(".f16", ".int8")))
    write_manifest(tmp_path / "artefacts", {key: each for key, each in verify(artefacts).items() if key != "files"})
    list(bundle(tmp_path / "artefacts", tmp_path / "out", "int8", wheels=False))
    files = verify(tmp_path / "out" / "artefacts")["files"]
    assert len(files) == 5
    assert all(name.endswith(".int8.onnx") for name in files)
    assert "PRECISION=int8\n" in (tmp_path / "out" / "needs.env").read_text()
    from scaphoid.export.edge.memory import budgets

    (half,) = {each.weights for each in budgets(artefacts, [1], "f16", 1) if each.flow == "msfm"}
    found = {name: budgets(tmp_path / "out" / "artefacts", [1], name, 1)[0] for name in ("f16", "int8")}
    assert found["f16"].weights == pytest.approx(half, rel=0.05)
    assert found["int8"].weights < 0.8 * half


def test_weights_held_in_8_bits_are_counted_as_the_floats_that_are_built_of_them():
    openvino = pytest.importorskip("openvino")
    opset = openvino.opset8
    from scaphoid.export.edge.memory import weight_bytes

    def model(kind):
        weights = opset.convert(opset.constant(np.ones((30, 70), kind)), "f32")
        image = opset.parameter([-1, 30])
        return openvino.Model([opset.matmul(image, weights, False, False)], [image])

    for kind in (np.int8, np.uint8, np.float32):
        assert [weight_bytes(model(kind), precision) for precision in ("f16", "f32")] == [4200, 8400]
    assert [weight_bytes(model(kind), "int8") for kind in (np.int8, np.float32)] == [2100, 8400]


@pytest.mark.slow
def test_the_memory_budget_is_computed(artefacts):
    from scaphoid.export.edge.memory import budgets

    one, four = budgets(artefacts, [1, 4], "f32", threads=1)[:2]
    half = budgets(artefacts, [1], "f16", threads=1)[0]
    assert (one.flow, one.batch, four.batch) == ("msfm", 1, 4)
    assert four.arrays == 4 * one.arrays
    assert four.activations == pytest.approx(4 * one.activations, rel=0.02)
    assert four.weights == one.weights
    assert half.weights == pytest.approx(one.weights / 2, rel=0.02)
    # image, object image and the seven windows are the arrays' bulk; input in float and in three channels is alive
    assert one.arrays > 2 * 160 * 160 + 7 * 96 * 96
    assert one.activations > 4 * 160 * 160
    assert one.total == one.weights + one.activations + one.arrays + one.decoding
    assert len(table([one, four]).splitlines()) == 3
