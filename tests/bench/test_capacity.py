"""Capacity on paper: what limits a GPU with its cores, how many replicas, what gives way next."""

from dataclasses import replace

import numpy as np
import pytest

from scaphoid.bench import capacity, decoding
from scaphoid.bench.capacity import CORES, GPU, SCENARIOS, Capacity, encoder_work, replicas, simulated, strained
from scaphoid.bench.decoding import Form
from scaphoid.bench.kernel_report.encoders import encoders_us
from scaphoid.bench.kernel_report.gpus import GPUS
from scaphoid.triton_repo.client import wanted_outputs

L4 = next(gpu for gpu in GPUS if gpu.name == "L4")
CHEAP, DEAR = Form("cheap", 200_000, 1e-3), Form("dear", 5_000_000, 0.2)
WANTED = wanted_outputs("msfm", True)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(capacity, "SATURATION_JOBS", 150)
    monkeypatch.setattr(capacity, "LOAD_JOBS", 150)


def test_an_execution_of_one_image_is_the_kernel_reports_roofline():
    works = [encoder_work(L4, [single], 1.0) for single in ((1, 448), (1, 448), (7, 224))]
    generator = np.random.default_rng(0)
    assert sum(work(1, generator) for work in works) == pytest.approx(1e-6 * encoders_us(L4, "msfm"))
    assert encoder_work(L4, [(1, 448)], 0.25)(1, generator) == pytest.approx(4 * works[0](1, generator))
    assert works[0](8, generator) < 8 * works[0](1, generator)  # weights are read once


def test_the_gpu_limits_where_decoding_is_cheap_and_the_cores_where_it_is_dear():
    arguments = Capacity(cores=16)
    cheap, dear = (simulated(L4, form, arguments, WANTED) for form in (CHEAP, DEAR))
    assert (cheap.bottleneck, dear.bottleneck) == (GPU, CORES)
    assert dear.saturation == pytest.approx(16 / 0.201, rel=0.1)
    assert cheap.saturation == pytest.approx(cheap.limits[GPU], rel=0.1)
    assert cheap.saturation > 1.5 * dear.saturation
    without_parts = simulated(L4, CHEAP, arguments, wanted_outputs("msfm", False))
    assert without_parts.saturation > 1.5 * cheap.saturation
    halved = simulated(L4, CHEAP, replace(arguments, efficiency=0.2), WANTED)
    assert halved.saturation == pytest.approx(cheap.saturation / 2, rel=0.1)


def test_replicas_carry_the_load_with_one_down():
    served = simulated(L4, CHEAP, Capacity(), WANTED)
    for scenario in SCENARIOS:
        count = replicas(scenario.rate, served)
        assert (count - 1) * capacity.LOAD * served.saturation >= scenario.rate
        assert count == 2 or (count - 2) * capacity.LOAD * served.saturation < scenario.rate


def test_what_gives_way_first_is_what_is_used_most():
    served = simulated(L4, DEAR, Capacity(), WANTED)
    shares = strained(SCENARIOS[-1], served)
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)
    network = dict(shares)["network of one gateway"]
    assert network == pytest.approx(SCENARIOS[-1].rate * 5e6 * 8 / 400e9)


def test_decoding_is_measured_for_every_form():
    files = decoding.encoded(decoding.radiograph(203, 155))
    assert {name: file[:2] for name, file in files.items()} == {"PNG": b"\x89P", "JPEG": b"\xff\xd8", "pixels": b"P5"}
    assert len(files["pixels"]) >= 203 * 155
    assert decoding.core_seconds(lambda: sum(range(10_000)), 0.02) > 0


def test_the_report_says_on_paper(monkeypatch):
    monkeypatch.setattr(capacity, "measured_forms", lambda: [CHEAP, replace(CHEAP, name=decoding.PIXELS)])
    report = capacity.capacity(Capacity())
    assert any("ON PAPER, NOT MEASURED" in fact for fact in report.facts)
    text = report.markdown()
    assert all(scenario.name in text for scenario in SCENARIOS)
    with pytest.raises(ValueError, match="efficiency"):
        capacity.capacity(Capacity(efficiency=0))
