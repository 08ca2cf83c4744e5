"""The HTML report and the overlays."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaphoid.trainer import pictures
from scaphoid.trainer.data.index import Radiograph
from scaphoid.trainer.journal import Prediction
from scaphoid.triton_repo.report import report
from scaphoid.triton_repo.report.outcome import Outcome
from scaphoid.triton_repo.report.overlays import overlay_name, write_overlay
from scaphoid.triton_repo.results import studies_of

RGB = {"box": (0xFF, 0xB0, 0x00), "main": (0x5A, 0xB4, 0xFF), "truth": (0x59, 0xE3, 0x9A)}


def prediction(image, study="s", probability=0.8, **changes):
    known = {
        "image": str(image),
        "study": study,
        "flow": "msfm",
        "model_version": "3",
        "parts": False,
        "status": "ok",
        "threshold": 0.5,
        "sha256": "ab" * 32,
        "width": 90,
        "height": 130,
        "probability": probability,
        "stages": {"main": probability, "object": probability},
        "box": [20.0, 30.0, 50.0, 60.0],
        "main_box": [10.0, 12.0, 80.0, 110.0],
        "windows": [{"box": [15.0, 20.0, 45.0, 55.0], "score": 1.0}] * 7,
        "margin": 0.01,
    }
    return Prediction(**known | changes).judged(0.5)


def outcome(predictions, truth=None, phantoms=""):
    studies = studies_of(predictions, 0.5)
    return Outcome("msfm", "3", phantoms, "127.0.0.1:8001", False, 0.5, 1e-4, predictions, studies, truth or {})


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "wrist.png"
    Image.new("L", (90, 130), 40).save(path)
    return path


class Page(HTMLParser):
    """Checks that tags close in order, and gathers attributes and text."""

    VOID = ("meta", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text, self.tags = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def page(tmp_path, result):
    report.write_report(tmp_path / "report.html", result)
    text = (tmp_path / "report.html").read_text()
    return Page(text), text


def test_nothing_external_and_no_scripts(tmp_path, image):
    parsed, text = page(tmp_path, outcome([prediction(image)]))
    assert "script" not in parsed.tags
    assert not {"link", "iframe", "object"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))
        assert not name.startswith("on")
    assert not re.search(r"url\(|@import|https?:", text)
    assert parsed.text.count("Research use only; not a medical device.") == 2


def test_the_abnormal_box_is_drawn_only_when_called_abnormal(tmp_path, image):
    for probability, drawn in ((0.5, 1), (0.49, 0)):
        _, text = page(tmp_path, outcome([prediction(image, probability=probability)]))
        figure = text[text.index("<figure") : text.index("</figure>")]
        assert figure.count('<rect class="box" x="20.0" y="30.0" width="30.0" height="30.0"/>') == drawn
        assert figure.count('<rect class="main"') == 1
        assert figure.count('<rect class="window"') == 7
        assert 'viewBox="0 0 90 130"' in figure


def test_studies_come_by_probability_with_flags_labels_and_rejections(tmp_path, image):
    shutil.copy(image, f"{image}.b")
    predictions = [
        prediction(image, "calm", 0.2),
        prediction(f"{image}.b", "part/patient/suspicious", 0.9, margin=1e-6),
        prediction(tmp_path / "<script>alert(1)</script>.png", "odd", 0.6),
        prediction(
            "broken.png",
            "calm",
            None,
            status="rejected",
            reason="truncated: no end",
            stages={},
            windows=[],
            margin=None,
        ),
    ]
    row = Radiograph("b", "p", "s", "", "wrist", 1, ((5.0, 6.0, 25.0, 36.0),), 90, 130, "test")
    parsed, text = page(tmp_path, outcome(predictions, {f"{image}.b": row}))
    order = [parsed.text.index(name) for name in ("part / patient / suspicious", "odd", "calm")]
    assert order == sorted(order)
    assert text.count('class="chip unstable" title=') == 1
    assert "label: abnormal" in parsed.text
    assert text.count('<rect class="truth" x="5.0"') == 1
    assert "truncated: no end" in parsed.text
    assert "1 not predicted" in parsed.text
    assert "the file is no longer there" in parsed.text  # the one whose name is markup


def test_the_report_stays_small_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_PICTURES", 5)
    monkeypatch.setattr(report, "PICTURE_BUDGET_BYTES", 5 * 9_000)
    noise = np.random.default_rng(3).integers(0, 255, (701, 503), dtype=np.uint8)
    predictions = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.roll(noise, number)).save(path)
        predictions.append(prediction(path, f"study {number}", 0.9 - number / 10, width=503, height=701))
    parsed, _ = page(tmp_path, outcome(predictions))
    assert parsed.tags.count("image") == 5
    pictures_bytes = sum(len(value) for name, value in parsed.attributes if name == "href" and value[0] != "#")
    assert pictures_bytes < 5 * 40_000  # noise is the worst there is: the smallest size, whatever it takes
    assert "Further studies, without pictures (2)" in parsed.text
    assert "at most 5 pictures" in parsed.text
    assert "predictions.jsonl" in parsed.text
    assert "study 6" in parsed.text


def test_the_closer_look_is_the_main_box_of_the_same_picture(tmp_path, image):
    _, text = page(tmp_path, outcome([prediction(image)]))
    closer = text[text.index('<div class="closer"') : text.index("</figure>")]
    assert 'viewBox="10.0 12.0 70.0 98.0"' in closer
    assert closer.count('<use href="#i1"/>') == 1
    assert closer.count('<rect class="window key"') == 7
    assert closer.count('<rect class="box key" x="20.0"') == 1
    assert text.count("data:image/jpeg") == 1


@pytest.mark.parametrize("phantoms", ["", "1.0.0"])
def test_weights_that_know_phantoms_alone_say_so_at_the_top(tmp_path, image, phantoms):
    parsed, text = page(tmp_path, outcome([prediction(image)], phantoms=phantoms))
    assert ("Trained on synthetic phantoms." in text[: text.index("<main>")]) == bool(phantoms)
    assert ("phantom generator 1.0.0" in parsed.text) == bool(phantoms)


def labelled(image, labels, wrong=0):
    """That many predictions of one picture, by their labels, the first `wrong` scores upside down, and their truth."""
    predictions, truth = [], {}
    for number, label in enumerate(labels):
        score = (0.2 + 0.6 * (label != (number < wrong))) + number / 10_000
        predictions.append(prediction(f"{image}.{number}", f"p{number}/s", score))
        truth[predictions[-1].image] = Radiograph("x", f"p{number}", "s", "", "wrist", label, None, 90, 130, "all")
    return predictions, truth


def test_labels_of_the_index_give_an_auroc_with_its_interval(tmp_path, image):
    parsed, _ = page(tmp_path, outcome(*labelled(image, [0, 1] * 60, wrong=6)))
    assert "Against the labels of the index" in parsed.text
    value, low, high = map(float, re.search(r"(0\.\d{3}) \((0\.\d{3})-([01]\.\d{3})\)", parsed.text).groups())
    assert low < value < high
    assert "Plumbing, not accuracy" not in parsed.text
    assert parsed.text.count("label: abnormal") == 60


@pytest.mark.parametrize("labels", [[0, 1] * 20, [0, 0, 1]])
def test_few_labels_are_plumbing_not_accuracy(tmp_path, image, labels):
    parsed, _ = page(tmp_path, outcome(*labelled(image, labels)))
    assert "Plumbing, not accuracy" in parsed.text


def test_one_class_alone_has_no_auroc(tmp_path, image):
    parsed, _ = page(tmp_path, outcome(*labelled(image, [1, 1])))
    assert "auroc is undefined: no normal images" in parsed.text


def test_without_an_index_nothing_is_compared(tmp_path, image):
    assert "Against the labels" not in page(tmp_path, outcome([prediction(image)]))[0].text


def test_an_empty_run_still_reports(tmp_path):
    rejected = prediction(
        "a.png", probability=None, status="rejected", reason="empty: 0 bytes", stages={}, windows=[], margin=None
    )
    parsed, _ = page(tmp_path, outcome([rejected]))
    assert "No image was predicted." in parsed.text


def pixel_near(picture, colour, x, y, reach=2):
    patch = np.asarray(picture)[y - reach : y + reach + 1, x - reach : x + reach + 1].reshape(-1, 3)
    return (patch == colour).all(1).any()


def test_overlay_boxes_lie_where_they_belong(tmp_path):
    image = np.full((1500, 2100), 70, np.uint8)  # shrunk to 1024 px: factor 0.4876
    picture = pictures.overlay(
        image, box=(400, 300, 1000, 900), main_box=(100, 100, 2000, 1400), truth=[(1200, 200, 1500, 400)]
    )
    assert picture.size == (1024, 731)
    scale = 1024 / 2100
    assert pixel_near(picture, RGB["box"], round(400 * scale), round(600 * scale))
    assert pixel_near(picture, RGB["box"], round(700 * scale), round(900 * scale))
    assert pixel_near(picture, RGB["main"], round(2000 * scale), round(700 * scale))
    assert pixel_near(picture, RGB["truth"], round(1201 * scale), round(200 * scale))
    assert not pixel_near(picture, RGB["box"], round(700 * scale), round(600 * scale), reach=20)
    captioned = pictures.overlay(image, "0.81 abnormal\nmain 0.80")
    assert captioned.width == 1024
    assert captioned.height > 731


def test_overlay_of_a_turned_radiograph_is_upright(tmp_path):
    stored = np.full((60, 100), 20, np.uint8)
    stored[:, :10] = 240  # the stored left edge is the top once turned by 90 degrees clockwise (orientation 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(stored).save(path, exif=exif, quality=95)
    shown = pictures.load_radiograph(path)
    assert shown.shape == (100, 60)
    assert shown[:8].mean() > 200 > 60 > shown[20:].mean()
    written = write_overlay(
        tmp_path / "overlays", prediction(path, probability=0.9, width=60, height=100, box=[5, 20, 40, 70])
    )
    assert pixel_near(Image.open(written), RGB["box"], 5, 45)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(
        pictures.load_radiograph(tmp_path / "deep.png"), np.rint(values / 257).astype(np.uint8)
    )


def test_boxes_at_and_over_the_edge_are_drawn(tmp_path):
    picture = pictures.overlay(
        np.zeros((40, 37), np.uint8), box=(-5.0, -5.0, 60.0, 60.0), truth=[(36.9, 39.9, 37.0, 40.0)]
    )
    assert pixel_near(picture, RGB["box"], 34, 34)


def test_overlay_names_are_readable_and_distinct():
    name = overlay_name(prediction(Path("XR_HAND/patient1/study1_positive/image 1.png")))
    assert name == "XR_HAND_patient1_study1_positive_image-1-abababab.png"
