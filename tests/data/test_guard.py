"""What the guard rejects, with which reason, and that it never asks a decoder."""

import io
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scaphoid.trainer.data import guard
from scaphoid.trainer.data.guard import MAX_PIXELS, RejectedImage, check_decoded, check_encoded

GREY = np.add.outer(np.arange(47) * 3, np.arange(61) * 2).astype(np.uint8)


def encode(pixels, format: str, **options) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, compressed: bytes, colour: int = 0) -> bytes:
    """A PNG whose chunks are sound, whatever its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", compressed) + png_chunk(b"IEND", b"")


RGBA = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])
GOOD_JPEG = encode(GREY, "JPEG")
GOOD = {
    "png": encode(GREY, "PNG"),
    "png interlaced": encode(GREY, "PNG", interlace=1),
    "png 16 bit": encode(GREY.astype(np.uint16) * 257, "PNG"),
    "png palette": encode(Image.fromarray(GREY).convert("P"), "PNG"),
    "png opaque alpha": encode(RGBA, "PNG"),
    "jpeg": GOOD_JPEG,
    "jpeg progressive": encode(GREY, "JPEG", progressive=True),
    "jpeg cmyk": encode(Image.fromarray(RGBA[..., :3]).convert("CMYK"), "JPEG"),
    "jpeg trailing bytes": GOOD_JPEG + bytes(100),
    "jpeg with fill bytes": GOOD_JPEG[:2] + b"\xff" * 1000 + GOOD_JPEG[2:-2] + b"\xff" * 1000 + GOOD_JPEG[-2:],
    "bmp": encode(GREY, "BMP"),
    "tiff": encode(GREY, "TIFF"),
    "tiff lzw": encode(GREY, "TIFF", compression="tiff_lzw"),
    "tiff 16 bit": encode(GREY.astype(np.uint16) * 257, "TIFF"),
    "pgm": encode(GREY, "PPM"),
    "pgm 16 bit": b"P5\n# a comment\n61 47\n65535\n" + (GREY.astype(">u2") * 257).tobytes(),
}


@pytest.mark.parametrize("name", GOOD)
def test_sound_image_passes(name):
    header = check_encoded(memoryview(GOOD[name]))
    assert (header.width, header.height) == (61, 47)
    assert header.format == name.split()[0].upper()
    assert header.bits == (16 if "16 bit" in name else 8)


def frames(format: str) -> bytes:
    return encode(GREY, format, save_all=True, append_images=[Image.fromarray(255 - GREY)])


def transparent(at: tuple[int, int]) -> bytes:
    pixels = RGBA.copy()
    pixels[at][3] = 254
    return encode(pixels, "PNG")


BAD = {
    "empty": (b"", "empty"),
    "zero bytes": (bytes(1000), "zero bytes"),
    "text": (b"a radiograph, honestly", "not an image"),
    "gif": (encode(GREY, "GIF"), "not an image"),
    "dicom": (bytes(128) + b"DICM" + bytes(100), "DICOM"),
    "png signature alone": (GOOD["png"][:8], "truncated"),
    "png without end": (GOOD["png"][:-12], "truncated"),
    "png cut": (GOOD["png"][:-40], "truncated"),
    "png bit flipped": (GOOD["png"][:60] + bytes([GOOD["png"][60] ^ 1]) + GOOD["png"][61:], "CRC"),
    "png without pixels": (GOOD["png"][:33] + png_chunk(b"IEND", b""), "no pixels"),
    "png that inflates without end": (png(61, 47, zlib.compress(bytes(80_000_000))), "more compressed bytes"),
    "png animated": (frames("PNG"), "animated"),
    "png transparent at its first pixel": (transparent((0, 0)), "transparent"),
    "png transparent at its last pixel": (transparent((46, 60)), "transparent"),
    "png transparent colour": (encode(GREY, "PNG", transparency=7), "transparent"),
    "png alpha rows missing": (png(61, 47, zlib.compress(bytes(20)), colour=6), "fewer rows"),
    "png alpha not zlib": (png(61, 47, b"garbage", colour=6), "inflated"),
    "png bomb": (png(60_000, 60_000, zlib.compress(bytes(1000))), "too large"),
    "one pixel": (encode(GREY[:1, :1], "PNG"), "too small"),
    "1 x 4000": (encode(np.zeros((4000, 1), np.uint8), "PNG"), "too small: 1 x 4000"),
    "jpeg signature alone": (b"\xff\xd8", "truncated"),
    "jpeg cut": (GOOD["jpeg"][:-20], "no end marker"),
    "jpeg cut in header": (GOOD["jpeg"][:100], "truncated"),
    "jpeg of many scans": (
        GOOD["jpeg"][:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 200 + b"\xff\xd9",
        "more than 100 scans",
    ),
    "jpeg of an end marker": (b"\xff\xd8\xff\xd9" + bytes(50), "ends before its pixels"),
    "jpeg of fill bytes": (b"\xff\xd8" + b"\xff" * 200_000 + GOOD["jpeg"][2:], "64 KiB of fill bytes"),
    "jpeg without frame": (b"\xff\xd8\xff\xda\0\x08\1\1\0\0\x3f\0", "no frame header"),
    "jpeg progressive, closed early": (
        GOOD["jpeg progressive"][: GOOD["jpeg progressive"].rindex(b"\xff\xda")] + b"\xff\xd9",
        "before its last scan",
    ),
    "bmp cut": (GOOD["bmp"][:-1], "truncated"),
    "bmp signature alone": (b"BM", "truncated"),
    "tiff cut": (GOOD["tiff 16 bit"][: len(GOOD["tiff 16 bit"]) // 2], "truncated"),
    "tiff pages": (frames("TIFF"), "several pages"),
    "tiff float": (encode(GREY.astype(np.float32), "TIFF"), "float"),
    "tiff bilevel": (encode(GREY > 99, "TIFF"), "bits"),
    "pgm cut": (GOOD["pgm"][:-1], "truncated"),
    "pgm header alone": (b"P5\n61 47", "truncated"),
    "pgm of comments": (b"P5\n" + b"#\n" * 5_000_000, "65,536 bytes of comments"),
    "pgm of blanks and a cut number": (b"P5" + b" " * (2**16 - 4) + b"61 47\n255\n" + bytes(61 * 47), "of comments"),
    "pgm of 12 bits": (b"P5\n61 47\n4095\n" + bytes(61 * 47 * 2), "4095"),
    "pgm negative": (b"P5\n-61 47\n255\n", "PGM header"),
    "pgm bomb": (b"P5\n99999 99999\n255\n", "too large"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_rejected_in_one_line(name):
    data, reason = BAD[name]
    with pytest.raises(RejectedImage, match=reason) as caught:
        check_encoded(data)
    assert "\n" not in caught.value.reason
    assert caught.value.reason == str(caught.value)


def tiff(*tags: tuple[int, int, int, int], body: bytes = b"") -> bytes:
    """Of tag, type, count, and value or offset."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + body


