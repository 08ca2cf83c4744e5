"""The one preprocessing pipeline: decoding against Pillow, resizing, odd images, and bad ones beside good ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from scaphoid.trainer.data import pipeline
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.data.pipeline import (
    BATCH,
    Decoded,
    Decoder,
    decode_batch,
    load_images,
    preprocess_pipeline,
    serialize,
)

SIZE = 45
GREY = np.add.outer(np.arange(47) * 3, np.arange(61) * 2).astype(np.uint8)
RGB = np.dstack([GREY, GREY[::-1], 255 - GREY])
OPAQUE = np.full_like(GREY, 255)


def encode(pixels, format: str, **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **options)
    return file.getvalue()


def broken_png() -> bytes:
    """Passes the guard (sound chunks, sound CRCs), but its pixels cannot be inflated: only DALI finds out."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 61, 47, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"garbage") + chunk(b"IEND", b"")


def as_shown(data: bytes) -> np.ndarray:
    """What Pillow makes of it: upright, 8-bit grey."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if upright.mode.startswith("I"):
        return np.rint(np.asarray(upright) / 257)
    return np.asarray(upright.convert("RGB").convert("L")).astype(float)


MODES = {
    "grey": Image.fromarray(GREY),
    "grey 16 bit": Image.fromarray(GREY.astype(np.uint16) * 257),
    "colour": Image.fromarray(RGB),
    "palette": Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE),
    "opaque alpha": Image.fromarray(np.dstack([RGB, OPAQUE])),
    "cmyk": Image.fromarray(RGB).convert("CMYK"),
}
WRITABLE = {"PNG": set(MODES) - {"cmyk"}, "TIFF": set(MODES) - {"opaque alpha"}, "JPEG": {"grey", "colour", "cmyk"}}


@pytest.mark.parametrize(("format", "mode"), [(f, m) for f in WRITABLE for m in sorted(WRITABLE[f])])
def test_every_mode_in_every_orientation_as_pillow_shows_it(format, mode):
    """Asymmetric pictures, at the decoded size, so that nothing but decoding is compared; orientation applied once."""
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        encoded = encode(MODES[mode], format, exif=exif, **options)
        expected = as_shown(encoded)
        images, sizes = decode_batch([encoded], 61)
        assert sizes.tolist() == [list(expected.shape)]
        resized = Image.fromarray(expected.astype(np.uint8)).resize((61, 61), Image.Resampling.BILINEAR)
        # JPEG: DALI keeps the luma channel, Pillow goes through RGB
        assert np.abs(images[0, 0].astype(int) - np.asarray(resized)).max() <= (4 if format == "JPEG" else 2)


def flat(shape: tuple[int, ...], level: object) -> np.ndarray:
    """One level but for a white quarter at the bottom right: a picture of one level alone is blank."""
    pixels = np.full(shape, level, np.uint8)
    pixels[shape[0] // 2 :, shape[1] // 2 :] = 255
    return pixels


def test_luma_is_bt601():
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (13, 200, 77)):
        images, _ = decode_batch([encode(flat((40, 50, 3), colour), "PNG")], SIZE)
        upper = images[0, 0, : SIZE // 2 - 2].astype(int)
        assert np.abs(upper - round(np.dot(colour, (0.299, 0.587, 0.114)))).max() <= 1


def triangle_filter(length: int, size: int) -> np.ndarray:
    """[size, length]: antialiased linear interpolation with half-pixel centres, the border repeated outwards."""
    scale = length / size
    reach = max(scale, 1.0)
    matrix = np.zeros((size, length))
    for row in range(size):
        centre = (row + 0.5) * scale - 0.5
        taps = np.arange(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1)
        weights = np.maximum(0, 1 - np.abs(taps - centre) / reach)
        np.add.at(matrix[row], taps.clip(0, length - 1), weights / weights.sum())
    return matrix


@pytest.mark.parametrize("shape", [(200, 333), (47, 61), (33, 500), (40, 36)])
def test_resize_is_antialiased_bilinear_without_the_aspect_ratio(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images, sizes = decode_batch([encode(pixels, "PNG")], SIZE)
    expected = triangle_filter(shape[0], SIZE) @ pixels @ triangle_filter(shape[1], SIZE).T
    assert images.shape == (1, 1, SIZE, SIZE)
    assert images.dtype == np.uint8
    assert sizes.dtype == np.int32
    assert sizes.tolist() == [list(shape)]
    assert np.abs(images[0, 0] - expected).max() < 0.52  # rounded to nearest


def test_ragged_batches_of_any_number():
    shapes = [(40 + index, 90 - index) for index in range(BATCH + 3)]
    encoded = [encode(flat(shape, index), "PNG") for index, shape in enumerate(shapes)]
    images, sizes = decode_batch(encoded, SIZE)
    assert sizes.tolist() == [list(shape) for shape in shapes]
    assert images.reshape(len(shapes), -1).min(1).tolist() == list(range(len(shapes)))
    assert decode_batch([], SIZE)[0].shape == (0, 1, SIZE, SIZE)


def test_bad_images_leave_their_neighbours_alone():
    good, broken, blank = encode(GREY, "PNG"), broken_png(), encode(np.zeros_like(GREY), "BMP")
    unscaled = encode(GREY.astype(np.uint16) * 16, "PNG")
    decoder = Decoder(preprocess_pipeline(SIZE, 4).serialize(), 4)
    reference = decoder.decode([good])[0]
    for _ in range(3):
        answers = decoder.decode([good, b"", broken, good, unscaled, blank, good, good[:-5]])
        for index, reason in (
            (1, "empty"),
            (2, "pixels cannot be decoded"),
            (4, "12-bit"),
            (5, "blank radiograph"),
            (7, "trunc"),
        ):
            assert isinstance(answers[index], RejectedImage)
            assert reason in answers[index].reason
        for index in (0, 3, 6):
            assert isinstance(answers[index], Decoded)
            np.testing.assert_array_equal(answers[index].image, reference.image)
            assert answers[index].original_size.tolist() == [47, 61]


def test_what_the_guard_itself_trips_over_fails_alone(monkeypatch):
    def trip(data):
        raise ZeroDivisionError(bytes(data))

    monkeypatch.setattr(pipeline, "check_encoded", trip)
    assert pipeline._check(b"Doe^Jane").reason == "cannot be read (ZeroDivisionError)"


def test_answers_outlive_the_next_run():
    decoder = Decoder(preprocess_pipeline(SIZE, 2).serialize(), 2)
    first = decoder.decode([encode(flat((50, 50), 10), "PNG")])[0]
    decoder.decode([encode(flat((50, 50), 200), "PNG")])
    assert first.image[0, 0, 0] == 10


def test_load_images_keeps_the_order_and_names_the_bad_file(tmp_path):
    paths = []
    for index in range(5):
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(encode(flat((50 + index, 50), 40 * index), "PNG"))
    images, sizes = load_images(paths, SIZE, progress=False)
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    assert sizes[:, 0].tolist() == [50, 51, 52, 53, 54]
    paths[3].write_bytes(b"")
    with pytest.raises(RejectedImage, match=r"3\.png: empty"):
        load_images(paths, SIZE, progress=False)
    paths[3].unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png"):
        load_images(paths, SIZE, progress=False)


def test_the_serialised_file_computes_the_same(tmp_path):
    serialize(tmp_path / "model.dali", SIZE, 3)
    encoded = [encode(GREY, "PNG"), encode(RGB, "JPEG"), encode(GREY.T, "BMP"), encode(GREY, "PPM")]
    answers = Decoder((tmp_path / "model.dali").read_bytes(), 3).decode(encoded)
    images, sizes = decode_batch(encoded, SIZE)
    np.testing.assert_array_equal(np.stack([answer.image for answer in answers]), images)
    np.testing.assert_array_equal(np.stack([answer.original_size for answer in answers]), sizes)


def test_unknown_device_is_named():
    with pytest.raises(ValueError, match="'cpu' or 'mixed', got 'gpu'"):
        preprocess_pipeline(SIZE, 4, device="gpu")
