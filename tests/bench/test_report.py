"""Reports: a unit in every column of numbers, the machine and the versions beside them."""

import json

import pytest

from scaphoid.bench.comparison import (
    CHAINED,
    FILES,
    PIXELS,
    Measured,
    conclusions,
    rounds_table,
    stages_table,
    throughput_table,
)
from scaphoid.bench.peaks import Machine, Peaks, machine, peaks
from scaphoid.bench.report import Report, Table, shown
from scaphoid.bench.server_load import Load, StageTotals
from scaphoid.bench.timing import Rate

ZEN = Machine("EPYC", 2, 23.5, ("avx2", "fma"), ("FP32", "INT8"), 0.1)
LIMITS = Peaks({"torch f32": 90.0, "OpenVINO f32": 200.0, "OpenVINO bf16": 900.0}, 12.5)


def rate(images_per_s: float) -> Rate:
    return Rate(100, 100 / images_per_s, (1e3 / images_per_s,) * 100, cpu_s=50)


@pytest.fixture
def measured() -> Measured:
    """Eager 2 images/s at best; in process 4, 5, 10; Triton 3.8, 4.5, 9: so 95, 90 and 90 %; chained by the client half
    of that."""
    stages = {"preprocess": StageTotals(100, 50, 100, 0.2, 0.4), "encoder": StageTotals(200, 80, 200, 4.0, 10.0)}
    loads = [Load(rate(each), ("no answer",) * (each == 9), stages) for each in (3.8, 4.5, 9)]
    return Measured(
        gflop=10.0,
        eager={1: rate(1), 4: rate(2)},
        in_process={1: rate(3), 4: rate(5)},
        batch=4,
        engine=[rate(4), rate(5), rate(10)],
        loads={FILES: loads, PIXELS: loads, CHAINED: [Load(rate(each), (), stages) for each in (1.9, 2.25, 4.5)]},
        cpu_ms={FILES: [510.0, 520.0, 530.0], PIXELS: [500.0, 500.0, 500.0], CHAINED: [900.0, 900.0, 900.0]},
        start_s=12.0,
        stage_ms={"preprocess": 3.0, "encoder": 150.0},
    )


def test_a_number_without_a_unit_is_refused():
    with pytest.raises(ValueError, match=r"column 'latency' holds 3\.5, so name its unit"):
        Table("t", ("runtime", "latency"), (("eager", 3.5),))


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 columns, but a row has 1 cells"):
        Table("t", ("runtime", "latency (ms)"), (("eager",),))


def test_a_table_as_markdown_and_as_records():
    table = Table("Speed", ("runtime", "p50 (ms)"), (("eager", 1234.56), ("Triton", None)))
    assert table.markdown().splitlines() == [
        "## Speed",
        "",
        "| runtime | p50 (ms) |",
        "|---|---:|",
        "| eager | 1,235 |",
        "| Triton | - |",
    ]
    assert table.records() == [{"runtime": "eager", "p50 (ms)": 1234.56}, {"runtime": "Triton", "p50 (ms)": None}]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (0.04567, "0.0457"),
        (1.0, "1.00"),
        (23.456, "23.5"),
        (99999.5, "100,000"),
        (0.0, "0"),
        (float("nan"), "-"),
        (7, "7"),
    ],
)
def test_three_digits_count(cell, text):
    assert shown(cell) == text


def test_throughput_stands_beside_eager_and_the_fp32_peak(measured):
    rows = throughput_table(measured, 8, LIMITS).records()
    *_, served, _, chained = rows
    assert [row["rate (images/s)"] for row in rows[:4]] == [1, 2, 3, 5]
    assert served["runtime"] == "engines, Triton, PNG files, all rounds"
    assert chained["runtime"] == "engines, Triton, steps chained by the client, all rounds"
    assert chained["rate (images/s)"] == pytest.approx(served["rate (images/s)"] / 2)
    assert served["clients (count)"] == 8
    expected = 300 / (100 / 3.8 + 100 / 4.5 + 100 / 9)
    assert served["rate (images/s)"] == pytest.approx(expected)
    assert served["of eager fp32 (times)"] == pytest.approx(expected / 2)
    assert served["of fp32 peak (%)"] == pytest.approx(100 * 10 * expected / 200)  # of the best fp32, not of bf16


