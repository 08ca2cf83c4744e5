from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaphoid.trainer.data.fracatlas import read_fracatlas
from scaphoid.trainer.data.index import InvalidIndexError, read_index, split_by_patient, write_index

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "fracatlas"
HEADER = "image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique"
ROWS = [
    "IMG0000049.jpg,1,0,0,0,0,0,0,1,2,1,0,0",
    "IMG0000050.jpg,0,1,1,0,1,0,0,0,0,0,1,0",
    "IMG0000051.jpg,0,0,0,1,0,1,0,1,1,0,0,1",
]


@pytest.fixture
def published(tmp_path):
    """A miniature of FracAtlas as published."""
    for folder in ("images/Fractured", "images/Non_fractured", "Annotations/YOLO"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dataset.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    for number, folder in ((49, "Fractured"), (50, "Non_fractured"), (51, "Fractured")):
        Image.fromarray(np.zeros((80, 200), np.uint8)).save(tmp_path / "images" / folder / f"IMG{number:07d}.jpg")
    (tmp_path / "Annotations/YOLO/IMG0000049.txt").write_text("0 0.5 0.25 0.1 0.2\n0 0.99 0.5 0.1 0.5\n")
    (tmp_path / "Annotations/YOLO/IMG0000050.txt").write_text("")
    return tmp_path


def test_reads_the_published_layout(published):
    first, second, third = read_fracatlas(published).radiographs
    assert (first.image, first.body_part, first.view) == ("images/Fractured/IMG0000049.jpg", "hand", "frontal")
    assert (first.label, first.width, first.height) == (1, 200, 80)
    assert first.boxes[0] == pytest.approx((90, 12, 110, 28))
    assert first.boxes[1] == pytest.approx((188, 20, 200, 60)), "cut at the image's border"
    assert (second.label, second.boxes, second.body_part) == (0, (), "leg+hip")
    assert third.boxes is None, "fractured without an annotation: unknown"
    assert [first.patient, second.patient, third.patient] == ["block0000", "block0001", "block0001"]


def test_bad_annotations_and_tables_are_refused(published):
    annotation = published / "Annotations/YOLO/IMG0000049.txt"
    annotation.write_text("0 0.5 0.25 0.1\n")
    with pytest.raises(InvalidIndexError, match=r"IMG0000049.txt, line 1: expected `class cx cy w h`"):
        read_fracatlas(published)
    annotation.write_text("0 0.5 0.25 0.1 0.1\n0 1.5 0.25 0.1 0.1\n")
    with pytest.raises(InvalidIndexError, match=r"line 2: expected a box inside the image"):
        read_fracatlas(published)
    (published / "dataset.csv").write_text(HEADER + "\n" + ROWS[0].replace(",0,0,1,2", ",0,0,yes,2") + "\n")
    with pytest.raises(InvalidIndexError, match=r"line 2, column fractured: expected 0 or 1, got 'yes'"):
        read_fracatlas(published)
    (published / "dataset.csv").write_text(HEADER.replace("fractured,", "broken,") + "\n")
    with pytest.raises(InvalidIndexError, match=r"line 1: .*missing: fractured"):
        read_fracatlas(published)
    (published / "dataset.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset\.csv"):
        read_fracatlas(published)


def test_a_missing_image_is_named_and_its_neighbours_are_read(published):
    (published / "images/Non_fractured/IMG0000050.jpg").unlink()
    with pytest.warns(UserWarning, match=r"IMG0000050\.jpg: left out"):
        assert len(read_fracatlas(published)) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the FracAtlas sample is not at {REAL}")
def test_real_radiographs(tmp_path):
    index = read_fracatlas(REAL)
    assert len(index) == 69
    assert sum(r.label for r in index.radiographs) == 40
    assert all(r.boxes for r in index.where(label=1).radiographs)
    first, second = split_by_patient(index, 0.3, seed=1)
    numbers = sorted((int(r.study[3:]), r.patient) for r in index.radiographs)
    assert all(a[1] == b[1] for a, b in pairwise(numbers) if b[0] - a[0] == 1), "neighbours stay together"
    assert not {r.patient for r in first.radiographs} & {r.patient for r in second.radiographs}
    assert read_index(write_index(index, tmp_path / "index.csv")).radiographs == index.radiographs
