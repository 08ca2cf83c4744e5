import numpy as np
import pytest
from sklearn import metrics as sklearn

from scaphoid.trainer.metrics import (
    Estimate,
    classification_metrics,
    mean_estimate,
    median_estimate,
    paired_differences,
    study_level,
)


def scored(images: int = 137, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(images) < 0.4).astype(int)
    probabilities = np.round(
        np.clip(0.4 + 0.25 * labels + 0.2 * rng.normal(size=images), 0, 1), 2
    )  # rounded: with ties
    return labels, probabilities, rng.integers(0, 41, images)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75])
def test_values_agree_with_scikit_learn(threshold: float) -> None:
    labels, probabilities, _ = scored()
    called = probabilities >= threshold
    f1, f1_normal = sklearn.f1_score(labels, called), sklearn.f1_score(labels, called, pos_label=0)
    expected = {
        "accuracy": sklearn.accuracy_score(labels, called),
        "f1": f1,
        "auroc": sklearn.roc_auc_score(labels, probabilities),
        "kappa": sklearn.cohen_kappa_score(labels, called),
        "sensitivity": sklearn.recall_score(labels, called),
        "specificity": sklearn.recall_score(labels, called, pos_label=0),
        "jpe": (1 - f1) ** 2 / 2 + (1 - f1_normal) ** 2 / 2,
    }
    found = classification_metrics(labels, probabilities, threshold=threshold, resamples=0)
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected, abs=1e-12)
    assert all(np.isnan(one.low) for one in found.values())


def test_interval_is_the_one_of_a_plain_loop_over_patients() -> None:
    labels, probabilities, patients = scored()
    names = np.unique(patients)
    rng, loop = np.random.default_rng(1), []
    for _ in range(1500):
        drawn = np.concatenate([np.flatnonzero(patients == one) for one in rng.choice(names, len(names))])
        abnormal, normal = (probabilities[drawn][labels[drawn] == label] for label in (1, 0))
        loop.append((np.sign(abnormal[:, None] - normal).mean() + 1) / 2)
    auroc = classification_metrics(labels, probabilities, patients, resamples=1500)["auroc"]
    assert (auroc.low, auroc.high) == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.01)


def test_images_of_one_patient_are_not_independent() -> None:
    labels, probabilities, _ = scored(60)
    once = classification_metrics(labels, probabilities, np.arange(60))["accuracy"]
    copied = [np.repeat(values, 9) for values in (labels, probabilities, np.arange(60))]
    assert classification_metrics(*copied)["accuracy"] == once


def test_threshold_is_reached_by_an_equal_probability() -> None:
    assert classification_metrics([1, 0], [0.5, 0.49], resamples=0)["accuracy"].value == 1


@pytest.mark.parametrize(
    ("labels", "undefined", "reason"),
    [
        ([], {"accuracy", "f1", "auroc", "kappa", "sensitivity", "specificity", "jpe"}, "no images"),
        ([1, 1, 1], {"auroc", "specificity"}, "no normal images"),
        ([0, 0, 0], {"auroc", "sensitivity"}, "no abnormal images"),
    ],
)
def test_degenerate_input_is_nan_with_a_reason(labels: list[int], undefined: set[str], reason: str) -> None:
    found = classification_metrics(labels, [0.2, 0.7, 0.6][: len(labels)])
    assert {name for name, one in found.items() if np.isnan(one.value)} == undefined
    assert all(reason in found[name].reason for name in undefined)


def test_one_patient_has_values_and_no_interval() -> None:
    auroc = classification_metrics([0, 1, 1], [0.2, 0.7, 0.6], ["a", "a", "a"])["auroc"]
    assert auroc.value == 1
    assert np.isnan(auroc.low)
    assert "one patient" in auroc.reason


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 2], [0.1, 0.2], "labels must be 0"),
        ([0, 1], [0.1, 3.2], "not logits"),
        ([0, 1], [0.1, np.nan], "probabilities must lie in"),
        ([0, 1], [0.1], "must both be"),
    ],
)
def test_wrong_arrays_are_refused(labels: list, probabilities: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probabilities)


def test_study_is_the_mean_of_its_images() -> None:
    studies = study_level([1, 0, 0, 0], [0.9, 0.1, 0.4, 0.2], ["b", "a", "b", "a"], [2, 1, 2, 1])
    assert studies.labels.tolist() == [0, 1]
    assert studies.probabilities == pytest.approx([0.15, 0.65])
    assert studies.patients.tolist() == ["1", "2"]
    assert classification_metrics(*studies)["accuracy"].value == 1
    assert len(study_level([], [], [], []).labels) == 0


@pytest.mark.parametrize("images", [1, 2, 31, 32])
def test_mean_and_median(images: int) -> None:
    values = np.random.default_rng(3).normal(size=images)
    assert mean_estimate(values).value == pytest.approx(values.mean())
    median = median_estimate(values)
    assert median.value == pytest.approx(np.median(values))
    if images > 2:
        assert median.low <= median.value <= median.high
        assert median.low < median.high


def test_mean_and_median_of_nothing() -> None:
    assert mean_estimate([]).reason == median_estimate([]).reason == "no images"


def test_paired_differences_resample_both_scores_together() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    scores = np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0, 1)
    others = np.clip(scores + rng.normal(0, 0.01, 200), 0, 1)
    patients = np.arange(200) // 2
    alone = [classification_metrics(labels, each, patients)["auroc"] for each in (scores, others)]
    difference = paired_differences(labels, scores, others, patients)["auroc"]
    assert difference.value == pytest.approx(alone[1].value - alone[0].value)
    assert difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < (alone[0].high - alone[0].low) / 5  # what both share cancels
    assert paired_differences(labels, scores, scores, patients)["kappa"] == Estimate(0.0, 0.0, 0.0)
    assert "no abnormal" in paired_differences([0, 0], [0.1, 0.2], [0.1, 0.3])["auroc"].reason
