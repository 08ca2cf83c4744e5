"""What goes into a manifest, what does not verify, and exports that cannot be: one line, and nothing half-written."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaphoid.export import artefacts
from scaphoid.export import publish as publish_module
from scaphoid.export import trained as trained_module
from scaphoid.export.artefacts import MANIFEST, ManifestError, accepted, verify, write_manifest
from scaphoid.export.disk import claim, room_in
from scaphoid.export.lock import locked
from scaphoid.export.workspace import Workspace, make


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "model.bin").write_bytes(bytes(range(256)))
    (tmp_path / "parity.json").write_text("{}\n")
    write_manifest(tmp_path, {"flows": ["kalm"]})
    return tmp_path


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def test_what_was_written_verifies_and_twice_is_the_same(folder, capsys):
    first = (folder / MANIFEST).read_bytes()
    write_manifest(folder, {"flows": ["kalm"]})
    assert (folder / MANIFEST).read_bytes() == first
    assert set(verify(folder)["files"]) == {"encoder/model.bin", "parity.json"}
    artefacts.main([str(folder)])
    assert "2 files are what the manifest says" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: tamper(folder / "encoder" / "model.bin"), r"model\.bin changed"),
        (lambda folder: (folder / "encoder" / "model.bin").unlink(), r"model\.bin is missing"),
        (lambda folder: (folder / "extra.pt").touch(), r"extra\.pt is not in the manifest"),
        (lambda folder: (folder / MANIFEST).unlink(), r"has no manifest\.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is not JSON"),
    ],
    ids=["one bit", "gone", "added", "no manifest", "no JSON"],
)
def test_what_changed_does_not_verify(folder, damage, message):
    damage(folder)
    with pytest.raises(ManifestError, match=message):
        verify(folder)
    with pytest.raises(SystemExit, match=f"verify: .*{message}"):
        artefacts.main([str(folder)])


def test_verify_without_a_folder_tells_its_usage():
    for arguments in ([], ["--help"], ["a", "b"]):
        with pytest.raises(SystemExit, match="usage: scaphoid-export verify DIR"):
            artefacts.main(arguments)


def test_accepted_artefacts_say_so_and_no_others():
    failures = ["encoder, openvino f32: logits differs by 0.2, at most 0.0001", "kalm, openvino f32: ..."]
    assert accepted({}) == accepted({"parity": {"passed": True, "failures": []}}) == ""
    line = accepted({"parity": {"passed": False, "failures": failures, "accepted": "a trial"}})
    assert "accepted as 'a trial'" in line
    assert "logits differs by 0.2" in line
    assert line.endswith("and 1 more")


def export_command(*arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    """`scaphoid-export` in a process whose files may not grow beyond `limit` bytes: a disk that is full."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "scaphoid.export.export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=full if limit else None)


def refused(monkeypatch, weights: Path, out: Path) -> str:
    """The line that scaphoid-export ends with."""
    pytest.importorskip("torch")
    pytest.importorskip("scaphoid.kernels.library")
    from scaphoid.export.export import main

    monkeypatch.setattr(sys, "argv", ["scaphoid-export", str(weights), "--out", str(out), "--gate-images", "1"])
    with pytest.raises(SystemExit) as error:
        main()
    line = str(error.value)
    assert not out.exists()
    assert "\n" not in line
    return line


