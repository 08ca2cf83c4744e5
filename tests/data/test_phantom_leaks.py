"""What would let a model cheat: pixels outside the lesion, grey values, file size, body part, the image's centre."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scaphoid.trainer.data.index import Index
from scaphoid.trainer.data.phantom.generate import (
    BODY_PARTS,
    TWIN_MARGIN,
    Options,
    generate,
    planned_views,
    render,
    twin,
)


@pytest.mark.parametrize("size", [150, 333])
def test_twins_differ_only_inside_the_dilated_box(size):
    options = Options(size=size)
    pairs = 0
    for study, view in planned_views(31, 16, options):
        with_lesion, without = twin(study, view, options)
        differs = with_lesion.image != without.image
        if with_lesion.box is None:
            assert not differs.any()
            continue
        x0, y0, x1, y1 = with_lesion.box
        assert 0 <= x0 < x1 <= size
        assert 0 <= y0 < y1 <= size
        margin = TWIN_MARGIN * size
        rows, columns = np.arange(size) + 0.5, np.arange(size) + 0.5
        inside = (
            ((rows > y0 - margin) & (rows < y1 + margin))[:, None] & (columns > x0 - margin) & (columns < x1 + margin)
        )
        assert differs[inside].any()
        assert not (differs & ~inside).any()
        pairs += 1
    assert pairs >= 12


def test_a_rendered_view_is_the_twin_that_its_label_says():
    options = Options(size=150)
    for study, view in planned_views(32, 6, options):
        pair = twin(study, view, options)
        phantom = render(study, view, options)
        assert (phantom.image == pair[0 if study.abnormal else 1].image).all()
        assert phantom.box == pair[0 if study.abnormal else 1].box


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Index:
    """1,100 images; 288 pixels are enough for every feature below, and quicker to draw."""
    return generate(tmp_path_factory.mktemp("phantoms"), 1100, seed=4242, options=Options(size=288), workers=2)


def features(index: Index) -> np.ndarray:
    rows = []
    for r in index.radiographs:
        path: Path = index.path(r)
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        histogram = np.histogram(image, 32, (0, 256))[0] / image.size
        thumbnail = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).ravel() / 255
        rows.append(np.hstack([histogram, thumbnail, path.stat().st_size, [r.body_part == p for p in BODY_PARTS]]))
    return np.array(rows, float)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.01, 1.0])
def test_nothing_global_tells_the_label(thousand, weight):
    """Logistic regression on histogram, 16 x 16 thumbnail, file size and body part, five folds by patient."""
    labels = np.array([r.label for r in thousand.radiographs])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=weight, max_iter=2000))
    patients = [r.patient for r in thousand.radiographs]
    folds = GroupKFold(5)
    scores = cross_val_predict(model, features(thousand), labels, groups=patients, cv=folds, method="predict_proba")[
        :, 1
    ]
    assert roc_auc_score(labels, scores) <= 0.60


@pytest.mark.slow
def test_lesions_have_the_intended_sizes_and_are_not_in_the_centre(thousand):
    abnormal = thousand.where(label=1).radiographs
    boxes = np.array([r.boxes[0] for r in abnormal if r.boxes]) / 288
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    assert 0.08 <= np.median(sides) <= 0.12
    assert np.quantile(sides, 0.9) >= 0.30
    assert 0.88 <= len(boxes) / len(abnormal) < 1, "visible in most views, not in all"
    assert 0.45 <= len(abnormal) / len(thousand) <= 0.5
    centres, half = (boxes[:, :2] + boxes[:, 2:]) / 2, np.median(sides) / 2
    assert (np.abs(centres - 0.5) < half).all(1).mean() <= 0.25, "lesion centres in a centre box of median size"
    assert ((boxes[:, :2] <= 0.5) & (boxes[:, 2:] > 0.5)).all(1).mean() <= 0.25, "boxes that hold the image's centre"
