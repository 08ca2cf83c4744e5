"""`scaphoid-train` on the command line: its help, the papers' settings as defaults, and mistakes."""

import subprocess
import sys

import pytest

from scaphoid.trainer import train as training_module
from scaphoid.trainer.config import PAPER

BACKBONE = "test_resnet"
PROGRAM = "import sys; from scaphoid.trainer.train import main; sys.argv[0] = 'scaphoid-train'; main()"


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=300)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["scaphoid-train", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        training_module.main()
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_help_lists_the_systems(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, "--help")
    assert all(system in text for system in PAPER)


@pytest.mark.parametrize(
    ("system", "defaults"),
    [
        ("plain", ["resnet50", "(default: 64)", "(default: adam)", "(default: 1e-05)", "(default: 30)"]),
        ("kalm", ["resnet18", "(default: 64)", "(default: adam)", "(default: 1e-05)", "(default: 30 30)"]),
        ("msfm", ["resnet50", "(default: 5)", "(default: sgd)", "(default: 0.0001)", "(default: 1 29)", "alpha-wfl"]),
    ],
)
def test_help_shows_the_papers_settings(monkeypatch, capsys, system, defaults):
    text = shown(monkeypatch, capsys, system, "--help")
    for default in defaults:
        assert default in text
    assert all(name in text for name in ("--index", "--out", "--schedule.frozen", "--model.backbone"))


def test_the_papers_settings():
    (_, kalm), (config, msfm) = PAPER["kalm"], PAPER["msfm"]
    assert (kalm.optimizer, kalm.learning_rate, kalm.batch, kalm.epochs) == ("adam", 1e-5, 64, (30, 30))
    assert kalm.drop_after * 30 == pytest.approx(20)
    assert kalm.loss == "ce"
    assert (msfm.optimizer, msfm.learning_rate, msfm.batch, sum(msfm.epochs)) == ("sgd", 1e-4, 5, 30)
    assert (msfm.momentum, msfm.weight_decay, msfm.loss) == (0.9, 1e-4, "alpha-wfl")
    assert (config.theta, config.r, config.gamma, config.image_size, config.part_size) == (0.6, 0.15, 0.5, 448, 224)


@pytest.mark.slow
def test_a_mistake_is_one_line_and_a_failing_exit_code(tmp_path):
    small = ("--model.backbone", BACKBONE, "--no-pretrained")
    done = command("plain", "--index", str(tmp_path / "none"), "--out", str(tmp_path / "run"), *small)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("scaphoid-train: ")
    assert "no such index" in done.stderr
    assert "Traceback" not in done.stderr
