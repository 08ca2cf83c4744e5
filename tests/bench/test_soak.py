"""The soak's judgement, and a short soak of the real server."""

import asyncio
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest

from scaphoid.bench import processes, soak
from scaphoid.bench.processes import Held, held
from scaphoid.bench.server_load import LoadError
from scaphoid.bench.soak import Soak
from scaphoid.bench.soak_images import Good, bad_images, differences
from scaphoid.bench.soak_report import ACCEPTED, LOST, REFUSED, RIGHT, WRONG, Account, judge
from scaphoid.bench.tail import Tail, tail
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.client import RequestFailed, RequestRejected

ANSWER = {"probability": np.array([0.25], np.float32), "box": np.array([1, 2, 3, 4], np.float32)}


def answers(**counts: int) -> Account:
    account = Account()
    account.good["msfm", RIGHT] = 1000
    for outcome, count in counts.items():
        (account.bad if outcome in (REFUSED, ACCEPTED) else account.good)["msfm", outcome] = count
    return account


def samples(**grown: float) -> list[Held]:
    """A hundred of them; `grown` values climb by so much over the whole."""
    start = {"rss_mib": 4000.0, "descriptors": 140, "shared_files": 14, "shared_mib": 15.0}
    values = ({name: value + grown.get(name, 0) * n / 99 for name, value in start.items()} for n in range(100))
    return [Held(at_s=10.0 * number, processes=15, **each) for number, each in enumerate(values)]


def test_a_sound_server_passes():
    verdict = judge(answers(refused=100), samples(), 0, [])
    assert verdict.missed == ()
    assert verdict.growth == 0


@pytest.mark.parametrize(
    ("account", "grown", "left", "events", "missed"),
    [
        ({WRONG: 1}, {}, 0, [], "1 good images answered wrong"),
        ({LOST: 2}, {}, 0, [], "2 requests lost"),
        ({ACCEPTED: 1}, {}, 0, [], "1 bad files answered"),
        ({}, {"rss_mib": 140.0}, 0, [], "resident memory grew by 2."),
        ({}, {"descriptors": 6}, 0, [], "more descriptors"),
        ({}, {"shared_files": 6}, 0, [], "more files of shared memory"),
        ({}, {"shared_mib": 4.0}, 0, [], "shared memory grew by"),
        ({}, {}, 3, [], "3 files of shared memory left behind"),
        ({}, {}, 0, ["msfm does not answer"], "the supervisor had to step in: msfm does not answer"),
    ],
)
def test_every_fault_misses_its_bar(account, grown, left, events, missed):
    verdict = judge(answers(**account), samples(**grown), left, events)
    assert len(verdict.missed) == 1
    assert missed in verdict.missed[0]


def test_a_request_that_was_tried_again_does_not_pass_unseen():
    account = answers()
    account.tried_again = 1
    assert judge(account, samples(), 0, []).missed == ("1 requests failed at first and were tried again",)


def test_growth_during_the_warm_up_is_none():
    early = [Held(each.at_s, 15, 1000.0 if each.at_s < 190 else 4000.0, 1, 1, 1) for each in samples()]
    assert judge(answers(), early, 0, []).missed == ()


def test_too_little_is_not_judged():
    with pytest.raises(LoadError, match="too short"):
        judge(Account(), samples(), 0, [])
    with pytest.raises(LoadError, match="too short"):
        judge(answers(), samples()[:3], 0, [])


def test_a_wrong_answer_is_seen():
    assert differences(ANSWER, ANSWER) == []
    assert differences(ANSWER | {"box": ANSWER["box"] + 0.05}, ANSWER) == ["box"]
    assert differences({"box": ANSWER["box"]}, ANSWER) == ["probability"]
    assert differences(ANSWER | {"probability": np.float32(0.25)}, ANSWER) == ["probability"]


