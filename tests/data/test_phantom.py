"""The generator: reproducible, frozen, in the MURA layout.

`python tests/data/test_phantom.py` renews the golden values, after GENERATOR_VERSION was raised.
"""

import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from scaphoid.trainer.data.index import read_index
from scaphoid.trainer.data.mura import read_mura
from scaphoid.trainer.data.phantom import __main__ as command
from scaphoid.trainer.data.phantom import texture
from scaphoid.trainer.data.phantom.artefacts import sample_artefacts
from scaphoid.trainer.data.phantom.generate import (
    BODY_PARTS,
    GENERATOR_VERSION,
    TEST,
    TRAINING,
    Options,
    contact_sheet,
    generate,
    image_path,
    plan_study,
    planned_views,
    render,
)

GOLDEN = Path(__file__).with_name("phantom_golden.json")
GOLDEN_STUDIES = (0, 2, 4, 6, 7, 8, 15)  # of TEST: the seven body parts, all five kinds of lesion, normal ones
SMALL = Options(size=150)


def block_means(image: np.ndarray) -> np.ndarray:
    """Mean grey value of each of 16 x 16 blocks: close to equal on every platform, unlike the pixels."""
    return cv2.resize(image.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA)


def golden_now() -> list[dict]:
    entries = []
    for number in GOLDEN_STUDIES:
        phantom = render(plan_study(TEST.seed, number), 0)
        means = np.round(block_means(phantom.image), 1).ravel().tolist()
        study = phantom.study
        about = {"body_part": study.body_part, "abnormal": study.abnormal, "kind": phantom.kind, "box": phantom.box}
        entries.append({"study": number, **about, "block_means": means})
    return entries


def agrees(entry: dict, golden: dict) -> bool:
    exact = all(entry[k] == golden[k] for k in ("study", "body_part", "abnormal", "kind"))
    means = np.abs(np.subtract(entry["block_means"], golden["block_means"])).max() < 0.6
    if not exact or (entry["box"] is None) != (golden["box"] is None):
        return False
    return bool(means) and (entry["box"] is None or np.abs(np.subtract(entry["box"], golden["box"])).max() <= 2)


def test_generator_is_the_frozen_one():
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == GENERATOR_VERSION, (
        "a new version: regenerate the golden values, and retrain what is shipped"
    )
    for entry, expected in zip(golden_now(), golden["images"], strict=True):
        assert agrees(entry, expected), (
            f"study {entry['study']} has changed: raise GENERATOR_VERSION, or undo the change"
        )


def test_golden_values_notice_a_small_change(monkeypatch):
    golden = json.loads(GOLDEN.read_text())["images"]
    monkeypatch.setattr(texture, "MARROW", texture.MARROW * 1.1)
    assert not all(agrees(a, b) for a, b in zip(golden_now(), golden, strict=True))


def test_frozen_seeds():
    assert (TRAINING.seed, TRAINING.images, TRAINING.split) == (20171, 4400, "train")
    assert (TEST.seed, TEST.images, TEST.split) == (77008, 500, "valid")


def test_an_image_depends_on_nothing_but_its_own_number(tmp_path):
    few = generate(tmp_path / "few", 3, seed=9, options=SMALL)
    more = generate(tmp_path / "more", 20, seed=9, options=SMALL, workers=2)
    assert (len(few), len(more)) == (3, 20)
    for a, b in zip(few.radiographs, more.radiographs, strict=False):
        assert a == b
        assert few.path(a).read_bytes() == more.path(b).read_bytes()
    other = render(plan_study(10, 0, SMALL), 0, SMALL)
    assert (other.image != render(plan_study(9, 0, SMALL), 0, SMALL).image).any()


