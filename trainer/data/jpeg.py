"""JPEG bytes without a decoder: the header of a file, whether its pixels end early, and the size that a compressed
DICOM frame declares.

A decoder fills what is missing from a JPEG with grey and says nothing, so a file that was cut and closed again with an
end marker looks whole. What gives it away: scans that never came (`read_jpeg`), or grey in a corner of the decoded
picture and a picture that changes when bytes are put before the end marker (`ends_early`).
"""

import io
import struct
from collections.abc import Iterator

import numpy as np

from scaphoid.trainer.data.header import ImageHeader, RejectedImage, check_size

MAX_SEGMENTS = 10_000  # each takes a microsecond; cameras write some dozens
MAX_SCANS = 100  # a progressive JPEG has about 10; each scan of a hostile one costs a pass over the whole image
FILL = 128  # grey level of blocks that a decoder has no data for

_START, _END, _SCAN, _PROGRESSIVE, _JPEG_LS = 0xD8, 0xD9, 0xDA, 0xC2, 0xF7
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # of every process; those three are tables
_BLOCK = 2**16  # bytes
_CODESTREAM = b"\xff\x4f\xff\x51"  # JPEG 2000: SOC, SIZ
# Every restart marker, so that a decoder that waits for one of them takes the bytes too.
_MORE = b"".join(bytes(range(64)) + bytes((0xFF, 0xD0 + number)) for number in range(8))


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Every marker up to the end marker, and the position behind it. Compressed pixels are stepped over. Raises
    struct.error when the bytes end inside a segment, RejectedImage for more than MAX_SEGMENTS, and for fill bytes
    without end."""
    pixels, position, count = np.frombuffer(data, np.uint8), 2, 0
    while found := _marker(pixels, position):
        if (count := count + 1) > MAX_SEGMENTS:
            raise RejectedImage(f"a JPEG of more than {MAX_SEGMENTS:,} segments: save it anew")
        marker, position = data[found], found + 1
        yield marker, position
        if marker == _END:
            return
        if marker != _START:
            position += struct.unpack_from(">H", data, position)[0]


def _marker(data: np.ndarray, position: int) -> int:
    """Where the code of the next marker is; 0: there is none. Leaves out stuffing and markers without a body.

    In blocks that grow, because a hostile file may consist of 0xFF or of stuffing, which costs a search for each.
    """
    size = 4096
    while position + 1 < len(data):
        block = data[position : position + size + 1]
        code = block[1:]
        found = (block[:-1] == 0xFF) & (code > 1) & (code != 0xFF) & (code & 0xF8 != 0xD0)
        at = int(found.argmax())
        if found[at]:
            return position + 1 + at
        if len(block) > _BLOCK and block.min() == 0xFF:
            raise RejectedImage(f"damaged: {_BLOCK >> 10} KiB of fill bytes in the JPEG file")
        position += size
        size = min(4 * size, _BLOCK)
    return 0


def read_jpeg(data: bytes) -> ImageHeader:
    """The header of an 8-bit baseline or progressive file whose scans bring every coefficient of every channel.

    Raises RejectedImage, and struct.error or IndexError when the file ends inside its header.
    """
    header, scans, marker = None, 0, 0
    owed: dict[int, np.ndarray] = {}  # by channel, for each coefficient: the bits that no scan has brought yet
    for marker, position in segments(data):
        if marker in _FRAMES:
            header = _frame(data, marker, position)
            owed = {data[position + 8 + 3 * channel]: np.full(64, 8) for channel in range(header.channels)}
            progressive = marker == _PROGRESSIVE
        elif marker == _SCAN and header is None:
            raise RejectedImage("damaged: the JPEG file has pixels but no frame header")
        elif marker == _SCAN:
            scans += 1
            channels = [data[position + 3 + 2 * number] for number in range(data[position + 2])]
            script = struct.unpack_from(">3B", data, position + 3 + 2 * len(channels))
            first, last, low = script if progressive else (0, 63, 0)
            for channel in owed.keys() & set(channels):
                owed[channel][first : last + 1] = low & 15
        if scans > MAX_SCANS:
            raise RejectedImage(f"a JPEG of more than {MAX_SCANS} scans: save it as baseline JPEG")
    if not scans:
        if marker == _END:
            raise RejectedImage("damaged: the JPEG file ends before its pixels")
        raise IndexError("no scan")
    if marker != _END:
        raise RejectedImage("truncated: the JPEG file has no end marker")
    if any(bits.any() for bits in owed.values()):
        raise RejectedImage("truncated: the JPEG file ends before its last scan")
    return header


def _frame(data: bytes, marker: int, position: int) -> ImageHeader:
    if marker not in (0xC0, 0xC1, _PROGRESSIVE):
        raise RejectedImage("a lossless or arithmetic JPEG: save it as baseline JPEG or PNG")
    bits, height, width, channels = struct.unpack_from(">BHHB", data, position + 2)
    if bits != 8:
        raise RejectedImage(f"a JPEG of {bits} bits: window it to 8 bits")
    if channels not in (1, 3, 4):
        raise RejectedImage(f"a JPEG of {channels} channels: expected 1, 3 or 4")
    check_size(width, height)
    return ImageHeader("JPEG", width, height, channels, bits)


def ends_early(data: bytes, header: ImageHeader, image: np.ndarray) -> bool:
    """Whether the compressed pixels of a file that passed `read_jpeg` end before its last block.

    `image` [..., H, W] uint8 is the decoded file, in any size and orientation; only if a corner of it has the grey of
    missing blocks, or cannot have it (CMYK), the file is decoded again, at an eighth of its size, with and without
    bytes to go on with. A progressive file that is cut inside its last scan passes: it lacks the last bit of its finest
    detail at the bottom, nothing that could be seen.
    """
    corners = image[..., :: max(1, image.shape[-2] - 1), :: max(1, image.shape[-1] - 1)]
    if header.channels != 4 and not (corners == FILL).any():
        return False
    end = next(position for marker, position in segments(data) if marker == _END) - 2
    try:
        return not np.array_equal(_reduced(data), _reduced(data[:end] + _MORE + data[end:]))
    except (OSError, SyntaxError):
        return True  # data that Pillow's decoder does not bear


def _reduced(data: bytes) -> np.ndarray:
    from PIL import Image  # here alone: where the GPU server looks at files, there is no Pillow

    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (1, 1))  # a pixel for each block
        return np.asarray(image)


def declared_size(frame: bytes) -> tuple[int, int, int] | None:
    """(width, height, channels) that a JPEG, JPEG-LS or JPEG 2000 codestream declares; None when it does not say."""
    try:
        if not frame.startswith(b"\xff\xd8"):
            start = frame[:4096].index(_CODESTREAM)  # behind boxes in some files
            x1, y1, x0, y0 = struct.unpack_from(">4I", frame, start + 8)
            return x1 - x0, y1 - y0, struct.unpack_from(">H", frame, start + 40)[0]
        for marker, position in segments(frame):
            if marker in _FRAMES or marker == _JPEG_LS:
                height, width, channels = struct.unpack_from(">HHB", frame, position + 3)
                return width, height, channels
    except (struct.error, ValueError):
        pass
    return None
