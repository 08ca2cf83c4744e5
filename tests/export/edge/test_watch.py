"""What arrives in a folder is predicted once, whatever happens to the process in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("openvino")

from scaphoid.export.edge.flow import Flow, Result
from scaphoid.export.edge.watch import Arrivals, Watch
from scaphoid.export.lock import InUse, locked
from scaphoid.trainer import predictions
from scaphoid.trainer.journal import JOURNAL, read_predictions


def test_only_files_that_stay_the_same_have_arrived(tmp_path):
    arrivals = Arrivals(tmp_path)
    for name in ("b.png", "a.png", ".hidden.png", "c.png.part", "d.tmp"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(5, 5))
    os.utime(tmp_path / "b.png", ns=(3, 3))
    assert arrivals.look() == []
    (tmp_path / "b.png").write_bytes(b"12")
    os.utime(tmp_path / "b.png", ns=(3, 3))
    assert arrivals.look() == [tmp_path / "a.png"]
    assert arrivals.look() == [tmp_path / "b.png", tmp_path / "a.png"]
    (tmp_path / "c.png.part").rename(tmp_path / "c.png")
    assert tmp_path / "c.png" not in arrivals.look()
    assert tmp_path / "c.png" in arrivals.look()


def test_one_process_watches_into_a_folder_and_the_next_is_told_which(tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    with (
        locked(out, alone=True, wait_s=0, make=True),
        pytest.raises(InUse, match=rf"^{out} is in use by process {os.getpid()} \(.*\): let that finish, or end it"),
    ):
        Watch(None, inbox, out).run(threading.Event())


def test_a_full_disk_is_told_with_its_folder(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scaphoid.export.edge.watch.Journal", full)
    (tmp_path / "inbox").mkdir()
    with pytest.raises(OSError, match=rf"^no space left in {tmp_path}/out \(No space left on device\): free some"):
        Watch(None, tmp_path / "inbox", tmp_path / "out").run(threading.Event())


@pytest.mark.parametrize("inbox", ["out", "out/done", "out/../out/rejected", "missing", "file"])
def test_a_folder_that_cannot_be_watched_is_refused_before_anything_is_made(tmp_path, inbox):
    out = tmp_path / "out"
    (tmp_path / "file").touch()
    if inbox.startswith("out"):
        (tmp_path / "out").mkdir()
        (tmp_path / inbox).mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, NotADirectoryError), match=r"results would go into|is no folder: name the one"):
        Watch(None, tmp_path / inbox, out).run(threading.Event())
    assert sorted(tmp_path.rglob("*")) == before


class Rejects:
    """A flow that rejects what begins with "bad"; `before` is told the files first."""

    name, version, outputs, threshold = "msfm", "1", ("probability",), 0.5

    def __init__(self, before=lambda paths: None) -> None:
        self.before = before

    def predict(self, paths, wanted):
        self.before(paths)
        reasons = ["damaged" if path.name.startswith("bad") or not path.exists() else None for path in paths]
        return [Result(image=path.name, probability=0.5, reason=why) for path, why in zip(paths, reasons, strict=True)]


def watch(tmp_path, flow=None, **files) -> list[str]:
    """Puts `files` (name -> content) into the inbox and says what became of what is there."""
    inbox, said = tmp_path / "inbox", []
    inbox.mkdir(exist_ok=True)
    for name, content in files.items():
        (inbox / name).write_text(content)
    Watch(flow or Rejects(), inbox, tmp_path / "out", finished=said.append).run(Stop(4))
    return said


def test_names_that_are_too_long_are_shortened(tmp_path):
    long = "x" * 244 + ".png"
    for content in ("one", "two"):
        assert watch(tmp_path, **{long: content}) == ["ok"]
    first, second = contents(tmp_path / "out" / "done")[::-1]
    assert (first, len(second), second[-6:]) == (long, 255, "xx.png")
    bad = "bad" + "\u00e4" * 121 + ".png"  # 249 bytes
    assert watch(tmp_path, **{bad: "three", "bad." + "y" * 251: "four"}) == ["rejected", "rejected"]
    rejected = contents(tmp_path / "out" / "rejected")
    assert len(rejected) == 4
    assert {name + ".reason.txt" for name in rejected[::2]} == set(rejected[1::2])
    assert contents(tmp_path / "inbox") == []


def test_nothing_is_written_over(tmp_path):
    names = ["bad.png.reason.txt", "bad.png", "bad.png.reason.txt"]
    for name in names:
        assert watch(tmp_path, **{name: f"sent {name}"}) == ["rejected"]
    for _ in range(3):
        watch(tmp_path, **{"a.png": "a"})
        watch(tmp_path, **{"a.png": "other"})
    texts = [path.read_text() for path in (tmp_path / "out" / "rejected").iterdir()]
    assert sorted(texts) == sorted([f"sent {name}" for name in names] + ["damaged\n"] * 3)
    done = sorted(path.read_text() for path in (tmp_path / "out" / "done").iterdir())
    assert done == ["a"] * 3 + ["other"] * 3


def test_a_file_that_goes_or_stays_leaves_the_others_alone(tmp_path, monkeypatch):
    def remove(paths):
        for path in paths:
            if path.name.startswith("gone"):
                path.unlink()

    move = shutil.move

    def stuck(path, place):
        if path.name == "stuck.png":
            raise PermissionError(13, "Permission denied")
        move(path, place)

    monkeypatch.setattr(shutil, "move", stuck)
    files = {name: name for name in ("gone.png", "stuck.png", "well.png")}
    assert sorted(watch(tmp_path, Rejects(remove), **files)) == ["gone", "ok", "ok, not moved: Permission denied"]
    assert contents(tmp_path / "inbox") == ["stuck.png"]
    assert set(read_predictions(tmp_path / "out" / JOURNAL)) == {"stuck.png", "well.png"}
    monkeypatch.undo()
    assert watch(tmp_path) == ["known"]
    assert contents(tmp_path / "out" / "done") == ["stuck.png", "well.png"]


@pytest.fixture(scope="module")
def flow(artefacts) -> Flow:
    return Flow.load(artefacts, "msfm", threads=1)


class Stop(threading.Event):
    """Is set when nothing has happened for some looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def wait(self, timeout=None) -> bool:
        self.looks -= 1
        if self.looks <= 0:
            self.set()
        return self.is_set()


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_good_files_bad_files_and_a_restart(flow, radiograph, tmp_path):
    inbox, out, statuses = tmp_path / "inbox", tmp_path / "out", []
    inbox.mkdir()
    for seed in (1, 2):
        (inbox / f"{seed}.png").write_bytes(radiograph(seed))
    (inbox / "bad.png").write_bytes(radiograph(3)[:-40])
    Watch(flow, inbox, out, finished=statuses.append).run(Stop(3))
    assert sorted(statuses) == ["ok", "ok", "rejected"]
    assert contents(inbox) == []
    assert contents(out / "done") == ["1.png", "2.png"]
    assert contents(out / "rejected") == ["bad.png", "bad.png.reason.txt"]
    assert "truncated" in (out / "rejected" / "bad.png.reason.txt").read_text()

    (inbox / "1.png").write_bytes(radiograph(1))  # as if the process had died between writing and moving
    (inbox / "2.png").write_bytes(radiograph(4))  # another radiograph of a known name
    statuses.clear()
    Watch(flow, inbox, out, finished=statuses.append).run(Stop(3))
    assert sorted(statuses) == ["known", "ok"]
    assert len(contents(out / "done")) == 4
    assert contents(inbox) == []
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    assert [line["image"] for line in lines if line["status"] == "ok"] == ["1.png", "2.png", "2.png"]
    (again,) = flow.predict([radiograph(4)])
    kept = read_predictions(out / JOURNAL)["2.png"]  # the later line of a name counts
    assert kept.score == pytest.approx(again.score, abs=1e-5)
    assert kept.verdict == ("abnormal" if again.score >= 0.5 else "normal")
    assert {each["image"] for each in predictions.read_predictions(out / JOURNAL)} == {"1.png", "2.png", "bad.png"}


@pytest.mark.slow
def test_the_command_predicts_until_it_is_told_to_stop(artefacts, radiograph, tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    (inbox / "wrist.png").write_bytes(radiograph(1))
    command = [sys.executable, "-m", "scaphoid.export.edge.command", "watch", artefacts, inbox, out]
    process = subprocess.Popen(
        [*command, "--seconds", "0.1", "--threads", "1", "--no-parts"], stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "done" / "wrist.png").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert said.splitlines()[1:] == ["ok", "stopped"]
    (line,) = (json.loads(line) for line in (out / JOURNAL).read_text().splitlines())
    assert (line["image"], line["parts"], line["probability_with_parts"]) == ("wrist.png", False, None)
