"""The uncertainty band: what it costs, what it loses, and that it is fitted where it says."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest

from scaphoid.trainer import triage
from scaphoid.trainer.data.index import Index, Radiograph, write_index
from scaphoid.trainer.triage import EVERYBODY, NOBODY, Band, Scores, cascade, curve, fit, point, scores_of

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
    for each in curve(scores, FIRST_COST, boxes=True)[1:]:
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
    scores = scored()
    assert fit(scores._replace(full=scores.first), FIRST_COST).band == NOBODY


def test_what_cannot_be_fitted_is_named():
    with pytest.raises(ValueError, match=r"nothing costs 0\.2 or less"):
        fit(scored(), FIRST_COST, budget=0.2)
    with pytest.raises(ValueError, match="first_cost"):
        curve(scored(), 0)


@pytest.fixture
def journal(tmp_path):
    """A journal of ten whole answers of msfm and its index."""
    radiographs, lines = [], []
    for number in range(10):
        image = f"valid/XR_HAND/patient{number:05d}/study1_negative/image1.png"
        radiographs.append(
            Radiograph(
                image=image, patient=f"patient{number:05d}", study="study1", view="", body_part="hand",
                label=number % 2, boxes=(), width=64, height=64, split="valid",
            )
        )  # fmt: skip
        record = {"schema": "scaphoid.prediction/1", "image": image, "status": "ok", "flow": "msfm"}
        record |= {"probability": number / 10, "probability_with_parts": number / 9, "width": 64, "height": 64}
        lines.append(json.dumps(record | {"stages": {"main": number / 20}}))
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "predictions.jsonl", write_index(Index(tmp_path, tuple(radiographs)))


def test_a_journal_is_read_and_a_band_printed(journal, monkeypatch, capsys):
    predictions, index = journal
    scores = scores_of(triage.read_predictions(predictions), triage.read_index(index))
    assert scores.first.tolist() == [number / 20 for number in range(10)]
    assert scores.full.tolist() == [number / 9 for number in range(10)]  # with the parts, where they are
    command = ["triage", str(predictions), "--index", str(index), "--first-cost", "0.4", "--max-loss", "0.5"]
    monkeypatch.setattr(sys, "argv", command)
    triage.main()
    printed = json.loads(capsys.readouterr().out)
    assert (printed["low"], printed["high"]) == NOBODY
    assert printed["validation"]["images"] == 10


def test_answers_without_the_first_stage_are_refused(journal):
    predictions, index = journal
    predictions.write_text(predictions.read_text().replace('"main"', '"object"'))
    with pytest.raises(ValueError, match="lacks main_probability"):
        scores_of(triage.read_predictions(predictions), triage.read_index(index))