class Connection:
    """A client that gives one answer, or raises."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    async def infer(self, encoded: bytes) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return types.SimpleNamespace(tensors=self.answer)


@pytest.mark.parametrize(
    ("answer", "good", "bad"),
    [
        (ANSWER, RIGHT, ACCEPTED),
        (ANSWER | {"box": ANSWER["box"] + 1}, WRONG, ACCEPTED),
        (RequestRejected("blank"), LOST, REFUSED),
        (RequestFailed("engine error"), LOST, LOST),
    ],
)
def test_what_came_back_is_accounted_for(answer, good, bad):
    for share, counted in ((0.0, "good"), (1.0, "bad")):
        account = Account()
        end = soak.time.monotonic() + 0.05
        image = Good(b"image", {"msfm": ANSWER})
        user = soak.user({"msfm": Connection(answer)}, random.Random(0), share, [image], {"cut": b""}, end, account)
        asyncio.run(user)
        assert set(getattr(account, counted)) == {("msfm", good if counted == "good" else bad)}


def test_bad_files_are_different(tmp_path):
    import cv2

    png = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (61, 47), dtype=np.uint8))[1].tobytes()
    bad = bad_images(png)
    assert len(set(bad.values())) == len(bad) >= 10
    assert png not in bad.values()


def test_what_a_session_holds_is_counted(tmp_path, monkeypatch):
    """A process of another session that opens ten files and takes 50 MiB."""
    monkeypatch.setattr(processes, "SHARED_MEMORY", tmp_path)
    (tmp_path / "mine-1").write_bytes(bytes(2**20))
    (tmp_path / "other").write_bytes(bytes(2**20))
    program = (
        "import sys\nfiles = [open('/dev/null') for _ in range(10)]\nmemory = b'x' * 50 * 2**20\n"
        "print('there', flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    child.stdout.readline()
    try:
        found = held(child.pid, "mine-", 5.0)
    finally:
        child.communicate()
    assert (found.processes, found.shared_files, found.at_s) == (1, 1, 5.0)
    assert found.descriptors == 13
    assert 50 < found.rss_mib < 90
    assert found.shared_mib == pytest.approx(1, abs=0.1)
    assert os.getpid() not in processes.session(child.pid)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Artefacts and repository of tiny models."""
    pytest.importorskip("scaphoid.kernels.library")
    folder = tmp_path_factory.mktemp("soak")
    soak.prepare(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [20, pytest.param(60, marks=pytest.mark.thorough)])
def test_a_short_soak_of_the_real_server(prepared, seconds):
    """Nothing wrong, lost or left behind. Memory is judged by a long soak alone."""
    report = soak.soak(Soak(minutes=seconds / 60, samples=20, out=prepared))
    assert [line for line in report.missed if not line.startswith("resident memory")] == []
    rows = report.tables[0].records()
    assert {row["flow"] for row in rows} == {"msfm", "msfm_fma", "kalm"}
    assert sum(row["right (requests)"] for row in rows) > 50
    assert sum(row["bad refused (requests)"] for row in rows) > 0


@pytest.mark.slow
def test_the_tail_is_measured_on_the_real_server(prepared):
    """What is measured and simulated is there and hangs together; how fast it is, a machine of its own has to say."""
    options = {"rounds": 2, "requests": 10, "saturation_s": 3.0, "seconds": 4.0, "clients": 4}
    report = tail(Tail(prepared / "repository", "kalm", out=prepared, **options))
    latency, rounds, times = (table.records() for table in report.tables)
    assert [line for line in report.missed if "failed" in line] == []
    alone, measured, simulated = latency
    assert alone["counted (requests)"] == 2 * 10
    assert simulated["counted (requests)"] == 8 * measured["counted (requests)"] >= 320
    assert [row["round (number)"] for row in rounds] == [1, 2]
    assert all(0 < row["saturation, simulated (images/s)"] < 1000 for row in rounds)
    assert [row["stage"] for row in times][:-2] == list(FLOWS["kalm"].stages)
    for row in times[:-2]:
        assert 0 < row["batch 1, elapsed (ms)"] < alone["p99 (ms)"]
        assert row["batch 4, elapsed (ms)"] > 0
    encoder = next(row for row in times if row["stage"] == "global_encoder")
    assert encoder["batch 4, cores (core-ms)"] > 0  # of its own process
