"""Decoding without DALI against DALI: every kind of file, every orientation, sizes that shrink and grow."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nvidia.dali")

from scaphoid.export.edge.decode import decode, resize
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.data.pipeline import decode_batch

SIZE = 45
BAR = 2e-4  # share of an image's pixels that may be off by one level
FRACATLAS = Path(__file__).resolve().parents[4] / "shared" / "data" / "fracatlas" / "images"
GREY = np.add.outer(np.arange(47) * 3, np.arange(61) * 2).astype(np.uint8)
RGB = np.dstack([GREY, GREY[::-1], 255 - GREY])
MODES = {
    "grey": Image.fromarray(GREY),
    "grey 16 bit": Image.fromarray(GREY.astype(np.uint16) * 257 + 60),
    "colour": Image.fromarray(RGB),
    "palette": Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE),
    "opaque alpha": Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)])),
    "cmyk": Image.fromarray(RGB).convert("CMYK"),
}
WRITABLE = {
    "PNG": {*MODES} - {"cmyk"},
    "TIFF": {*MODES} - {"opaque alpha"},
    "JPEG": {"grey", "colour", "cmyk"},
    "BMP": {"grey", "colour"},
    "PPM": {"grey", "grey 16 bit"},
}


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(("format", "mode"), [(f, m) for f in WRITABLE for m in sorted(WRITABLE[f])])
def test_every_mode_in_every_orientation_as_dali_decodes_it(format, mode):
    options = {"quality": 90} if format == "JPEG" else {}
    turned = range(1, 9) if format in ("PNG", "TIFF", "JPEG") else (1,)
    files = []
    for orientation in turned:
        exif = Image.Exif()
        exif[0x112] = orientation
        files.append(encode(MODES[mode], format, **options, **({"exif": exif} if len(turned) > 1 else {})))
    images, sizes = decode_batch(files, 61)
    for encoded, expected, size in zip(files, images, sizes, strict=True):
        image, shape = decode(encoded, 61)
        assert list(shape) == size.tolist()
        assert image.shape == expected.shape == (1, 61, 61)
        # grey arrives to the bit; colour is mixed to grey in other arithmetic, and once more in CMYK
        bar = {"grey": 0, "grey 16 bit": 0, "cmyk": 4}.get(mode, 0 if format == "JPEG" else 1)
        assert np.abs(image.astype(int) - expected).max() <= bar


@pytest.mark.parametrize("shape", [(512, 512), (819, 1024), (1024, 819), (200, 333), (47, 61), (33, 500), (40, 36)])
@pytest.mark.parametrize("size", [448, 160])
def test_resize_as_dali_does_it(shape, size):
    """Noise: its pixels lie anywhere between two levels, so rounding differs wherever the sums do."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images, _ = decode_batch([encode(Image.fromarray(pixels), "PNG")], size)
    difference = np.abs(resize(pixels, size).astype(int) - images[0, 0])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= BAR


@pytest.mark.slow
@pytest.mark.skipif(not FRACATLAS.is_dir(), reason="no FracAtlas beside the repository")
def test_radiographs_as_dali_decodes_them():
    files = [path.read_bytes() for path in sorted(FRACATLAS.glob("*.jpg"))[:32]]
    images, sizes = decode_batch(files, 448)
    for encoded, expected, size in zip(files, images, sizes, strict=True):
        image, shape = decode(encoded, 448)
        difference = np.abs(image.astype(int) - expected)
        assert list(shape) == size.tolist()
        assert difference.max() <= 1
        assert (difference > 0).mean() <= BAR


def test_what_cannot_be_decoded_is_rejected_with_a_reason(radiograph):
    good = radiograph(1)
    for bad, reason in (
        (b"", "empty"),
        (good[:-20], "truncated"),
        (encode(Image.new("L", (50, 50), 7), "PNG"), "blank"),
        (encode(Image.fromarray(GREY.astype(np.uint16) * 16), "PNG"), "12-bit"),
    ):
        with pytest.raises(RejectedImage, match=reason):
            decode(bad, SIZE)
