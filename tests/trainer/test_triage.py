"""The uncertainty band: what it costs, what it loses, and that it is fitted where it says."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaphoid.trainer import triage
from scaphoid.trainer.band import EVERYBODY, NOBODY, Answerer, Band, BandError, Fitted, read_band, write_band
from scaphoid.trainer.data.index import Index, Radiograph, read_index, write_index
from scaphoid.trainer.metrics import classification_metrics
from scaphoid.trainer.triage import Scores, cascade, curve, estimated_cost, fit, point

FIRST_COST = 0.35


def scored(images: int = 331, seed: int = 4) -> Scores:
    """A first stage that knows something, and a whole flow that knows more."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(images) < 0.45).astype(int)
    first = 1 / (1 + np.exp(-(2 * labels - 1 + 1.3 * rng.normal(size=images))))
    full = 1 / (1 + np.exp(-(2.2 * (2 * labels - 1) + 1.1 * rng.normal(size=images))))
    return Scores(labels, first, full, np.array([f"p{i // 3}" for i in range(images)]))


def test_the_cascade_takes_each_score_from_where_it_was_asked():
    scores = Scores(np.array([0, 1, 1]), np.array([0.1, 0.5, 0.9]), np.array([0.7, 0.8, 0.2]), np.array(list("abc")))
    assert cascade(scores, Band(0.4, 0.9)).tolist() == [0.1, 0.8, 0.2]
    assert cascade(scores, NOBODY).tolist() == scores.first.tolist()
    assert cascade(scores, EVERYBODY).tolist() == scores.full.tolist()


def test_cost_counts_the_first_call_of_every_image():
    scores = scored()
    found = point(scores, Band(0.3, 0.7), FIRST_COST)
    assert found.share == np.mean((scores.first >= 0.3) & (scores.first <= 0.7))
    assert found.cost == pytest.approx(FIRST_COST + found.share)
    assert point(scores, EVERYBODY, FIRST_COST).cost == 1  # nobody asks twice when everybody gets the whole answer


def test_bands_are_nested_and_grow_by_equal_shares():
    scores = scored()
    points = curve(scores, 0.01, steps=10)
    assert (points[0].band, points[-1].band) == (NOBODY, EVERYBODY)
    inner = [each.band for each in points[1:]]
    assert all(b.low <= a.low and a.high <= b.high for a, b in pairwise(inner))
    assert [each.share for each in points] == pytest.approx(np.linspace(0, 1, 11), abs=0.01)
    assert all(each.cost == pytest.approx(0.01 + each.share) for each in points[:-1])


def test_a_band_that_costs_more_than_a_whole_answer_is_none():
    points = curve(scored(), FIRST_COST)
    assert max(each.cost for each in points[:-1]) < 1 == points[-1].cost
    assert len(points) < len(curve(scored(), 0.01))


def test_with_boxes_everything_above_the_band_is_asked_too():
    scores = scored()
    for each in curve(scores, FIRST_COST, boxes=True):
        assert each.band.high == 1
        assert each.share == np.mean(scores.first >= each.band.low)


def test_a_band_around_the_middle_is_worth_more_than_its_share():
    """Half of the images in the middle bring more than half of what all bring, and more than half at either end."""
    scores = scored()
    points = curve(scores, 0.01)
    half = points[len(points) // 2]
    assert half.auroc - points[0].auroc > 0.6 * (points[-1].auroc - points[0].auroc)
    median = float(np.median(scores.first))
    ends = [point(scores, Band(0, median), 0.01), point(scores, Band(median, 1), 0.01)]
    assert half.auroc > max(end.auroc for end in ends)
    assert half.band.low < 0.5 < half.band.high


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.03])
def test_no_cheaper_band_keeps_the_auroc(loss):
    scores = scored()
    whole = point(scores, EVERYBODY, FIRST_COST).auroc
    found = fit(scores, FIRST_COST, max_loss=loss)
    assert found.auroc >= whole - loss
    assert fit(scores, FIRST_COST, budget=found.cost).cost <= found.cost
    cheaper = [each for each in curve(scores, FIRST_COST) if each.cost < found.cost]
    assert all(each.auroc < whole - loss for each in cheaper)


