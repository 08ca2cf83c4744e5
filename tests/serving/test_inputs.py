"""Finding radiographs and reading one."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.triton_repo import inputs
from scaphoid.triton_repo.inputs import Source, collect, load

SALT = b"a salt for tests"


def png(path, size=(53, 61), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).save(path, **options)
    return path


def dicom(path, uid="1.2.3", pixels=None):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    pixels = np.arange(61 * 53, dtype=np.uint16).reshape(61, 53) if pixels is None else pixels
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3.4"
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    dataset.StudyInstanceUID, dataset.Modality, dataset.PatientName = uid, "CR", "Doe^Jane"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_folders_are_walked_in_order_and_other_files_skipped(tmp_path):
    for name in ("b/2.PNG", "b/1.jpeg", "a/x/deep.bmp", ".hidden/no.png", "a/._no.png"):
        png(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "README").write_text("no suffix, no DICOM magic")
    (tmp_path / "1.2.840.113619.5").write_text("named by a UID, no DICOM magic")
    dicom(tmp_path / "1.2.840.113619.4")
    dicom(tmp_path / "IM0001")
    dicom(tmp_path / "odd.bak")
    collection = collect([tmp_path])
    assert [str(source.path.relative_to(tmp_path)) for source in collection.sources] == [
        "1.2.840.113619.4",
        "IM0001",
        "odd.bak",
        "a/x/deep.bmp",
        "b/1.jpeg",
        "b/2.PNG",
    ]
    assert collection.skipped == {".txt": 1, "without a suffix": 2}
    assert not collection.rejections


def test_the_same_file_twice_is_named(tmp_path):
    path = png(tmp_path / "a.png")
    link = tmp_path / "link.png"
    link.symlink_to(path)
    collection = collect([path, tmp_path, link])
    assert [source.path for source in collection.sources] == [path]
    assert {(item.path, item.duplicate_of) for item in collection.rejections} == {(path, path), (link, path)}
    assert all(str(path) in item.reason for item in collection.rejections)


def test_missing_empty_and_unreadable_are_one_line_each(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    png(tmp_path / "locked/inner/a.png")
    png(tmp_path / "locked/b.png")
    real = os.scandir

    def scandir(path):  # tests may run as root, to whom no folder is closed
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    collection = collect([tmp_path / "nowhere", tmp_path / "empty", tmp_path / "locked"])
    assert [source.path.name for source in collection.sources] == ["b.png"]
    reasons = {item.path.name: item.reason for item in collection.rejections}
    assert reasons["nowhere"] == "does not exist"
    assert "without radiographs" in reasons["empty"]
    assert reasons["inner"] == "folder: permission denied"


def test_pipes_and_huge_files_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    assert collect([tmp_path / "pipe.png"]).rejections[0].reason == "neither a file nor a folder"
    with pytest.raises(RejectedImage, match="not a file"):
        load(Source(tmp_path / "pipe.png", "s"), SALT)
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with pytest.raises(RejectedImage, match="more than the limit"):
        load(Source(png(tmp_path / "a.png"), "s"), SALT)


def test_studies(tmp_path):
    mura = png(tmp_path / "XR_HAND/patient00012/study2_positive/image1.png")
    other = png(tmp_path / "case7/study1_negative/image1.png")
    loose = png(tmp_path / "loose/a.png")
    found = {source.path: source.study for source in collect([tmp_path]).sources}
    assert found[mura] == "XR_HAND/patient00012/study2_positive"
    assert found[other] == "case7/study1_negative"
    assert found[loose] == str(tmp_path / "loose")
    assert collect([loose], one_image_studies=True).sources[0].study == str(loose)
    assert collect([loose], {loose.resolve(): "from the index"}).sources[0].study == "from the index"


def test_dicom_becomes_pixels_and_a_pseudonym(tmp_path):
    paths = [dicom(tmp_path / "a.dcm"), dicom(tmp_path / "b.dcm", pixels=np.eye(61, 53, dtype=np.uint16) * 4000)]
    other = dicom(tmp_path / "c.dcm", uid="1.2.4")
    loaded = {source.path: load(source, SALT) for source in collect([*paths, other]).sources}
    first = loaded[paths[0]]
    assert first.encoded.startswith(b"P5\n53 61\n255\n")
    assert b"Doe" not in first.encoded
    assert (first.width, first.height) == (53, 61)
    assert first.study == loaded[paths[1]].study != loaded[other].study
    assert "1.2.3" not in first.study
    assert load(collect([paths[0]]).sources[0], b"another salt").study != first.study
    in_mura = dicom(png(tmp_path / "patient1/study1_positive/i.png").with_name("x.dcm"))
    assert load(collect([in_mura]).sources[0], SALT).study.endswith("patient1/study1_positive")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_follows_the_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.effect_noise((53, 61), 60).save(buffer, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    loaded = load(Source(tmp_path / "a.jpg", "s"), SALT)
    assert (loaded.width, loaded.height) == ((61, 53) if orientation in (6, 8) else (53, 61))
    assert loaded.encoded == buffer.getvalue()


def test_a_decoder_that_trips_is_a_rejection_that_quotes_nothing(tmp_path, monkeypatch):
    def trip(data, salt):
        raise KeyError("Doe^Jane")

    monkeypatch.setattr(inputs, "read_dicom", trip)
    with pytest.raises(RejectedImage) as error:
        load(Source(dicom(tmp_path / "a.dcm"), "s"), SALT)
    assert str(error.value) == "cannot be read (KeyError)"
