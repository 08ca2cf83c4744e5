import numpy as np
import pytest
from PIL import Image

from scaphoid.trainer.data.index import InvalidIndexError
from scaphoid.trainer.data.mura import read_mura

STUDIES = {
    "train/XR_WRIST/patient00001/study1_positive": ["image1.png", "image2.png"],
    "train/XR_WRIST/patient00001/study2_negative": ["image1.png"],
    "train/XR_FINGER/patient00017/study1_negative": ["image1.png"],
    "valid/XR_SHOULDER/patient11185/study1_positive": ["image1.png", "image10.png"],
}


@pytest.fixture
def mura(tmp_path):
    """A miniature of MURA v1.1, with its CSV files and the archive's macOS leftovers."""
    for study, names in STUDIES.items():
        folder = tmp_path / "MURA-v1.1" / study
        folder.mkdir(parents=True)
        for name in names:
            Image.fromarray(np.full((37, 53), 90, np.uint8)).save(folder / name)
    (tmp_path / "MURA-v1.1/train/XR_WRIST/patient00001/study1_positive/._image1.png").write_bytes(b"\0\5\x16\7")
    for split in ("train", "valid"):
        studies = [f"MURA-v1.1/{s}/" for s in STUDIES if s.startswith(split)]
        labels = "".join(f"{s},{int('positive' in s)}\n" for s in studies)
        (tmp_path / "MURA-v1.1" / f"{split}_labeled_studies.csv").write_text(labels)
        images = "".join(f"MURA-v1.1/{s}/{n}\n" for s, names in STUDIES.items() if s.startswith(split) for n in names)
        (tmp_path / "MURA-v1.1" / f"{split}_image_paths.csv").write_text(images)
    return tmp_path


def test_reads_the_published_layout(mura):
    index = read_mura(mura)
    assert len(index) == 6
    assert index == read_mura(mura / "MURA-v1.1")
    first = index.where(body_part="wrist", label=1).radiographs[0]
    assert first.image == "MURA-v1.1/train/XR_WRIST/patient00001/study1_positive/image1.png"
    assert (first.patient, first.study, first.split) == ("patient00001", "study1_positive", "train")
    assert (first.width, first.height, first.view, first.boxes) == (53, 37, "", None)
    assert all(r.boxes == () for r in index.where(label=0).radiographs)
    assert all(index.path(r).is_file() for r in index.radiographs)
    assert {r.split for r in read_mura(mura, splits=("valid",)).radiographs} == {"valid"}


def test_size_follows_exif_orientation(mura):
    path = mura / "MURA-v1.1/train/XR_FINGER/patient00017/study1_negative/image1.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((37, 53), np.uint8)).save(path, exif=exif)
    finger = read_mura(mura).where(body_part="finger").radiographs[0]
    assert (finger.width, finger.height) == (37, 53)


def test_table_that_contradicts_a_folder_is_refused(mura):
    table = mura / "MURA-v1.1/train_labeled_studies.csv"
    table.write_text(table.read_text().replace("study2_negative/,0", "study2_negative/,1"))
    with pytest.raises(InvalidIndexError, match=r"train_labeled_studies.csv, line 2, column 2: expected 0.*study2_neg"):
        read_mura(mura)
    table.write_text("MURA-v1.1/train/x/,positive\n")
    with pytest.raises(InvalidIndexError, match="line 1: expected a study folder and 0 or 1"):
        read_mura(mura)


def test_a_bad_image_is_named_and_its_neighbours_are_read(mura):
    bad = mura / "MURA-v1.1/train/XR_WRIST/patient00001/study1_positive/image2.png"
    bad.write_bytes(bad.read_bytes()[:20])
    with pytest.warns(UserWarning, match=r"study1_positive/image2.png: left out"):
        assert len(read_mura(mura)) == 5


def test_a_missing_image_is_named(mura):
    (mura / "MURA-v1.1/valid/XR_SHOULDER/patient11185/study1_positive/image10.png").unlink()
    with pytest.warns(UserWarning, match=r"valid_image_paths.csv, line 2: .*image10.png does not exist"):
        assert len(read_mura(mura)) == 5


def test_unknown_folders_and_empty_roots_are_refused(mura, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"MURA-v1\.1/train"):
        read_mura(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="test"):
        read_mura(mura, splits=("test",))
    (mura / "MURA-v1.1/train/XR_WRIST").rename(mura / "MURA-v1.1/train/XR_KNEE")
    with pytest.raises(InvalidIndexError, match="'XR_KNEE'"):
        read_mura(mura)


def test_study_folder_without_a_verdict_is_refused(mura):
    study = mura / "MURA-v1.1/train/XR_WRIST/patient00001/study2_negative"
    study.rename(study.with_name("study2"))
    with pytest.raises(InvalidIndexError, match=r"expected study1_positive.*'study2'"):
        read_mura(mura)