def test_a_flow_that_adds_nothing_is_not_asked():
    scores = scored()._replace(full=scored().first)
    assert fit(scores, FIRST_COST).band == NOBODY
    assert fit(scores, FIRST_COST, boxes=True).band.high == 1  # but for its boxes


def test_what_cannot_be_fitted_is_named():
    with pytest.raises(ValueError, match=r"nothing costs 0\.2 or less"):
        fit(scored(), FIRST_COST, budget=0.2)
    with pytest.raises(ValueError, match="first_cost"):
        curve(scored(), 0)


WEIGHTS = "3f2a9c1b"


def predicted(tmp_path, images: int = 120, split: str = "valid", **changes) -> tuple[Path, Path]:
    """A journal of whole answers of msfm and its index, in which the whole flow knows more than the first stage."""
    scores, radiographs, lines = scored(images), [], []
    for number in range(images):
        image = f"{split}/XR_HAND/{scores.patients[number]}/study1/image{number}.png"
        radiographs.append(
            Radiograph(
                image=image, patient=str(scores.patients[number]), study="study1", view="", body_part="hand",
                label=int(scores.labels[number]), boxes=(), width=64, height=64, split=split,
            )
        )  # fmt: skip
        record = {"schema": "scaphoid.prediction/1", "image": image, "status": "ok", "flow": "msfm"}
        record |= {"model_version": f"1@{WEIGHTS}", "width": 64, "height": 64, "parts": True, "whole": True}
        record |= {"probability": 0.5, "probability_with_parts": scores.full[number]}
        lines.append(json.dumps(record | {"stages": {"main": scores.first[number]}} | changes))
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "predictions.jsonl", write_index(Index(tmp_path, tuple(radiographs)))


def run(tmp_path, predictions: Path, index: Path, *more: str) -> int:
    return triage.main([str(predictions), "--index", str(index), "--out", str(tmp_path / "out" / "band.json"), *more])


def test_one_command_fits_tells_and_draws(tmp_path, capsys):
    assert run(tmp_path, *predicted(tmp_path), "--first-cost", "0.3", "--max-loss", "0.05") == 0
    scores = scored(120)
    expected = fit(scores, 0.3, max_loss=0.05)
    fitted = read_band(tmp_path / "out/band.json")
    assert fitted.band == expected.band  # of the score with the parts, where they are
    assert fitted.answerer == Answerer("msfm", WEIGHTS, parts=True)
    assert fitted.validation["auroc"] == expected.auroc
    assert fitted.validation["images"] == 120
    assert Image.open(tmp_path / "out/band.png").width > 500
    told = capsys.readouterr().out
    sensitivity = classification_metrics(scores.labels, cascade(scores, expected.band))["sensitivity"].value
    for figure in (f"{expected.auroc:.3f}", f"{sensitivity:.3f}", f"{expected.cost:.2f}", "0.30 (as given)"):
        assert figure in told
    called = cascade(scores, expected.band) >= 0.5
    without = np.sum(called & ((scores.first < expected.band.low) | (scores.first > expected.band.high)))
    assert 0 < without < called.sum()
    assert f"{without} of the {called.sum()} images called abnormal with the band get no box; with --boxes" in told


def test_a_first_call_costs_what_its_encoders_see(tmp_path, capsys):
    """Main of main, object and seven windows of a quarter each; FMA's encoder is asked in both calls."""
    assert estimated_cost("msfm", parts=True) == pytest.approx(1 / (2 + 7 / 4))
    assert estimated_cost("msfm", parts=False) == 1 / 2
    assert estimated_cost("msfm_fma", parts=True) == pytest.approx(2 / (3 + 7 / 4))
    assert run(tmp_path, *predicted(tmp_path), "--max-loss", "0.05") == 0
    assert "0.27 (estimated from the encoders' pixels)" in capsys.readouterr().out


