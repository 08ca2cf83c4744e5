"""DICOM radiographs as a reader sees them, and every kind that is refused; nothing but pixels comes out."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from scaphoid.trainer.data.dicom import DicomRadiograph, read_dicom, to_pgm
from scaphoid.trainer.data.guard import MAX_PIXELS, RejectedImage, check_encoded
from scaphoid.trainer.data.pipeline import decode_batch

SALT = b"salt"
RAMP = np.linspace(0, 4095, 50 * 70).astype(np.uint16).reshape(50, 70)


def dicom(stored: np.ndarray = RAMP, **tags) -> bytes:
    """A radiograph of 12 bits, MONOCHROME2, with `tags` set (None: removed)."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["image"])
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.PatientName, dataset.StudyInstanceUID = "Doe^Jane", generate_uid(entropy_srcs=["study"])
    dataset.Modality, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = "DX", 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored = 8 * stored.itemsize, min(12, 8 * stored.itemsize)
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    dataset.HighBit = dataset.BitsStored - 1
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def pixels(stored: np.ndarray = RAMP, **tags) -> np.ndarray:
    return read_dicom(dicom(stored, **tags), SALT).pixels


def bundled(name: str) -> str:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} comes with pydicom-data, which is not installed")
    return path


@pytest.mark.parametrize(("name", "shape"), [("RG1", (1955, 1841)), ("RG3", (1760, 1760))])
def test_real_radiographs_read_the_same_from_every_compression(name, shape):
    plain = read_dicom(bundled(f"{name}_UNCR.dcm"), SALT)
    lossless = read_dicom(bundled(f"{name}_J2KR.dcm"), SALT)
    lossy = read_dicom(bundled(f"{name}_J2KI.dcm"), SALT)
    assert plain.pixels.shape == shape
    assert plain.pixels.dtype == np.uint8
    np.testing.assert_array_equal(lossless.pixels, plain.pixels)
    assert np.abs(lossy.pixels.astype(int) - plain.pixels).mean() < 1
    assert plain.study == lossless.study


def test_bone_is_bright_and_air_is_dark_in_monochrome1():
    """RG3 is a tibia between two strips of air; the file stores it inverted."""
    shown = read_dicom(bundled("RG3_UNCR.dcm"), SALT).pixels
    air, shaft = shown[600:800, 600:650], shown[600:800, 815:860]
    assert air.mean() < 40
    assert shaft.mean() > 120


@pytest.mark.parametrize("name", ["RG1_J2KR.dcm", "RG3_UNCR.dcm"])
def test_a_dicom_radiograph_travels_as_pgm(name):
    radiograph = read_dicom(bundled(name), SALT)
    encoded = to_pgm(radiograph.pixels)
    assert check_encoded(encoded).format == "PGM"
    images, sizes = decode_batch([encoded], 64)
    assert sizes.tolist() == [list(radiograph.pixels.shape)]
    assert abs(images.mean() - radiograph.pixels.mean()) < 1


def test_window_is_linear_between_its_ends():
    shown = pixels(WindowCenter=1000, WindowWidth=1001)  # C.11.2.1.2: black up to 499.5, white above 1499.5
    expected = np.clip((RAMP - 999.5) / 1000 + 0.5, 0, 1) * 255
    assert np.abs(shown - expected).max() <= 0.51


def test_the_first_of_several_windows_counts():
    np.testing.assert_array_equal(
        pixels(WindowCenter=[1000, 3000], WindowWidth=[500, 100]), pixels(WindowCenter=1000, WindowWidth=500)
    )


def test_window_applies_after_the_rescale():
    rescaled = pixels(RescaleSlope=2, RescaleIntercept=-100, WindowCenter=1900, WindowWidth=2001)
    assert np.abs(rescaled.astype(int) - pixels(WindowCenter=1000, WindowWidth=1001)).max() <= 1


