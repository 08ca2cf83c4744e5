"""`scaphoid-bench ops`: it compares like with like, and says met only when a bar is."""

from functools import partial

import numpy as np
import pytest
import torch

from scaphoid.bench import op_cases, ops
from scaphoid.bench.op_cases import CASES, Bar, Case, Contender, Op, Unavailable, largest, relative
from scaphoid.bench.ops import (
    ROUNDS,
    Disagreement,
    Measured,
    OpsBench,
    Ratio,
    agreement,
    agreement_table,
    bars_table,
    bench_ops,
    in_turn,
    ratio,
    times_table,
    verdict,
)
from scaphoid.bench.peaks import bandwidth, last_level_cache_mib, read_memory


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def op(name: str, run=lambda: torch.ones(3), **options) -> Op:
    return Op(Contender(name, run), largest, "numbers", 0.1, **options)


@pytest.mark.parametrize("name", CASES)
def test_every_op_computes_what_its_baselines_compute(name, monkeypatch):
    monkeypatch.setattr(op_cases, "CACHES", 0)  # two feature maps in turn are enough here
    try:
        case = CASES[name](torch.device("cpu"), generator())
    except Unavailable as reason:
        pytest.skip(str(reason))
    rows = list(agreement(case))
    assert len(rows) == len(case.ops) * len(case.baselines) >= 1
    assert all(difference <= tolerance for *_, difference, tolerance in rows)
    for bound in (bound for each in case.ops for bound in each.bounds):
        bound.run()
    contenders = [*case.baselines, *(one for each in case.ops for one in (each.op, *each.bounds))]
    assert len({contender.name for contender in contenders}) == len(contenders)  # times are kept by name


def test_two_different_computations_are_not_timed():
    case = Case("c", "three numbers", (op("ours"),), (Contender("theirs", lambda: torch.full((3,), 1.2)),))
    with pytest.raises(Disagreement, match=r"ours and 'theirs' differ by 0\.2 in numbers, allowed are 0\.1"):
        list(agreement(case))


@pytest.mark.parametrize("result", [torch.ones(2), torch.tensor([1.0, float("nan"), 1.0])])
def test_another_shape_or_a_nan_is_no_agreement(result):
    case = Case("c", "three numbers", (op("ours", lambda: result),), (Contender("theirs", lambda: torch.ones(3)),))
    with pytest.raises(Disagreement, match="differ by nan"):
        list(agreement(case))


def test_relative_differences_are_shares_of_each_tensors_largest():
    expected = (torch.tensor([1.0, 100.0]), torch.tensor([0.5]))
    result = (torch.tensor([2.0, 100.0]), torch.tensor([0.51]))
    assert relative(result, expected) == pytest.approx(0.02)


def test_a_case_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(op_cases, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install"):
        CASES["object_box"](torch.device("cpu"), generator())


def test_rounds_take_a_sample_of_everything_and_begin_with_another_each_time():
    order = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in ("a", "b", "c")]

    def clock(run, times):
        run()
        return 8.0 * times

    samples = in_turn(contenders, clock, seconds=0)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", ROUNDS[0])
    assert set(np.concatenate(list(samples.values()))) == {8.0}
    assert "".join(order[-3 * ROUNDS[0] :]).startswith("abcbcacab")


def test_a_run_of_several_calls_is_divided_among_them():
    samples = in_turn([Contender("a", lambda: None, calls=4)], lambda run, times: 8.0 * times, seconds=0)
    assert set(samples["a"]) == {2.0}


def test_a_ratio_has_the_interval_of_its_median():
    denominator = np.ones(101)
    measured = ratio(np.arange(101, dtype=float) + 1, denominator)
    assert measured.times == 51
    assert (measured.low, measured.high) == (41, 61)
    steady = ratio(3 * denominator, denominator)
    assert (steady.low, steady.times, steady.high) == (3, 3, 3)
    few = ratio(np.array([2.0, 4.0]), np.ones(2))
    assert (few.low, few.high) == (2, 4)


def test_what_slows_a_whole_round_down_leaves_the_ratio_alone():
    slow = np.array([1.0, 5.0, 1.0, 9.0])
    assert ratio(20 * slow, slow).low == pytest.approx(20)


def test_a_bar_is_met_when_its_whole_interval_is():
    assert verdict(Bar(20), Ratio(21, 20, 22), None) == "met"
    assert verdict(Bar(20), Ratio(21, 19.9, 22), None) == "MISSED"
    assert verdict(Bar(1.3, of_bound=True), Ratio(9, 9, 9), Ratio(1.2, 1.1, 1.3)) == "met"
    assert verdict(Bar(1.3, of_bound=True), Ratio(9, 9, 9), Ratio(1.2, 1.1, 1.31)) == "MISSED"
    assert verdict(Bar(1.3, of_bound=True), Ratio(9, 9, 9), None) == "MISSED"
    assert verdict(None, Ratio(1, 1, 1), None) == "-"


def test_the_best_form_of_the_baseline_counts_and_the_bound_says_what_was_possible():
    bound = Contender("writing", lambda: None)
    ours = op("ours", bar=Bar(8), bounds=(bound,))
    case = Case("crop", "images", (ours,), (Contender("slow form", print), Contender("fast form", print)))
    times = {
        name: np.full(20, ms) for name, ms in (("ours", 2.0), ("slow form", 99), ("fast form", 12), ("writing", 1))
    }
    (row,) = bars_table([Measured(case, 2, times)]).records()
    assert row["best baseline"] == "fast form"
    assert row["baseline over op (times)"] == 6
    assert row["bar"] == "at least 8 x the baseline"
    assert row["verdict"] == "MISSED"
    assert (row["bound"], row["op over bound (times)"], row["at most possible (times)"]) == ("writing", 2, 12)
    assert [record["what"] for record in times_table([Measured(case, 2, times)]).records()] == list(times)


def test_agreement_shows_the_worst_over_the_threads():
    rows = [("ours", "theirs", "numbers", difference, 0.1) for difference in (0.02, 0.05, 0.01)]
    assert [row["difference (its unit)"] for row in agreement_table(rows).records()] == [0.05]


def test_a_report_of_one_case_names_hardware_bandwidth_and_baseline(capsys, monkeypatch):
    monkeypatch.setattr(ops, "peaks", partial(ops.peaks, side=96, copy_mib=1))
    report = bench_ops(OpsBench(threads=(1,), cases=("map_boxes",), seconds=0))
    text = report.markdown()
    for expected in ("memory read, 1 thread", "eager torch over the batch", "commit ", "95 % interval", "p50 (ms)"):
        assert expected in text
    assert "map_boxes, 1 thread" in capsys.readouterr().err


def test_a_missing_gpu_or_an_unknown_case_is_told():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda needs a GPU"):
            bench_ops(OpsBench(device="cuda"))
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        bench_ops(OpsBench(device="tpu"))
    with pytest.raises(ValueError, match=r"unknown cases crop: expected some of .*crop_resize"):
        bench_ops(OpsBench(cases=("crop",)))


def test_memory_is_read_to_its_end_by_every_thread():
    from concurrent.futures import ThreadPoolExecutor

    assert bandwidth(2, mib=1).read_gb_per_s > 0
    assert last_level_cache_mib() > 0
    with ThreadPoolExecutor(3) as pool:
        read_memory(torch.ones(1001, dtype=torch.uint8) * 2, pool, 3)  # a length that three threads do not share evenly
