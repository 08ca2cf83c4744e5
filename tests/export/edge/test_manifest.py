"""An edited manifest is refused in one line, by whatever reads it; and so are numbers that cannot be."""

import pytest

from scaphoid.export.artefacts import ManifestError, write_manifest
from scaphoid.export.edge.bundle import bundle
from scaphoid.export.edge.command import main
from scaphoid.export.edge.flow import Flow
from scaphoid.export.edge.manifest import check
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.flows import FLOWS


def described(tensors) -> list[dict]:
    return [
        {"name": tensor.name, "dims": [7 if isinstance(dim, str) else dim for dim in tensor.dims]} for tensor in tensors
    ]


@pytest.fixture
def manifest() -> dict:
    stages = {
        name: {"kind": stage.kind, "inputs": described(stage.inputs), "outputs": described(stage.outputs)}
        for name, stage in STAGES.items()
    }
    thresholds = {"msfm": 0.3, "kalm": 1}
    return {
        "flows": list(FLOWS),
        "precision": "f32",
        "image_size": 160,
        "thresholds": thresholds,
        "stages": stages,
        "files": {},
    }


def test_one_as_exported_passes(manifest, tmp_path):
    check(tmp_path, manifest)
    del manifest["thresholds"]
    check(tmp_path, manifest)


EDITS = {
    "flows": [None, [], "msfm", ["unknown"], [["msfm"]]],
    "precision": [None, "zz", ["f32"]],
    "image_size": [None, "x", -3, 0, 1.5, True],
    "thresholds": [[0.5], {"msfm": "0.5"}, {"msfm": float("nan")}, {"msfm": 1.5}, {"msfm": -0.1}, {"msfm": True}],
    "stages": [None, {}, [], {"encoder": {}}, {"../esc": {"kind": "encoder"}}],
}


@pytest.mark.parametrize(("part", "value"), [(part, value) for part, values in EDITS.items() for value in values])
def test_an_edited_part_is_named(manifest, tmp_path, part, value):
    with pytest.raises(ManifestError, match=rf"manifest\.json: expected {part}[^\n]*: export the weights again$"):
        check(tmp_path, manifest | {part: value})
    del manifest[part]
    if part != "thresholds":
        with pytest.raises(ManifestError, match=f"expected {part} to be"):
            check(tmp_path, manifest)


@pytest.mark.parametrize("edit", [None, [], [{}], "dims", "name"])
def test_tensors_are_the_contracts(manifest, tmp_path, edit):
    outputs = manifest["stages"]["encoder"]["outputs"]
    if isinstance(edit, str):
        outputs[0][edit] = [-7] * len(outputs[0]["dims"]) if edit == "dims" else "other"
    else:
        manifest["stages"]["encoder"]["outputs"] = edit
    with pytest.raises(ManifestError, match=r"expected stages\.encoder\.outputs to be the contract's"):
        check(tmp_path, manifest)


def test_everything_that_reads_it_checks_it(manifest, tmp_path, capsys):
    artefacts = tmp_path / "artefacts"
    artefacts.mkdir()
    write_manifest(artefacts, {**manifest, "image_size": -3, "files": {}})
    with pytest.raises(ManifestError, match="expected image_size"):
        Flow.load(artefacts, "msfm")
    with pytest.raises(ManifestError, match="expected image_size"):
        list(bundle(artefacts, tmp_path / "out", wheels=False))
    assert main(["memory", str(artefacts)]) == 2
    assert "expected image_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("predict a b", "--threads", "-1"),
        ("watch a b c", "--threads", "x"),
        ("watch a b c", "--seconds", "0"),
        ("watch a b c", "--seconds", "inf"),
        ("watch a b c", "--threshold", "nan"),
        ("watch a b c", "--threshold", "1.1"),
        ("memory a", "--threads", "-5"),
        ("memory a", "--batch", "0"),
        ("memory a", "--batch", "-1"),
    ],
)
def test_a_number_that_cannot_be_is_one_line(capsys, command, option, value):
    with pytest.raises(SystemExit) as error:
        main([*command.split(), option, value])
    assert error.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert option in said
    assert value in said


def test_what_an_engine_raises_is_one_line(monkeypatch, capsys):
    def load(*_):
        raise RuntimeError("Exception from core.cpp:1:\n  no such device\n")

    monkeypatch.setattr(Flow, "load", load)
    assert main(["predict", "artefacts", "wrist.png"]) == 2
    assert capsys.readouterr().err == "scaphoid-edge: Exception from core.cpp:1: no such device\n"