def test_monochrome1_is_inverted_once():
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    inverted = pixels(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE", **window)
    assert np.abs(inverted.astype(int) + pixels(**window) - 255).max() <= 1
    assert inverted[0, 0] > 250


def test_signed_pixels():
    shown = pixels(RAMP.astype(np.int16) - 2048, WindowCenter=0, WindowWidth=4096)
    assert np.abs(shown.astype(int) - pixels(WindowCenter=2048, WindowWidth=4096)).max() <= 1


@pytest.mark.parametrize(("rescaled", "bits"), [(False, 10), (True, 10), (False, 8)])
def test_voi_lut_takes_precedence_over_the_window(rescaled, bits):
    white = 2**bits - 1
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, bits], np.arange(4096).clip(max=white).astype("<u2").tobytes()
    tags = {"RescaleSlope": 1, "RescaleIntercept": 0} if rescaled else {}
    shown = pixels(VOILUTSequence=[table], WindowCenter=3000, WindowWidth=10, **tags)
    assert np.abs(shown - np.minimum(RAMP, white) / white * 255).max() <= 0.51


def test_sigmoid_window():
    shown = pixels(WindowCenter=2048, WindowWidth=1000, VOILUTFunction="SIGMOID")
    assert np.abs(shown - 255 / (1 + np.exp(-4 * (RAMP - 2048.0) / 1000))).max() <= 0.51


def test_without_a_window_percentiles_are_shown():
    spiked = RAMP // 4 + 500
    spiked[0, :5], spiked[1, :5] = 4095, 0  # hot and dead pixels must not set the range
    shown = pixels(spiked)
    assert shown[25, 35] == pytest.approx(127, abs=4)
    assert (shown == 255).mean() < 0.02


