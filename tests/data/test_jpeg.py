"""A JPEG that was cut and closed again with an end marker: decoders show grey where its pixels are missing."""

import io

import numpy as np
import pytest
from PIL import Image

from scaphoid.trainer.data.guard import RejectedImage, check_encoded
from scaphoid.trainer.data.jpeg import declared_size, ends_early
from scaphoid.trainer.data.pipeline import Decoded, Decoder, preprocess_pipeline

GREY = np.add.outer(np.arange(247) // 2, np.arange(181) // 2).astype(np.uint8)
COLOUR = np.dstack([GREY, GREY // 2, 255 - GREY])
HALF_GREY = np.where(np.arange(247)[:, None] > 150, 128, GREY).astype(
    np.uint8
)  # padded with the grey of missing blocks
EXIF = Image.Exif()
EXIF[0x0112] = 6

KINDS = {
    "grey": (Image.fromarray(GREY), {}),
    "optimised": (Image.fromarray(GREY), {"optimize": True}),
    "restarts by row": (Image.fromarray(GREY), {"restart_marker_rows": 2}),
    "restarts by block": (Image.fromarray(GREY), {"restart_marker_blocks": 3}),
    "colour": (Image.fromarray(COLOUR), {}),
    "colour, all sampled alike": (Image.fromarray(COLOUR), {"subsampling": 0}),
    "RGB": (Image.fromarray(COLOUR), {"keep_rgb": True}),
    "CMYK": (Image.fromarray(COLOUR).convert("CMYK"), {}),
    "turned": (Image.fromarray(GREY), {"exif": EXIF}),
    "grey at the bottom": (Image.fromarray(HALF_GREY), {}),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(preprocess_pipeline(64, 4).serialize(), 4)


def encode(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def closed(data: bytes, share: float) -> bytes:
    """The first `share` of the compressed pixels, then an end marker."""
    start = data.index(b"\xff\xda") + 14
    return data[: start + int(share * (len(data) - start))].rstrip(b"\xff") + b"\xff\xd9"


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_closed_is_refused_and_whole_is_read(decoder, kind):
    picture, options = KINDS[kind]
    whole = encode(picture, **options)
    answers = decoder.decode([whole, closed(whole, 0.1), whole + bytes(300), closed(whole, 0.5), closed(whole, 0.9)])
    assert [isinstance(answer, Decoded) for answer in answers] == [True, False, True, False, False]
    assert {answers[index].reason for index in (1, 3, 4)} == {
        "truncated: the JPEG file's pixels end early, though it has an end marker"
    }


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_progressive_files_need_all_their_scans(share):
    whole = encode(Image.fromarray(COLOUR), progressive=True)
    check_encoded(whole)
    with pytest.raises(RejectedImage, match="before its last scan"):
        check_encoded(closed(whole, share))


def test_an_ordinary_picture_is_not_decoded_again(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("it was decoded again"))
    whole = encode(Image.fromarray(GREY))
    assert not ends_early(whole, check_encoded(whole), GREY[None])


def test_declared_sizes():
    assert declared_size(encode(Image.fromarray(COLOUR))) == (181, 247, 3)
    assert declared_size(encode(Image.fromarray(GREY))[:40]) is None
    assert declared_size(b"") is None
