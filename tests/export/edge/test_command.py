"""What `scaphoid-edge` says of numbers that cannot be, and of what an engine raises: one line."""

from pathlib import Path

import pytest

from scaphoid.export.edge.command import main
from scaphoid.export.edge.flow import Flow


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


def test_a_bundle_is_for_the_python_that_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("scaphoid.export.edge.bundle.bundle", lambda *each: asked.append(each) or [])
    assert main(["bundle", "a", "b", "--python", "3.12"]) == 0
    assert main(["bundle", "a", "b", "--no-wheels"]) == 0
    assert asked == [(Path("a"), Path("b"), "f16", True, "3.12"), (Path("a"), Path("b"), "f16", False, "3.10")]


def test_what_an_engine_raises_is_one_line(monkeypatch, capsys):
    def load(*_):
        raise RuntimeError("Exception from core.cpp:1:\n  no such device\n")

    monkeypatch.setattr(Flow, "load", load)
    assert main(["predict", "artefacts", "wrist.png"]) == 2
    assert capsys.readouterr().err == "scaphoid-edge: Exception from core.cpp:1: no such device\n"