def test_without_a_window_8_bits_stay_as_stored():
    stored = (RAMP // 32 + 20).astype(np.uint8)
    np.testing.assert_array_equal(pixels(stored), stored)


def test_padding_is_black_and_does_not_set_the_range():
    padded = RAMP // 4 + 500
    padded[:, :20] = 4000
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        shown = pixels(padded, PixelPaddingValue=4000, PhotometricInterpretation=photometric)
        assert (shown[:, :20] == 0).all()
        assert shown[:, 20:].max() == 255
        assert np.median(shown[:, 20:]) == pytest.approx(127, abs=10)


REJECTED = {
    "empty": (lambda: b"", "empty: 0 bytes"),
    "zero bytes": (lambda: bytes(5000), "all zero"),
    "not dicom": (lambda: b"\x89PNG" + bytes(500), "not a DICOM file"),
    "header alone": (lambda: dicom()[:132], "without pixels|damaged"),
    "cut": (lambda: dicom()[:-1000], "damaged"),
    "no pixels": (lambda: dicom(PixelData=None), "without pixels"),
    "no rows": (lambda: dicom(Rows=None), "without pixels"),
    "no bits": (lambda: dicom(BitsStored=None), "does not describe"),
    "frames": (lambda: dicom(np.stack([RAMP, RAMP]), NumberOfFrames=2), "2 frames"),
    "colour": (lambda: dicom(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0), "colour"),
    "palette": (lambda: dicom(PhotometricInterpretation="PALETTE COLOR"), "colour"),
    "another modality": (lambda: dicom(Modality="CT"), "modality CT"),
    "raw": (lambda: dicom(PresentationIntentType="FOR PROCESSING"), "FOR PROCESSING"),
    "too large": (lambda: dicom(Rows=60000, Columns=MAX_PIXELS // 60000 + 1), "too large"),
    "too small": (lambda: dicom(RAMP[:1, :1]), "too small"),
    "blank": (lambda: dicom(np.full((50, 70), 9, np.uint16)), "blank"),
    "all padding": (lambda: dicom(np.full((50, 70), 9, np.uint16), PixelPaddingValue=9), "blank"),
    "window of no width": (lambda: dicom(WindowCenter=9, WindowWidth=0), "window"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unfit_files_are_rejected_in_one_line_that_quotes_no_person(name, recwarn, caplog):
    make, reason = REJECTED[name]
    data = make()
    recwarn.clear()
    with pytest.raises(RejectedImage, match=reason) as caught:
        read_dicom(data, SALT)
    assert "\n" not in caught.value.reason
    assert "Doe" not in caught.value.reason + caplog.text
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rtplan.dcm", "without pixels"),
        ("MR_truncated.dcm", "modality MR"),
        ("SC_rgb.dcm", "colour"),
        ("SC_rgb_rle_2frame.dcm", "2 frames"),
        ("image_dfl.dcm", "deflated"),
    ],
)
def test_bundled_files_that_are_no_radiographs(name, reason):
    with pytest.raises(RejectedImage, match=reason):
        read_dicom(bundled(name), SALT)


# -- the compressed frame's own header


def compressed(frame: bytes, syntax: str, **tags) -> bytes:
    """A file whose header says 50 x 70 pixels of 8 bits around a compressed `frame`."""
    dataset = pydicom.dcmread(io.BytesIO(dicom(EIGHT_BITS, **tags)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def jpeg(shape: tuple[int, ...], **options) -> bytes:
    file = io.BytesIO()
    picture = np.resize(EIGHT_BITS, shape)
    Image.fromarray(picture).save(file, **{"format": "JPEG", "quality": 95} | options)
    return file.getvalue()


EIGHT_BITS = (RAMP // 16).astype(np.uint8)
JPEG_2000 = {"format": "JPEG2000", "irreversible": False}
LARGE_LS = b"\xff\xd8\xff\xf7\x00\x0b\x08\xea\x60\xea\x60\x01\x01\x11\x00" + bytes(100)  # 60000 x 60000


@pytest.mark.parametrize(
    ("frame", "syntax"),
    [
        (jpeg((50, 70)), uid.JPEGBaseline8Bit),
        (jpeg((50, 70), **JPEG_2000, no_jp2=True), uid.JPEG2000Lossless),
        (jpeg((50, 70), **JPEG_2000, no_jp2=False), uid.JPEG2000Lossless),  # within boxes, which no file should have
    ],
)
def test_a_frame_of_the_size_in_the_header_is_read(frame, syntax):
    assert np.abs(read_dicom(compressed(frame, syntax), SALT).pixels.astype(int) - EIGHT_BITS).max() <= 3


@pytest.mark.parametrize(
    ("frame", "syntax", "reason"),
    [
        (jpeg((2000, 3000)), uid.JPEGBaseline8Bit, "say 3000 x 2000 pixels in 1 channels, its header 70 x 50"),
        (jpeg((50, 70, 3)), uid.JPEGBaseline8Bit, "70 x 50 pixels in 3 channels"),
        (jpeg((2000, 3000), **JPEG_2000, no_jp2=True), uid.JPEG2000Lossless, "3000 x 2000"),
        (jpeg((2000, 3000), **JPEG_2000, no_jp2=False), uid.JPEG2000, "3000 x 2000"),
        (LARGE_LS, uid.JPEGLSLossless, "60000 x 60000"),
        (jpeg((50, 70))[:30], uid.JPEGBaseline8Bit, "say no size"),
        (b"not a codestream", uid.JPEG2000, "say no size"),
        (bytes(64) + b"\x81\x00" * 4000, uid.RLELossless, "more compressed bytes"),
    ],
)
def test_a_frame_larger_than_the_header_says_is_refused_before_it_is_decoded(monkeypatch, frame, syntax, reason):
    data = compressed(frame, syntax)
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda dataset: pytest.fail("it was decoded")))
    with pytest.raises(RejectedImage, match=reason):
        read_dicom(data, SALT)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.dcm"):
        read_dicom(tmp_path / "absent.dcm", SALT)


def test_nothing_leaves_but_pixels_and_a_pseudonym():
    one, again, other = read_dicom(dicom(), SALT), read_dicom(dicom(), SALT), read_dicom(dicom(), b"pepper")
    assert list(DicomRadiograph.__dataclass_fields__) == ["pixels", "study"]
    assert one.study == again.study != other.study
    assert one.study not in generate_uid(entropy_srcs=["study"])
    assert read_dicom(dicom(StudyInstanceUID=None), SALT).study is None
    assert b"Doe" not in to_pgm(one.pixels)


def test_a_damaged_element_is_a_reason_that_quotes_nothing():
    """pydicom reads an element when it is asked for: this one has a value representation that does not exist."""
    data = dicom()
    place = data.index(b"\x28\x00\x04\x00CS")
    with pytest.raises(RejectedImage, match=r"^damaged: an element of the DICOM file cannot be read$"):
        read_dicom(data[: place + 4] + b"Q!" + data[place + 6 :], b"salt")


def test_threads_do_not_let_each_others_warnings_out(recwarn, caplog):
    """pydicom warns of the value that it cannot make sense of, and what silences it is the whole process's."""
    data = dicom()
    place = data.index(b"\x20\x00\x0d\x00UI")  # StudyInstanceUID
    data = data[: place + 8] + b"Doe^Jane" + data[place + 16 :]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read_dicom(data, b"salt"), range(200)))
    assert not recwarn.list
    assert "Doe" not in caplog.text
