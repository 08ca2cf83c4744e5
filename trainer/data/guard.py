"""Looks at the bytes of an image before a decoder does, and at the picture after, and rejects what would not end well.

One bad image fails a whole DALI batch, a decompression bomb takes the memory of everybody, and a decoder that
tolerates a truncated file invents the missing part of a bone. So every image passes `check_encoded` first: in
training, in the client, and in the server before they are decoded. It reads headers, end markers and checksums, never
a compressed pixel (alpha excepted), so a 5 megapixel PNG takes a millisecond or two. What only the picture tells,
`check_decoded` finds wherever images are decoded here: in training and in the CPU's server, whose refusal the client
passes on. `check_encoded` runs in the vendor's image too (triton_repo/gpu/guard), where numpy is and Pillow is not.

Rejected, with one line that says why:

- nothing there, not a PNG, JPEG, BMP, TIFF or PGM file, a DICOM file (the client makes PGM of those);
- truncated or damaged: no JPEG end marker, or one that stands before the last pixels; a PNG chunk missing or failing
  its CRC; pixels missing in a PGM, BMP or TIFF;
- blank: every pixel has the same value;
- more than `MAX_BYTES`, more than `MAX_PIXELS` (nothing is inflated to find out), or a side under `MIN_SIDE`: no bone
  is shown in so few pixels;
- more than one picture (animated PNG, multi-page TIFF): which of them is the radiograph is not ours to guess;
- transparency in use: what lies under it depends on a background that the file does not define;
- kinds that decoders read differently: 12-bit, lossless and arithmetic JPEG, float, 1-bit and big TIFF, TIFF of
  uncompressed, subsampled YCbCr, compressed BMP, PGM whose white is neither 255 nor 65535.

Decoded, and defined: colour becomes ITU-R BT.601 luma, also from a palette or CMYK (JPEG, TIFF); an alpha channel
that is opaque everywhere is dropped; 16 bits become 8 by `round(value / 257)`, white being 65535, as the formats
define it. `check_decoded` then rejects a picture whose 16 bits use the lowest quarter alone: that is 12- or 14-bit
data stored unscaled, it would be shown nearly black, and an answer about it would look like any other.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from scaphoid.trainer.data.header import MAX_BYTES, MAX_PIXELS, MIN_SIDE, ImageHeader, RejectedImage, check_size
from scaphoid.trainer.data.jpeg import ends_early, read_jpeg

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "MIN_SIDE",
    "ImageHeader",
    "RejectedImage",
    "check_blank",
    "check_decoded",
    "check_encoded",
    "check_size",
]


def check_encoded(data: bytes | memoryview) -> ImageHeader:
    """The header of one encoded image that is fit to be decoded. Raises RejectedImage."""
    if len(data) > MAX_BYTES:
        raise RejectedImage(f"{len(data) >> 20} MiB, more than the limit of {MAX_BYTES >> 20} MiB")
    data = memoryview(data)  # not copied: that would cost as much as reading it
    if not data:
        raise RejectedImage("empty: 0 bytes")
    for signature, name, read in _FORMATS:
        if data[: len(signature)] == signature:
            try:
                return read(data)
            except (struct.error, IndexError):
                raise RejectedImage(f"truncated: the {name} file ends inside its header ({len(data)} bytes)") from None
    if not np.frombuffer(data, np.uint8).any():
        raise RejectedImage(f"not an image: {len(data)} zero bytes")
    if data[128:132] == b"DICM":
        raise RejectedImage("a DICOM file: convert it first (scaphoid-predict does), the server takes no DICOM")
    raise RejectedImage("not an image: expected a PNG, JPEG, BMP, TIFF or binary PGM file")


def check_decoded(data: bytes | memoryview, header: ImageHeader, image: np.ndarray) -> None:
    """What shows only once the encoded `data` were decoded to `image` (uint8 [..., H, W], in any size). Raises
    RejectedImage."""
    if header.format == "JPEG" and ends_early(bytes(data), header, image):
        raise RejectedImage("truncated: the JPEG file's pixels end early, though it has an end marker")
    check_blank(image)
    if header.bits == 16 and (brightest := int(image.max())) < 64:
        raise RejectedImage(
            f"16-bit samples that reach only {brightest / 255:.1%} of white, as unscaled 12-bit data do: "
            "window them to 8 bits, or send the DICOM file through scaphoid-predict"
        )


def check_blank(image: np.ndarray) -> None:
    """Raises RejectedImage for a picture without content. For DICOM pixels too."""
    if image.min() == image.max():
        raise RejectedImage("every pixel has the same value: blank radiograph")


def _png_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of every chunk up to IEND, each held against its CRC."""
    position, kind, count = 8, b"", 0
    while kind != b"IEND":
        if (count := count + 1) > _PNG_CHUNKS:
            raise RejectedImage(f"a PNG of more than {_PNG_CHUNKS:,} chunks: save it anew")
        if position + 12 > len(data):
            raise RejectedImage("truncated: the PNG file ends before its IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise RejectedImage("truncated: the PNG file ends inside a chunk")
        if zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise RejectedImage("damaged: a PNG chunk does not match its CRC")
        yield kind, data[position + 8 : end]
        position = end + 4


def _png(data: memoryview) -> ImageHeader:
    chunks = _png_chunks(data)
    kind, body = next(chunks)
    if kind != b"IHDR" or len(body) != 13:
        raise RejectedImage("damaged: the PNG file does not begin with its header")
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
    if colour not in _PNG_CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise RejectedImage(f"damaged: PNG colour type {colour} with {bits} bits does not exist")
    check_size(width, height)
    header = ImageHeader("PNG", width, height, _PNG_CHANNELS[colour], bits)

    pixels = []
    for kind, body in chunks:
        if kind == b"acTL":
            raise RejectedImage("an animated PNG: save the one frame that is the radiograph")
        if kind == b"tRNS" and len(body) > 256:
            raise RejectedImage("damaged: a PNG palette has at most 256 transparencies")
        if kind == b"tRNS" and not (colour == 3 and body and body == b"\xff" * len(body)):
            raise RejectedImage("a PNG with a transparent colour: save it without transparency")
        if kind == b"IDAT":
            pixels.append(body)
    if not pixels:
        raise RejectedImage("damaged: the PNG file has no pixels")
    declared = height * (1 + (width * header.channels * bits + 7) // 8)
    if sum(map(len, pixels)) > 1.125 * declared + 4096:  # decoders inflate all of it, also what is beyond the last row
        raise RejectedImage("damaged: the PNG file holds more compressed bytes than its pixels need")
    if colour in (4, 6) and (interlaced or not _png_is_opaque(header, pixels)):
        raise RejectedImage("a PNG with transparent (or interlaced) alpha: save it without an alpha channel")
    return header


_PNG_CHUNKS = 2**18  # each takes a microsecond; encoders cut 50 million pixels into 40,000 at most
_PNG_PIECE = 2**16  # compressed bytes at a time: zlib copies what it leaves of them
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type: grey, RGB, palette, grey + alpha, RGBA


def _opaque_residuals() -> np.ndarray:
    """[filter, first row, first column]: what a PNG filter leaves of an alpha byte of 255 whose neighbours are 255."""
    table = np.zeros((5, 2, 2), np.uint8)
    for first_row in (0, 1):
        for first_column in (0, 1):
            left, above = 255 * (1 - first_column), 255 * (1 - first_row)
            paeth = max(left, above)  # the corner is 0 or both are 255
            for kind, predicted in enumerate((0, left, above, (left + above) // 2, paeth)):
                table[kind, first_row, first_column] = 255 - predicted
    return table


def _png_inflated(bodies: list[memoryview], sizes: Iterable[int]) -> Iterator[bytearray]:
    """The pixels' bytes in blocks of these sizes, and nothing beyond them. Takes time in proportion to both."""
    pieces = (body[start : start + _PNG_PIECE] for body in bodies for start in range(0, len(body), _PNG_PIECE))
    inflate, rest = zlib.decompressobj(), b""
    for size in sizes:
        block = bytearray()
        while len(block) < size:
            piece = rest or next(pieces, b"")
            inflated = inflate.decompress(piece, size - len(block))
            if not inflated and (inflate.eof or not piece):
                raise RejectedImage("truncated: the PNG file holds fewer rows than its header declares")
            block += inflated
            rest = inflate.unconsumed_tail
        yield block


def _png_is_opaque(header: ImageHeader, bodies: list[memoryview]) -> bool:
    """True if every alpha sample is 255 (65535). Filters need not be undone: as long as alpha was opaque so far, each
    filter leaves one known byte. Inflates about a megabyte at a time, and no more than the header declares."""
    sample = header.bits // 8
    pixel = header.channels * sample
    stride = 1 + header.width * pixel
    rows_at_once = max(1, 2**20 // stride)
    sizes = (min(rows_at_once, header.height - row) * stride for row in range(0, header.height, rows_at_once))
    table, first_row = _opaque_residuals(), 1
    try:
        for block in _png_inflated(bodies, sizes):
            lines = np.frombuffer(block, np.uint8).reshape(-1, stride)
            filters, first = lines[:, 0], np.zeros(len(lines), int)
            first[0], first_row = first_row, 0
            if filters.max() > 4:
                raise RejectedImage("damaged: the PNG file uses a filter that does not exist")
            for byte in range(1 + pixel - sample, 1 + pixel):
                alpha = lines[:, byte::pixel]
                if (alpha[:, 0] != table[filters, first, 1]).any():
                    return False
                if (alpha[:, 1:] != table[filters, first, 0][:, None]).any():
                    return False
    except zlib.error:
        raise RejectedImage("damaged: the PNG file's compressed pixels cannot be inflated") from None
    return True


def _bmp(data: memoryview) -> ImageHeader:
    offset, header_size = struct.unpack_from("<II", data, 10)
    if header_size < 40:
        raise RejectedImage("a BMP of the OS/2 kind: save it as PNG")
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: rows run from the top
    if compression != 0 or bits not in (8, 24):
        raise RejectedImage(f"a BMP of {bits} bits, compression {compression}: expected 8 or 24 bits, uncompressed")
    check_size(width, height)
    if offset + (width * bits // 8 + 3) // 4 * 4 * height > len(data):
        raise RejectedImage("truncated: the BMP file holds fewer pixels than its header declares")
    return ImageHeader("BMP", width, height, bits // 8, 8)


def _tiff_directory(data: memoryview) -> tuple[dict[int, tuple[int, ...]], int]:
    """The unsigned integer tags of the first picture, and the offset of the second (0: there is none)."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, start)
    tags = {}
    for entry in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, entry)
        if tag not in _TIFF_TAGS or kind not in _TIFF_TYPES:
            continue
        if count > _TIFF_COUNT or count * _TIFF_TYPES[kind][1] > len(data):
            continue
        if tag in tags:
            raise RejectedImage(f"damaged: the TIFF file has tag {tag} twice")
        code, size = _TIFF_TYPES[kind]
        place = entry + 8 if count * size <= 4 else struct.unpack_from(order + "I", data, entry + 8)[0]
        tags[tag] = struct.unpack_from(f"{order}{count}{code}", data, place)
    return tags, struct.unpack_from(order + "I", data, start + 2 + 12 * entries)[0]


# Those that `_tiff` asks for.
_TIFF_TAGS = frozenset((256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 322, 323, 324, 325, 339, 530))
_TIFF_COUNT = MAX_PIXELS // MIN_SIDE  # of values, one for each row of the highest image
_TIFF_TYPES = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}


def _tiff(data: memoryview) -> ImageHeader:
    tags, next_picture = _tiff_directory(data)
    if next_picture:
        raise RejectedImage("a TIFF of several pages: save the one page that is the radiograph")
    if not {256, 257, 262} <= tags.keys():
        raise RejectedImage("damaged: the TIFF file lacks its width, height or colour space")
    width, height, channels = tags[256][0], tags[257][0], tags.get(277, (1,))[0]
    bits, photometric = set(tags.get(258, (1,))), tags[262][0]
    check_size(width, height)
    if bits not in ({8}, {16}) or set(tags.get(339, (1,))) != {1}:
        shown = f"{bits.pop()} bits" if len(bits) == 1 else f"{len(bits)} different depths"
        raise RejectedImage(f"a TIFF of {shown}, or of signed or float samples: expected unsigned 8 or 16 bits")
    if photometric not in _TIFF_CHANNELS or channels != _TIFF_CHANNELS[photometric]:
        raise RejectedImage(f"a TIFF of {channels} channels, colour space {photometric}: save it as PNG without alpha")
    offsets = tags.get(273) or tags.get(324) or ()
    counts = tags.get(279) or tags.get(325) or ()
    if not offsets or len(offsets) != len(counts):
        raise RejectedImage("damaged: the TIFF file does not say where its pixels are")
    if any(offset + count > len(data) for offset, count in zip(offsets, counts, strict=True)):
        raise RejectedImage("truncated: the TIFF file ends inside its pixels")
    expected = _tiff_pieces(tags, width, height, channels, max(bits) // 8)
    if len(counts) != len(expected):
        raise RejectedImage(f"truncated: the TIFF file has {len(counts)} strips or tiles, its size {len(expected)}")
    if any(count < least for count, least in zip(counts, expected, strict=True)):
        raise RejectedImage("truncated: the TIFF file holds fewer pixels than its header declares")
    return ImageHeader("TIFF", width, height, channels, bits.pop())


def _tiff_pieces(tags: dict[int, tuple[int, ...]], width: int, height: int, channels: int, sample: int) -> list[int]:
    """For each strip or tile that the size asks for, the fewest bytes that it can have: all of them, or one where they
    are compressed. `sample` in bytes."""
    stored, planes = tags.get(259, (1,))[0] == 1, 1
    if stored and tags[262][0] == 6 and tags.get(530) != (1, 1):
        raise RejectedImage("a TIFF of subsampled, uncompressed YCbCr: save it as PNG")
    if tags.get(284, (1,))[0] == 2:
        planes, channels = channels, 1
    if not tags.keys() & {322, 323, 324, 325}:
        rows = min(tags.get(278, (height,))[0], height)
        across, columns, last = 1, width, (height - 1) % max(1, rows) + 1
    elif tags.keys() >= {322, 323, 324} and 273 not in tags:
        columns, rows = tags[322][0], tags[323][0]
        across, last = -(-width // max(1, columns)), rows  # tiles reach beyond the picture
    else:
        raise RejectedImage("damaged: the TIFF file does not tell strips from tiles")
    if not 0 < rows * columns <= MAX_PIXELS:
        raise RejectedImage(f"damaged: strips or tiles of {columns} x {rows} pixels in the TIFF file")
    down = -(-height // rows)
    if planes * across * down > _TIFF_COUNT:
        raise RejectedImage(f"a TIFF of more than {_TIFF_COUNT:,} strips or tiles: save it as PNG")
    full, end = ((length * columns * channels * sample if stored else 1) for length in (rows, last))
    return ([full] * (across * (down - 1)) + [end] * across) * planes


# white is zero, black is zero, RGB, palette, CMYK, and YCbCr within JPEG
_TIFF_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}


def _big_tiff(data: memoryview) -> ImageHeader:
    raise RejectedImage("a big TIFF (64-bit offsets): save it as PNG")


def _pgm(data: memoryview) -> ImageHeader:
    head, numbers, position = data[:_PGM_HEADER], [], 2
    while len(numbers) < 3:
        position = _PGM_SPACE.match(head, position).end()
        if digits := _PGM_NUMBER.match(head, position):
            numbers.append(int(digits[0]))
            position = digits.end()
        if position == len(head) < len(data):
            raise RejectedImage(f"a PGM of more than {_PGM_HEADER:,} bytes of comments: save it without them")
        if position == len(head):
            raise IndexError("no number, or no end of it")
        if not digits:
            raise RejectedImage("damaged: a PGM header must be P5, width, height and white level")
    width, height, white = numbers
    check_size(width, height)
    if white not in (255, 65535):
        raise RejectedImage(f"a PGM whose white is {white}: expected 255 or 65535")
    sample = 1 if white == 255 else 2
    if position + 1 + width * height * sample > len(data):
        raise RejectedImage("truncated: the PGM file holds fewer pixels than its header declares")
    return ImageHeader("PGM", width, height, 1, 8 * sample)


_PGM_HEADER = 2**16  # bytes: a hostile one is comments throughout
_PGM_SPACE = re.compile(rb"(?:\s|#[^\n]*)*")  # and comments, to the ends of their lines
_PGM_NUMBER = re.compile(rb"\d{1,9}(?!\d)")

_FORMATS: tuple[tuple[bytes, str, Callable[[memoryview], ImageHeader]], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"\xff\xd8", "JPEG", read_jpeg),
    (b"BM", "BMP", _bmp),
    (b"II*\0", "TIFF", _tiff),
    (b"MM\0*", "TIFF", _tiff),
    (b"II+\0", "TIFF", _big_tiff),
    (b"MM\0+", "TIFF", _big_tiff),
    (b"P5", "PGM", _pgm),
)