def stored_rgba(width: int, height: int, bits: int, piece: int = 2**30) -> bytes:
    """A PNG that is opaque but for its last pixel, its pixels stored rather than compressed, in chunks of `piece`."""
    pixel = bits // 2
    lines = np.zeros((height, 1 + width * pixel), np.uint8)
    for byte in range(1 + pixel - bits // 8, 1 + pixel):
        lines[:, byte::pixel] = 255
    lines[-1, -1] = 254
    header = struct.pack(">IIBBBBB", width, height, bits, 6, 0, 0, 0)
    stream = zlib.compress(lines, 0)
    pixels = b"".join(png_chunk(b"IDAT", stream[start : start + piece]) for start in range(0, len(stream), piece))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


HOSTILE = {
    "pgm of comments": lambda: b"P5\n" + b"#\n" * 1_000_000,
    "jpeg of empty segments": lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 400_000,
    "jpeg of stuffing": lambda: b"\xff\xd8" + b"\xff\0" * 5_000_000,
    "tiff whose entries all have the whole file": lambda: tiff(*[(1000, 1, 900_000, 8)] * 30_000, body=bytes(900_000)),
    "tiff that says one thing often": lambda: tiff(*[(273, 1, 900_000, 8)] * 30_000, body=bytes(900_000)),
    "png of 20 million stored RGBA pixels": lambda: stored_rgba(5000, 4000, 8),
    "png of 10 million stored RGBA pixels of 16 bits": lambda: stored_rgba(5000, 2000, 16),
    "png of stored RGBA pixels in small chunks": lambda: stored_rgba(32, 5000, 8, piece=100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_reading_a_hostile_file_takes_no_more_than_its_bytes_allow(name):
    """Each took minutes, or gigabytes: the interpreter's steps are counted here, and the bytes, not the time."""
    steps, data = 0, HOSTILE[name]()

    def count(frame, event, argument):
        nonlocal steps
        steps += event == "line"
        return count

    tracemalloc.start()
    sys.settrace(count)
    try:
        with pytest.raises(RejectedImage):
            check_encoded(data)
    finally:
        sys.settrace(None)
    assert tracemalloc.get_traced_memory()[1] < 32_000_000
    tracemalloc.stop()
    assert steps < 1_000_000


def test_a_file_is_not_copied_for_each_megabyte_of_it(monkeypatch):
    """What zlib leaves of its input, it copies: twice the pixels would take four times as long."""
    fed, decompressobj = [], zlib.decompressobj

    class Counting:
        def __init__(self):
            self.inner = decompressobj()

        def decompress(self, data, size):
            fed.append(len(data))
            return self.inner.decompress(data, size)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    data = stored_rgba(1000, 3000, 8)
    with pytest.raises(RejectedImage, match="transparent"):
        check_encoded(data)
    assert len(data) <= sum(fed) + 100 < 1.2 * len(data)


def test_opaque_pixels_in_chunks_of_any_length():
    chunks = [png_chunk(b"IDAT", b"")] * 3
    for piece in (1, 7, 65536, 2**30):
        data = bytearray(stored_rgba(61, 47, 16, piece=piece))
        with pytest.raises(RejectedImage, match="transparent"):
            check_encoded(data)
        lines = np.full((47, 1 + 61 * 8), 255, np.uint8)
        lines[:, 0] = 0
        stream = zlib.compress(lines, 0)
        for start in range(0, len(stream), piece):
            chunks += [png_chunk(b"IDAT", stream[start : start + piece]), png_chunk(b"IDAT", b"")]
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 61, 47, 16, 6, 0, 0, 0))
        body = b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")
        assert check_encoded(body).bits == 16
        chunks = []


@pytest.mark.parametrize(("length", "reason"), [(256, None), (0, "transparent"), (257, "at most 256")])
def test_transparencies_of_a_palette(length, reason):
    palette = GOOD["png palette"]
    at = palette.index(b"IDAT") - 4
    data = palette[:at] + png_chunk(b"tRNS", b"\xff" * length) + palette[at:]
    if reason is None:
        check_encoded(data)
    else:
        with pytest.raises(RejectedImage, match=reason):
            check_encoded(data)


COLOUR = RGBA[..., :3]
TIFFS = {
    "strips lzw": (GREY, {"strip_size": 610, "compression": "tiff_lzw"}),
    "strips deflate": (GREY, {"strip_size": 610, "compression": "tiff_adobe_deflate"}),
    "strips lzw 16 bit": (GREY.astype(np.uint16) * 257, {"strip_size": 610, "compression": "tiff_lzw"}),
    "packbits": (GREY, {"compression": "packbits"}),
    "palette": (Image.fromarray(GREY).convert("P"), {}),
    "colour": (COLOUR, {}),
    "colour lzw": (COLOUR, {"compression": "tiff_lzw", "strip_size": 610}),
    "jpeg": (COLOUR, {"compression": "jpeg"}),
    "cmyk": (Image.fromarray(COLOUR).convert("CMYK"), {}),
    "ycbcr": (Image.fromarray(COLOUR).convert("YCbCr"), {}),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiffs_that_pillow_writes_pass(monkeypatch, name):
    pixels, options = TIFFS[name]
    options = dict(options)
    if "strip_size" in options:
        monkeypatch.setattr("PIL.TiffImagePlugin.STRIP_SIZE", options.pop("strip_size"))
    data = encode(pixels, "TIFF", **options)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        strips = len(image.tag_v2[273])
    assert (strips > 1) == ("strip_size" in TIFFS[name][1])
    assert check_encoded(data).width == 61


TIFFFILE = {
    "strips": (GREY, {"rowsperstrip": 10}),
    "strips deflate": (GREY, {"rowsperstrip": 10, "compression": "zlib"}),
    "tiles": (GREY, {"tile": (16, 32)}),
    "tiles deflate": (GREY, {"tile": (16, 32), "compression": "zlib"}),
    "planar": (COLOUR.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate", "rowsperstrip": 10}),
    "planar deflate": (
        COLOUR.transpose(2, 0, 1),
        {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"},
    ),
    "planar tiles": (COLOUR.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate", "tile": (16, 16)}),
    "big-endian 16 bit": (GREY.astype(">u2") * 257, {"rowsperstrip": 7, "byteorder": ">"}),
}


@pytest.mark.parametrize("name", TIFFFILE)
def test_tiffs_that_tifffile_writes_pass(name):
    tifffile = pytest.importorskip("tifffile")
    pixels, options = TIFFFILE[name]
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    assert check_encoded(file.getvalue()).height == 47


def plain_tiff(**changes: int) -> bytes:
    """61 x 47 grey pixels in a strip, but for what `changes` say; a tag of 0 is left out."""
    tags = {256: 61, 257: 47, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 47, 279: 61 * 47}
    tags |= {int(tag[1:]): value for tag, value in changes.items()}
    return tiff(*((tag, 4, 1, value) for tag, value in sorted(tags.items()) if value), body=bytes(10_000))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"t278": 24}, "1 strips or tiles, its size 2"),
        ({"t257": 200, "t278": 100, "t279": 6100}, "1 strips or tiles, its size 2"),
        ({"t278": 0}, None),  # left out: one strip
        ({"t278": 2**32 - 1}, None),
        ({"t279": 61 * 47 - 1}, "fewer pixels"),
        ({"t279": 61 * 47 + 5}, None),
        ({"t259": 5, "t279": 1}, None),  # compressed: what it holds, only a decoder can tell
        ({"t258": 16}, "fewer pixels"),
        ({"t277": 3, "t262": 2}, "fewer pixels"),
        ({"t277": 3, "t262": 2, "t284": 2}, "1 strips or tiles, its size 3"),
        ({"t277": 3, "t262": 6}, "YCbCr"),
        ({"t322": 64}, "strips from tiles"),
        ({"t273": 0, "t279": 0, "t278": 0, "t324": 8, "t325": 4096, "t322": 64, "t323": 64}, None),
        ({"t273": 0, "t279": 0, "t278": 0, "t324": 8, "t325": 4095, "t322": 64, "t323": 64}, "fewer pixels"),
        ({"t273": 0, "t279": 0, "t324": 8, "t325": 4096, "t322": 32, "t323": 64}, "1 strips or tiles, its size 2"),
        ({"t273": 0, "t279": 0, "t324": 8, "t325": 4096, "t322": 2**31, "t323": 2**31, "t259": 5}, "pixels in the"),
    ],
)
def test_strips_and_tiles_of_a_tiff_must_make_its_picture(changes, reason):
    data = plain_tiff(**changes)
    if reason is None:
        check_encoded(data)
    else:
        with pytest.raises(RejectedImage, match=reason):
            check_encoded(data)


@pytest.mark.parametrize("tag", [278, 322, 323])
def test_a_tiff_with_strips_or_tiles_of_no_length_is_refused(tag):
    tags = {256: 61, 257: 47, 258: 8, 262: 1} | (
        {273: 8, 278: 47, 279: 2867} if tag == 278 else {322: 64, 323: 64, 324: 8, 325: 4096}
    )
    tags[tag] = 0
    with pytest.raises(RejectedImage, match="strips or tiles of"):
        check_encoded(tiff(*((tag, 4, 1, value) for tag, value in sorted(tags.items())), body=bytes(10_000)))


def test_a_png_has_no_endless_chunks(monkeypatch):
    chunks = GOOD["png"][:33] + png_chunk(b"tEXt", b"") * 97 + GOOD["png"][33:]  # header, pixels, end
    monkeypatch.setattr(guard, "_PNG_CHUNKS", 100)
    check_encoded(chunks)
    monkeypatch.setattr(guard, "_PNG_CHUNKS", 99)
    with pytest.raises(RejectedImage, match="a PNG of more than 99 chunks"):
        check_encoded(chunks)


def test_the_pixel_cap_is_exact():
    height = MAX_PIXELS // 5000
    assert check_encoded(png(5000, height, zlib.compress(b""))).height == height
    with pytest.raises(RejectedImage, match="too large"):
        check_encoded(png(5000, height + 1, zlib.compress(b"")))


def test_a_bomb_is_rejected_without_inflating_it():
    bomb = png(20_000, 20_000, zlib.compress(bytes(50_000_000)), colour=6)
    tracemalloc.start()
    with pytest.raises(RejectedImage, match="too large"):
        check_encoded(bomb)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("level", range(0, 10, 3))
def test_opacity_is_seen_through_every_png_filter(level):
    """Encoders choose filters by content: noise, ramps and flats bring out different ones, over several blocks."""
    noise = np.random.default_rng(level).integers(0, 256, (1031, 401, 4), np.uint8)
    noise[300:600, :, :3] = (np.arange(401)[:, None] % 256).astype(np.uint8)
    noise[600:800, :, :3] = 7
    noise[..., 3] = 255
    assert check_encoded(encode(noise, "PNG", compress_level=level)).channels == 4
    noise[1030, 400, 3] = 0
    with pytest.raises(RejectedImage, match="transparent"):
        check_encoded(encode(noise, "PNG", compress_level=level))


def judge(data: bytes, picture: list[int]) -> None:
    check_decoded(data, check_encoded(data), np.array([[picture]], np.uint8))


def test_unscaled_12_bit_data_is_rejected():
    judge(GOOD["png 16 bit"], [0, 64])
    judge(GOOD["png"], [0, 15])  # 8 bits may be dark
    with pytest.raises(RejectedImage, match="unscaled 12-bit"):
        judge(GOOD["png 16 bit"], [0, 15])


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("name", ["png", "png 16 bit", "jpeg", "tiff", "bmp", "pgm"])
def test_a_blank_picture_is_rejected(name, level):
    with pytest.raises(RejectedImage, match=r"^every pixel has the same value: blank radiograph$"):
        judge(GOOD[name], [level, level])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damage_passes_or_is_rejected_but_never_raises_anything_else(name, data):
    damaged = bytearray(GOOD[name][: data.draw(st.integers(0, len(GOOD[name])))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_encoded(bytes(damaged))
    except RejectedImage as rejected:
        assert "\n" not in rejected.reason  # noqa: PT017


def test_a_file_beyond_the_byte_cap_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BYTES", len(GOOD["png"]) - 1)
    with pytest.raises(RejectedImage, match=r"more than the limit of"):
        check_encoded(GOOD["png"])
    monkeypatch.setattr(guard, "MAX_BYTES", len(GOOD["png"]))
    check_encoded(GOOD["png"])


def test_no_message_quotes_a_files_numbers_at_length():
    """A TIFF that gives each of its many channels another depth."""
    depths = struct.pack("<300H", *range(300))
    tags = [(256, 4, 1, 61), (257, 4, 1, 47), (258, 3, 300, 8 + 2 + 12 * 4 + 4), (262, 3, 1, 1)]
    directory = struct.pack("<H", 4) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    with pytest.raises(RejectedImage, match="300 different depths") as caught:
        check_encoded(b"II*\0" + struct.pack("<I", 8) + directory + depths)
    assert len(str(caught.value)) < 150
