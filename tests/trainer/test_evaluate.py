import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from scaphoid.trainer import figures
from scaphoid.trainer.data.index import Index, Radiograph, read_index, write_index
from scaphoid.trainer.evaluate import evaluate, main
from scaphoid.trainer.localization import iou
from scaphoid.trainer.metrics import Estimate
from scaphoid.trainer.predictions import join, read_predictions

WIDTH, HEIGHT = 300, 420
STAGES = {"msfm": ("main", "object"), "kalm": ("global", "local")}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """120 radiographs of 60 two-view studies, 30 patients, two body parts; some abnormal views show no lesion."""
    rng, radiographs = np.random.default_rng(0), []
    for i in range(120):
        study, label = i // 2, int(i // 2 % 2)
        boxes: tuple = ()
        if label and (i % 2 == 0 or i % 3):
            side = rng.choice([20, 60, 150])
            x, y = rng.integers(0, WIDTH - side), rng.integers(0, HEIGHT - side)
            boxes = ((float(x), float(y), float(x + side), float(y + side)),)
        part, patient = ("hand", "wrist")[study % 4 // 2], f"patient{study // 2}"
        image = f"valid/{part}/{patient}/study{study}/image{i % 2}.png"
        radiographs.append(
            Radiograph(image, patient, f"study{study}", "frontal", part, label, boxes, WIDTH, HEIGHT, "valid")
        )
    found = Index(tmp_path_factory.mktemp("data"), tuple(radiographs))
    write_index(found)
    return found


def prediction(
    index: Index, radiograph: Radiograph, flow: str = "msfm", lesion: bool = True, **changes: object
) -> dict:
    """Right in general; its box is the lesion's own, shifted by a tenth of it."""
    rng = np.random.default_rng([ord(letter) for letter in radiograph.image])
    stages = np.clip(0.3 + 0.4 * radiograph.label * lesion + 0.15 * rng.normal(size=2), 0.01, 0.99)
    x0, y0, x1, y1 = radiograph.boxes[0] if radiograph.boxes else (0.0, 0.0, 60.0, 50.0)
    shift = (x1 - x0) / 10
    record = {
        "schema": "scaphoid.prediction/1",
        "image": str(index.path(radiograph)),
        "study": radiograph.study,
        "flow": flow,
        "status": "ok",
        "threshold": 0.5,
        "width": WIDTH,
        "height": HEIGHT,
        "probability": float(stages.mean()),
        "probability_with_parts": None,
        "stages": dict(zip(STAGES[flow], stages.tolist(), strict=True)),
        "box": [x0 + shift, y0, x1 + shift, y1],
        "main_box": [0, 0, WIDTH, HEIGHT],
    }
    return record | changes


def predictions(index: Index, **changes: object) -> list[dict]:
    return [prediction(index, radiograph, **changes) for radiograph in index.radiographs]


def write(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_report_of_files_agrees_with_a_direct_computation(index: Index, tmp_path: Path) -> None:
    records = predictions(index)
    report = evaluate(index, read_predictions(write(tmp_path / "p.jsonl", records)), map_size=(14, 14))
    assert list(report["classification"]) == ["probability", "main_probability", "object_probability"]
    found = report["classification"]["main_probability"]
    labels, scores = [r.label for r in index.radiographs], [record["stages"]["main"] for record in records]
    assert found["image"]["together"]["metrics"]["auroc"].value == pytest.approx(roc_auc_score(labels, scores))
    studies = roc_auc_score(labels[::2], np.reshape(scores, (-1, 2)).mean(axis=1))
    assert found["study"]["together"]["metrics"]["auroc"].value == pytest.approx(studies)
    assert [found[level]["together"][level] for level in ("image", "study")] == [120, 60]
    assert [found["image"][part]["image"] for part in ("hand", "wrist")] == [60, 60]
    kappas = [found["image"][part]["metrics"]["kappa"].value for part in ("hand", "wrist")]
    assert found["image"]["mean of parts"]["metrics"]["kappa"].value == pytest.approx(np.mean(kappas))

    shown = [r for r in index.radiographs if r.boxes]
    methods = report["localization"]["together"]["methods"]
    assert report["localization"]["together"]["image"] == len(shown) < sum(labels)
    own = [iou(prediction(index, r)["box"], r.boxes[0]) for r in shown]
    assert methods["msfm"]["mean_iou"].value == pytest.approx(np.mean(own))
    assert list(methods) == ["msfm", "oracle", "oracle in its object box", "random box", "centre box"]
    assert methods["oracle"]["pcl_0.5"].value > methods["oracle in its object box"]["pcl_0.5"].value
    assert methods["msfm"]["mean_iou"].value > methods["random box"]["mean_iou"].value
    assert sum(report["localization"][size]["image"] for size in ("small", "medium", "large")) == len(shown)


def test_kalm_has_an_oracle_of_its_own_box_size(index: Index) -> None:
    records = [
        prediction(index, r, "kalm", box=[10, 10, 70, 70], stages={"global": 0.2, "local": 0.4})
        for r in index.radiographs
    ]
    report = evaluate(index, records, map_size=(14, 14))
    methods = report["localization"]["medium"]["methods"]  # lesions of 60 x 60
    assert list(methods) == ["kalm", "oracle", "random box", "centre box"]
    assert methods["oracle"]["mean_iou"].value > 0.6 > methods["kalm"]["mean_iou"].value


def test_removing_the_lesion_lowers_the_probability(index: Index, tmp_path: Path) -> None:
    twins = [
        prediction(index, r, lesion=False, image=str(tmp_path / "twins" / r.image))
        for r in index.radiographs
        if r.label
    ]
    report = evaluate(index, predictions(index), twins=twins)["twins"]
    assert report["image"] == sum(bool(r.boxes) for r in index.radiographs)
    assert report["median_drop"].value == pytest.approx(0.4, abs=0.03)
    assert report["median_drop"].low <= report["median_drop"].value <= report["median_drop"].high
    assert report["share_that_drops"].value == 1


def test_what_was_not_predicted_counts_as_a_miss_and_in_no_average(index: Index) -> None:
    records = predictions(index)
    lost = next(i for i, r in enumerate(index.radiographs) if r.boxes)
    whole = evaluate(index, records)
    nothing = {"probability": None, "stages": {}, "box": None, "main_box": None, "width": None, "height": None}
    records[lost] |= nothing | {"status": "failed"}
    report = evaluate(index, records)
    assert report["counts"]["failed"] == 1
    assert report["classification"]["probability"]["image"]["together"]["image"] == 119
    before, after = (one["localization"]["together"] for one in (whole, report))
    assert after["image"] == before["image"]
    expected = before["methods"]["msfm"]["pcl_0.5"].value - 1 / before["image"]
    assert after["methods"]["msfm"]["pcl_0.5"].value == pytest.approx(expected)


def test_other_methods_stand_beside(index: Index) -> None:
    weak = predictions(index, probability=0.5, box=[0, 0, 10, 10])
    plain = predictions(index, box=None, main_box=None)
    report = evaluate(index, predictions(index), beside={"randomised": weak, "plain classifier": plain})
    assert report["beside"]["randomised"]["image"]["together"]["metrics"]["auroc"].value == 0.5
    methods = report["localization"]["together"]["methods"]
    assert methods["randomised"]["pcl_0.3"].value < 0.1
    assert "plain classifier" not in methods


def test_one_class_and_unknown_boxes_do_not_crash(index: Index) -> None:
    normal = Index(index.root, tuple(r for r in index.radiographs if not r.label))
    report = evaluate(normal, predictions(normal))
    auroc = report["classification"]["probability"]["image"]["together"]["metrics"]["auroc"]
    assert np.isnan(auroc.value)
    assert "no abnormal images" in auroc.reason
    assert report["localization"] == {}


def test_reading_keeps_the_last_line_and_copies(index: Index, tmp_path: Path) -> None:
    first, second = predictions(index)[:2]
    copy = second | {"status": "rejected", "duplicate_of": first["image"], "probability": None, "stages": {}}
    path = write(tmp_path / "p.jsonl", [first | {"probability": 0.1}, first, copy])
    with path.open("a") as file:
        file.write('{"schema": "scaphoid.predi')
    records = read_predictions(path)
    assert [record["image"] for record in records] == [first["image"], second["image"]]
    assert [record["probability"] for record in records] == [first["probability"]] * 2
    assert records[0]["main_probability"] == first["stages"]["main"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prediction"),
        ('{"schema": "scaphoid.prediction/1"}\n{"sche\n{}\n', "line 1: a prediction needs flow, image, status"),
        ("{half\n{}\n", "line 1: not JSON"),
        ('{"schema": "scaphoid.study/1"}\n', "expected schema 'scaphoid.prediction/1', got 'scaphoid.study/1'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "p.jsonl")


def test_join(index: Index, tmp_path: Path) -> None:
    first, second = predictions(index)[:2]
    elsewhere = second | {"image": str(tmp_path / index.radiographs[1].image)}
    stranger, resized = second | {"image": "chest.dcm"}, second | {"width": 299}
    cases, unknown = join([first, elsewhere, stranger, resized], index)
    assert [case.radiograph for case in cases] == list(index.radiographs[:2])
    assert unknown == ["chest.dcm", second["image"]]
    with pytest.raises(ValueError, match="one data set's predictions at a time"):
        join([second, elsewhere], index)


def test_command_writes_json_figures_and_tables(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = write(tmp_path / "p.jsonl", predictions(index))
    out = tmp_path / "report"
    arguments = [
        str(path),
        "--index",
        str(index.root),
        "--twins",
        str(path),
        "--beside",
        str(path),
        "--map-size",
        "14",
        "14",
    ]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("AUROC", "centre hit", "oracle", "hand", "mean of parts", "median drop"))
    assert {file.name for file in out.iterdir()} == {
        "evaluation.json",
        "roc.png",
        "calibration.png",
        "pcl_by_size.png",
    }
    written = json.loads((out / "evaluation.json").read_text())
    assert written["twins"]["median_drop"]["value"] == 0
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_command_says_what_is_wrong(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "p.jsonl", [prediction(index, index.radiographs[0], image="elsewhere/x.png")])
    assert main([str(path), "--index", str(index.root)]) == 2
    assert "none of the 1 predicted images is in the index" in capsys.readouterr().err
    mixed = [prediction(index, r, flow) for r, flow in zip(index.radiographs, ("msfm", "kalm"), strict=False)]
    assert main([str(write(path, mixed)), "--index", str(index.root)]) == 2
    assert "one flow" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.jsonl"), "--index", str(index.root)]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_learning_curves_draws_what_has_no_interval_too(tmp_path: Path) -> None:
    points = [(500, Estimate(0.7, 0.6, 0.75)), (4000, Estimate(0.8)), (1000, Estimate(np.nan, reason="no images"))]
    figures.learning_curves({"MSFM": points, "plain": points[:1]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_index_of_the_fixture_reads_back(index: Index) -> None:
    assert read_index(index.root).radiographs == index.radiographs