def test_the_ratio_is_the_median_of_rounds_measured_in_turn(measured):
    rows = rounds_table(measured).records()
    by_runtime = {name: [row for row in rows if row["runtime"] == name] for name in {row["runtime"] for row in rows}}
    files, chained = by_runtime["Triton, PNG files"], by_runtime["Triton, steps chained by the client"]
    assert [row["of in process (%)"] for row in files] == pytest.approx([95, 90, 90])
    assert [row["of in process (%)"] for row in chained] == pytest.approx([47.5, 45, 45])
    assert [row["an image (core-ms)"] for row in by_runtime["in process"]] == [500, 500, 500]
    assert [row["an image (core-ms)"] for row in files] == [510, 520, 530]
    facts = conclusions(measured, 8, ZEN)
    assert "PNG files: 90.0 % of what the in-process flow does" in facts[0]
    assert "90.0 to 95.0 %" in facts[0]
    assert "2.00 times as many PNG files/s as a client that chains its steps" in facts[3]


def test_failures_and_a_busy_machine_are_told(measured):
    quiet = conclusions(measured, 8, ZEN)
    assert [line for line in quiet if "failed" in line] == ["2 requests failed, the first with: no answer"]
    assert not any("NOT AN IDLE MACHINE" in line for line in quiet)
    busy = conclusions(measured, 8, Machine("EPYC", 2, 23.5, (), ("FP32",), 3.0))
    assert any("NOT AN IDLE MACHINE: 3.0 tasks on 2 cores" in line for line in busy)


def test_stages_count_an_image_of_the_flow_even_when_used_twice(measured):
    preprocess, encoder = stages_table(measured).records()
    assert preprocess["Triton (ms an image)"] == pytest.approx(4)
    assert encoder["Triton (ms an image)"] == pytest.approx(100)
    assert encoder["Triton batch (images)"] == pytest.approx(2.5)
    assert encoder["Triton queue (ms a request)"] == pytest.approx(20)  # an image makes two


def test_a_report_has_machine_versions_commit_and_peaks(tmp_path, measured):
    tables = (throughput_table(measured, 8, LIMITS), rounds_table(measured), stages_table(measured))
    report = Report(
        "Throughput", {"flow": "msfm", "arithmetic (GFLOP an image)": 10.0}, ("a fact",), ZEN, LIMITS, tables
    )
    markdown, data = report.write(tmp_path / "new", "msfm")
    text, content = markdown.read_text(), json.loads(data.read_text())
    for expected in (
        "EPYC, 2 cores",
        "bf16 is not native on this CPU",
        "- a fact",
        "commit ",
        "openvino ",
        "200",
        "12.5",
    ):
        assert expected in text
    assert content["machine"]["instructions"] == ["avx2", "fma"]
    assert content["versions"]["torch"]
    assert content["commit"]
    assert set(content["tables"]) == {table.title for table in tables} | {"Measured peaks of the machine"}


def test_native_bf16_is_told_apart():
    assert Machine("x", 2, 1.0, (), ("FP32", "BF16"), 0.0).precision_note == "bf16 is native on this CPU"


def test_this_machine_is_described_and_has_peaks():
    here = machine()
    assert here.cpu
    assert here.cores >= 1
    assert "FP32" in here.engine_precisions
    limits = peaks(side=96, copy_mib=1)
    assert limits.f32_gflops > 0
    assert {"torch f32", "OpenVINO f32"} <= set(limits.gflops)
    assert limits.copy_gb_per_s > 0