def test_a_full_disk_gives_the_systems_reason_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("scaphoid.trainer.data.phantom.generate.image_path", lambda *_: "/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as error:
        generate(tmp_path, 1, seed=9, options=SMALL)
    assert error.value.errno == errno.ENOSPC


def test_mura_reader_reads_what_was_drawn(tmp_path):
    ticks: list[int] = []
    index = generate(tmp_path, 21, seed=4, split="valid", options=SMALL, progress=ticks.append)
    assert sum(ticks) == 21
    assert read_index(tmp_path) == index
    common = ("image", "patient", "study", "body_part", "label", "width", "height", "split")
    rows = [[[getattr(r, c) for c in common] for r in source.radiographs] for source in (index, read_mura(tmp_path))]
    assert sorted(rows[0]) == sorted(rows[1])
    image = cv2.imread(str(index.path(index.radiographs[0])), cv2.IMREAD_UNCHANGED)
    assert (image.shape, image.dtype) == ((150, 150), np.uint8)
    assert all(r.boxes == () for r in index.radiographs if r.label == 0)
    assert any(r.boxes for r in index.radiographs if r.label == 1)


def test_studies_share_patient_bone_and_label():
    studies = [plan_study(7, number) for number in range(400)]
    counts = np.bincount([len(s.views) for s in studies], minlength=5)
    assert (counts[1:] > 30).all()
    assert counts[0] == 0
    assert {s.body_part for s in studies} == set(BODY_PARTS)
    assert {v.name for s in studies for v in s.views} == {"frontal", "lateral", "oblique"}
    assert {s.lesion.kind for s in studies} == {"fracture", "displacement", "lytic", "sclerotic", "metal"}
    assert 0.45 <= np.mean([s.abnormal for s in studies]) <= 0.5
    again = [s for s in studies if s.order == 2]
    assert len(again) == 50
    for study in again:
        before = studies[study.number - 1]
        assert study.patient_number == before.patient_number
        assert study.patient.cortex == before.patient.cortex
        assert image_path(study, 0, "train").split("/")[3:5] == [
            f"patient{before.number + 1:05d}",
            f"study2_{'positive' if study.abnormal else 'negative'}",
        ]


def test_label_moves_neither_anatomy_nor_lesion():
    normal, abnormal = (Options(size=150, abnormal_fraction=f) for f in (0.0, 1.0))
    for number in range(6):
        a, b = plan_study(5, number, normal), plan_study(5, number, abnormal)
        assert (a.abnormal, b.abnormal) == (False, True)
        assert (a.lesion, a.view_seeds) == (b.lesion, b.view_seeds)
        for lesion in (False, True):
            images = [render(s, 0, o, lesion=lesion).image for s, o in ((a, normal), (b, abnormal))]
            assert (images[0] == images[1]).all()


@pytest.mark.parametrize(("correlation", "abnormal", "normal"), [(0.0, 0.3, 0.3), (0.5, 0.65, 0.15), (1.0, 1.0, 0.0)])
def test_artefacts_follow_the_label_as_far_as_asked(correlation, abnormal, normal):
    def share(label: bool) -> list[float]:
        rng = np.random.default_rng(3)
        draws = [sample_artefacts(rng, label, 0.3, correlation, 0.3, correlation) for _ in range(3000)]
        return [np.mean([a.marker for a in draws]), np.mean([a.metal for a in draws])]

    assert share(True) == pytest.approx([abnormal] * 2, abs=0.03)
    assert share(False) == pytest.approx([normal] * 2, abs=0.03)


def test_a_letter_is_drawn_and_moves_nothing_else():
    with_letter, without = (Options(size=150, marker_fraction=f, metal_fraction=0) for f in (1.0, 0.0))
    study = plan_study(3, 2, with_letter)
    a, b = (render(study, 0, o, lesion=False).image.astype(int) for o in (with_letter, without))
    differs = np.abs(a - b) > 0
    assert 10 < differs.sum() < 0.1 * differs.size
    assert (a - b)[differs].max() > 60


def test_contact_sheet(tmp_path):
    path = contact_sheet(2, tmp_path / "sheets" / "sheet.png", columns=2, tile=64, options=Options(size=128))
    assert cv2.imread(str(path)).shape == (7 * 64, 2 * 64, 3)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"size": 32}, "size"), ({"marker_correlation": 1.5}, "marker_correlation"), ({"body_parts": ("knee",)}, "knee")],
)
def test_options_out_of_range_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Options(**wrong)


def test_command_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "set"), "--images", "5", "--seed", "8", "--size", "128", "--workers", "1"]
    assert command.main(arguments) == 0
    assert len(read_index(tmp_path / "set")) == 5
    assert command.main(arguments) == 2, "an existing set is not overwritten"
    assert "already holds an index.csv" in " ".join(capsys.readouterr().err.split())


def test_planned_views_are_a_prefix():
    long = [(s.number, k) for s, k in planned_views(6, 50)]
    assert [(s.number, k) for s, k in planned_views(6, 20)] == long[:20]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"version": GENERATOR_VERSION, "images": golden_now()}) + "\n")