def test_a_run_without_weights(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    line = refused(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert "run holds no best.safetensors: let scaphoid-train finish an epoch" in line
    assert "no weights file at" in refused(monkeypatch, tmp_path / "absent.safetensors", tmp_path / "out")


def test_an_unknown_backbone_and_a_file_that_is_no_model(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from safetensors.numpy import save_file

    weights = tmp_path / "kalm.safetensors"
    metadata = {"system": "kalm", "config": {"backbone": "resnet1999"}}
    save_file({"x": np.zeros(1, np.float32)}, weights, {"scaphoid": json.dumps(metadata)})
    assert "'resnet1999' is not a timm model" in refused(monkeypatch, weights, tmp_path / "out")
    weights.write_bytes(b"\x80\x04pickle")
    assert "is not a safetensors file written by scaphoid-train" in refused(monkeypatch, weights, tmp_path / "out")


def test_preprocessing_holds_no_path_of_this_machine_and_is_the_same_on_every_one(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from scaphoid.export.pipeline_to_dali import pipeline_to_dali

    for name, cores in (("a", {0}), ("b", set(range(8)))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        pipeline_to_dali(tmp_path / name, 96, 2)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert b"decoders" in content
    assert b"pipeline.py" not in content


@pytest.mark.slow
@pytest.mark.parametrize("formats", [[], ["--formats", "onnx"]], ids=["OpenVINO writes", "Python writes"])
def test_a_full_disk_is_one_line_and_leaves_earlier_artefacts_and_nothing_half_written(tmp_path, formats):
    torch = pytest.importorskip("torch")
    pytest.importorskip("scaphoid.kernels.library")
    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig

    torch.manual_seed(5)
    weights, out = tmp_path / "kalm.safetensors", tmp_path / "artefacts"
    save_model(weights, Kalm(KalmConfig("test_resnet", image_size=96, key_size=64)))
    out.mkdir()
    write_manifest(out, {"flows": ["kalm"]})
    done = export_command(weights, "--out", out, "--gate-images", "1", *formats, limit=400_000)
    assert done.returncode == 1, done.stderr
    said = f"no space left in {tmp_path} (File too large): free some, or name a folder on another disk"
    assert done.stderr.splitlines()[-1] == f"scaphoid-export: {said}"
    assert "Traceback" not in done.stderr
    assert verify(out)["flows"] == ["kalm"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artefacts", "kalm.safetensors"]


def test_what_a_full_disk_makes_writers_raise_names_the_folder(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with (
            pytest.raises(OSError, match=rf"^no space left in {tmp_path} \(.+\): free some, or set"),
            room_in(tmp_path, "set TMPDIR"),
        ):
            raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError, match="denied"), room_in(tmp_path):
        raise PermissionError(errno.EACCES, "denied")
    claim(tmp_path / "fits", 10_000)
    assert list(tmp_path.iterdir()) == []


def test_openvinos_writer_gives_the_systems_reason_and_leaves_nothing(tmp_path):
    """Its own is `basic_ios::clear: iostream error`."""
    program = (
        "import resource, sys, numpy, openvino as ov\n"
        "from pathlib import Path\n"
        "from openvino import opset13 as ops\n"
        "from scaphoid.export.onnx_to_openvino import write\n"
        "x = ops.parameter([-1, 4], numpy.float32)\n"
        "weight = ops.constant(numpy.ones((4, 9999), numpy.float32))\n"
        "model = ov.Model([ops.matmul(x, weight, False, False)], [x], 'm')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, 99_999))\n"
        "try:\n"
        "    write(model, Path(sys.argv[1]))\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.xml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_links_and_special_files_do_not_verify(folder, tmp_path):
    """What a link names can change after it was verified."""
    (folder / "evil").symlink_to(tmp_path)
    with pytest.raises(ManifestError, match=r"evil is a link or a special file"):
        verify(folder)
    (folder / "evil").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ManifestError, match=r"pipe is a link or a special file"):
        verify(folder)


@pytest.mark.parametrize("error", [OSError(16, "Device or resource busy"), KeyboardInterrupt("busy")])
def test_earlier_artefacts_stay_when_the_new_ones_cannot_take_their_place(error, folder, monkeypatch):
    monkeypatch.setattr(publish_module, "model_card", lambda *_: "")
    monkeypatch.setattr(publish_module, "markdown", lambda *_: "")
    rename = Path.rename

    def busy(path, target):
        if (path.name, target) == ("new", folder):
            assert not folder.exists()
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    report = {"passed": True, "images": {}, "notes": [], "failures": [], "reference": {}}
    before = verify(folder)
    with pytest.raises(type(error), match="busy"), publish_module.place_of(folder) as work:
        publish_module.publish(work, {"flows": ["kalm"]}, report)
    assert verify(folder) == before
    assert [each.name for each in folder.parent.iterdir() if each.name.startswith(folder.name)] == [folder.name]


@pytest.mark.parametrize("threshold", [float("nan"), 7, "abc", None, True])
def test_a_threshold_is_a_probability(threshold, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_module, "read_metadata", lambda path: {"threshold": threshold})
    with pytest.raises(trained_module.ExportError, match=r"weights\.safetensors: the threshold .* from 0 to 1"):
        trained_module.origin(tmp_path / "weights.safetensors", None, {})


@pytest.mark.parametrize(("key", "value"), [("licence", 5), ("licence", None), ("phantoms", 7)])
def test_what_metadata_tell_is_text(key, value, tmp_path, monkeypatch):
    monkeypatch.setattr(trained_module, "read_metadata", lambda path: {key: value})
    with pytest.raises(trained_module.ExportError, match=rf"weights\.safetensors: the {key} .* {value}, expected text"):
        trained_module.origin(tmp_path / "weights.safetensors", None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: write_manifest(out, {"flows": ["kalm"], "version": 3}), "is a model repository"),
        (
            lambda out: (out / "encoder" / "thesis.tex").touch(),
            r"holds encoder/thesis\.tex, which its",
        ),
        (lambda out: (out / "link").symlink_to(out.parent), "holds link, which its manifest does not list"),
        (lambda out: (out / MANIFEST).write_text("[]"), "holds no artefacts .*lists no files"),
        (lambda out: (out / MANIFEST).unlink(), "holds no artefacts"),
    ],
    ids=["repository", "user's file", "user's link", "another's manifest", "no manifest"],
)
def test_what_is_not_artefacts_is_not_replaced(folder, change, message):
    change(folder)
    before = sorted(folder.rglob("*"))
    with (
        pytest.raises(trained_module.ExportError, match=f"{message}.*: choose another --out"),
        publish_module.place_of(folder),
    ):
        pass
    assert sorted(folder.rglob("*")) == before
    assert not Workspace(folder).folder.exists()


@pytest.mark.parametrize("suffix", [".partial", ".rejected"])
def test_what_an_export_would_write_beside_is_not_replaced_either(folder, suffix):
    beside = folder.with_name(folder.name + suffix)
    beside.mkdir()
    (beside / "thesis.tex").touch()
    with (
        pytest.raises(
            (FileExistsError, trained_module.ExportError), match=rf"{suffix} is in the way and is not deleted"
        ),
        publish_module.place_of(folder),
    ):
        pass
    assert [each.name for each in beside.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", ["artefacts", "link"])
def test_what_the_gate_did_not_reject_is_not_deleted_for_its_name(folder, kind):
    (folder / "parity.json").touch()
    rejected = folder.with_name(f"{folder.name}_new.rejected")
    rejected.symlink_to(folder) if kind == "link" else folder.rename(rejected)
    with (
        pytest.raises(trained_module.ExportError, match=r"_new\.rejected is in the way and is not deleted"),
        publish_module.place_of(folder.with_name(f"{folder.name}_new")),
    ):
        pass
    assert (rejected / MANIFEST).is_file()


def test_a_file_in_the_workspaces_place_is_named_and_stays(folder):
    Workspace(folder).folder.touch()
    with (
        pytest.raises(FileExistsError, match=r"\.partial is in the way and is not deleted unasked"),
        publish_module.place_of(folder),
    ):
        pass
    assert Workspace(folder).folder.is_file()


def test_artefacts_are_not_replaced_while_somebody_reads_them(folder, monkeypatch):
    monkeypatch.setattr(publish_module, "model_card", lambda *_: "")
    monkeypatch.setattr(publish_module, "markdown", lambda *_: "")
    monkeypatch.setattr(publish_module, "READERS_S", 0.0)
    report = {"passed": True, "images": {}, "notes": [], "failures": [], "reference": {}}
    before = verify(folder)
    with (
        locked(folder, alone=False, wait_s=0),
        pytest.raises(trained_module.ExportError, match="reads what is there"),
        publish_module.place_of(folder) as work,
    ):
        publish_module.publish(work, {"flows": ["kalm"]}, report)
    assert verify(folder) == before


def test_damaged_artefacts_may_be_replaced_and_what_a_killed_export_left_is_not_in_the_way(folder):
    tamper(folder / "encoder" / "model.bin")
    (folder / "parity.json").unlink()
    work = Workspace(folder)
    make(work.folder)
    (work.new / "encoder").mkdir(parents=True)
    with publish_module.place_of(folder) as work:
        assert list(work.new.iterdir()) == []
        (work.new / "half").touch()
    assert not work.folder.exists()


def test_a_second_export_into_the_same_folder_is_refused_and_harms_nothing(tmp_path):
    out = tmp_path / "artefacts"
    with publish_module.place_of(out) as work:
        (work.new / "encoder").touch()
        with (
            pytest.raises(trained_module.ExportError, match="another process exports into it"),
            publish_module.place_of(out),
        ):
            pass
        with publish_module.place_of(tmp_path / "others"):
            pass
        assert (work.new / "encoder").exists()
        work.exchange()
    assert [each.name for each in tmp_path.iterdir()] == [out.name]


def test_artefacts_that_a_killed_export_had_put_aside_come_back(folder):
    work = Workspace(folder)
    make(work.folder)
    folder.rename(work.old)
    with publish_module.place_of(folder):
        assert verify(folder)["flows"] == ["kalm"]
    assert not work.folder.exists()