def test_only_the_split_that_is_named_is_fitted_on(tmp_path):
    predictions, index = predicted(tmp_path)
    radiographs = read_index(index).radiographs
    write_index(Index(tmp_path, tuple(replace(r, split="test") if n > 79 else r for n, r in enumerate(radiographs))))
    assert run(tmp_path, predictions, index, "--split", "valid", "--max-loss", "0.1") == 0
    assert read_band(tmp_path / "out/band.json").validation["images"] == 80


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"stages": {"object": 0.4}}, [], "lacks main_probability"),
        ({"flow": "kalm"}, [], "kalm has no first stage of its own to ask: expected one of msfm"),
        ({"whole": False}, [], "predict without --triage"),
        ({"model_version": "1"}, [], "do not name the weights"),
        ({"status": "failed"}, [], "none of the 120 predicted images"),
        ({}, ["--split", "test"], "none of the 120 predicted images"),
        ({}, ["--budget", "0.1"], r"budget: nothing costs 0\.1 or less"),
        ({}, ["--first-cost", "0"], "first_cost: expected more than 0"),
        ({}, ["--out", "band.png"], "expected a name for the band's JSON"),
        ({}, ["--max-loss", "-1"], "max_loss: expected an AUROC of 0 or more"),
        ({}, ["--first-cost", "0.99"], "loses 0 of AUROC or less; predict without --triage, or allow more"),
        ({}, ["--first-cost", "1"], r"no band costs less than whole answers: a first call is 1\.00 of one; predict"),
        (
            {},
            ["--first-cost", "0.97", "--max-loss", "1", "--boxes"],
            r"costs less .* 0\.97 of one, and with --boxes all .*; predict without --triage, or fit without --boxes",
        ),
        ({}, ["--first-cost", "0.99", "--budget", "1"], r"within --budget 1, and no band is better .* budget below 1"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(tmp_path, capsys, changes, more, message):
    assert run(tmp_path, *predicted(tmp_path, **changes), *more) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_answers_of_two_weights_are_refused(tmp_path, capsys):
    predictions, index = predicted(tmp_path)
    predictions.write_text(predictions.read_text().replace(WEIGHTS, "77aa00ff", 1))
    assert run(tmp_path, predictions, index) == 2
    assert "answers of msfm 3f2a9c1b and of msfm 77aa00ff" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "scaphoid.prediction/1"},
        {"low": "a"},
        {"high": float("nan")},
        {"flow": "kalm"},
        {"weights": ""},
        {"low": None},
        {"low": float("inf")},
        {"low": 10**400},
        {"low": True},
        {"low": "0.1"},
        {"low": -5, "high": 7},
        {"low": 0.8, "high": 0.1},
        {"parts": "no"},
        {"weights": 3},
        {"flow": ["msfm"]},
        {"validation": 3},
    ],
)
def test_other_files_are_no_bands(tmp_path, change):
    path = tmp_path / "band.json"
    write_band(path, Fitted(Band(0.1, 0.8), Answerer("msfm", WEIGHTS, parts=True), {}))
    assert read_band(path).band == Band(0.1, 0.8)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BandError, match=r"band\.json is no band"):
        read_band(path)


@pytest.mark.parametrize("band", [NOBODY, EVERYBODY, Band(0.5, 0.5)])
def test_the_outermost_bands_are_read_as_they_were_written(tmp_path, band):
    path = tmp_path / "band.json"
    write_band(path, Fitted(band, Answerer("msfm", WEIGHTS, parts=False), {}))
    assert read_band(path) == Fitted(band, Answerer("msfm", WEIGHTS, parts=False), {})


def test_a_band_is_of_its_flow_parts_and_weights():
    fitted = Fitted(Band(0.1, 0.8), Answerer("msfm", WEIGHTS, parts=True), {})
    fitted.check_asked("msfm", parts=True)
    fitted.check_weights(f"2@{WEIGHTS}")
    with pytest.raises(BandError, match="fitted on msfm, not msfm_fma"):
        fitted.check_asked("msfm_fma", parts=True)
    with pytest.raises(BandError, match="with parts, not without"):
        fitted.check_asked("msfm", parts=False)
    for version, name in (("1@77aa00ff", "77aa00ff"), ("1", "not told")):
        with pytest.raises(BandError, match=f"weights {WEIGHTS}, the server's are {name}: fit one"):
            fitted.check_weights(version)
