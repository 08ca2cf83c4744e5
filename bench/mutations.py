"""Radiographs damaged as files get damaged, and as only an attacker would: the same seed, the same damage.

Every mutant begins as a sound file. General damage knows nothing of the format; each format's own lies in its headers
and keeps checksums right where a decoder would look no further otherwise.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

SIZE = (97, 83)  # of the originals, width and height
NUMBERS = (0, 1, 2, 7, 8, 31, 32, 255, 256, 4095, 32767, 65535, 50_000, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PATIENT = "Doe^Jane"  # no error may name her

Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Mutant:
    """`what` is format and damage; `is_dicom` files are read by the client, the others by the server."""

    what: str
    encoded: bytes
    is_dicom: bool = False


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A blurry picture, uint8 [H, W]."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 11), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@lru_cache(maxsize=1)
def originals() -> dict[str, bytes]:
    """Sound files of every format that is taken."""
    grey = picture(3)
    rgb = np.stack([grey, grey, 255 - grey], -1)
    rgba = np.concatenate([rgb, np.full_like(grey, 255)[..., None]], -1)
    return {
        "png": encode(grey, "PNG"),
        "png rgb": encode(rgb, "PNG"),
        "png alpha": encode(rgba, "PNG"),
        "png 16 bit": encode(grey.astype(np.uint16) * 257, "PNG"),
        "jpeg": encode(grey, "JPEG", quality=90),
        "jpeg rgb": encode(rgb, "JPEG", quality=75),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "bmp": encode(grey, "BMP"),
        "bmp rgb": encode(rgb, "BMP"),
        "tiff": encode(grey, "TIFF"),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(grey, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(grey, "TIFF", compression="jpeg"),
        "pgm": encode(grey, "PPM"),
        "pgm 16 bit": b"P5\n%d %d\n65535\n" % SIZE + (grey.astype(">u2") * 257).tobytes(),
        "dicom": dicom(grey),
        "dicom rle": dicom(grey, pydicom.uid.RLELossless),
        "dicom jpeg 2000": dicom(grey, pydicom.uid.JPEG2000Lossless),
    }


def dicom(grey: np.ndarray, compression: str | None = None) -> bytes:
    """A CR file of 12 bits in 16."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3.4"
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.Modality, dataset.PatientName = "1.2.3", "CR", PATIENT
    dataset.Rows, dataset.Columns = grey.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleSlope, dataset.RescaleIntercept = 2048, 4096, 1, 0
    dataset.PixelData = (grey.astype("<u2") * 16).tobytes()
    if compression:
        dataset.compress(compression, generate_instance_uid=False)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def mutant(seed: int) -> Mutant:
    """The mutant of this number: one format, one to three kinds of damage."""
    rng = random.Random(seed)
    name, data = rng.choice(list(originals().items()))
    own = OWN.get(name.split()[0], ())
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        mutate = rng.choice(own) if own and rng.random() < 0.7 else rng.choice(GENERAL)
        data = mutate(data, rng)
        done.append(mutate.__name__)
    return Mutant(f"{name}: {', '.join(done)}", data, name.startswith("dicom"))


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_header_bits(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data[:256], rng) + data[256:]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 16, 1000)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[: start + rng.choice((1, 16, 1000))] + data[start:]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    start, block = rng.randrange(len(data) + 1), rng.choice((b"\0", b"\xff", b"\xff\xd9", rng.randbytes(8)))
    block *= rng.choice((1, 4, 100))
    return data[:start] + block + data[start + len(block) :]


def write_number(data: bytes, rng: random.Random) -> bytes:
    number, order = rng.choice(NUMBERS), rng.choice("<>")
    packed = struct.pack(order + "I", number) if rng.random() < 0.5 else struct.pack(order + "H", number & 0xFFFF)
    start = rng.randrange(max(1, min(len(data), 300)))
    return data[:start] + packed + data[start + len(packed) :]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((bytes(1000), rng.randbytes(1000), data))


def another_format(data: bytes, rng: random.Random) -> bytes:
    """The beginning of one file, the rest of another."""
    other = rng.choice(list(originals().values()))
    start = rng.randrange(2, 64)
    return data[:start] + other[start:]


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], 8
    while position + 12 <= len(data) and len(chunks) < 1000:
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return chunks


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return PNG_HEAD + b"".join(parts)


def png_header(data: bytes, rng: random.Random) -> bytes:
    chunks = _chunks(data)
    if not chunks or len(chunks[0][1]) != 13:
        return data
    fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    place = rng.randrange(7)
    fields[place] = rng.choice((*NUMBERS, *SIZE)) if place < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return _png([(chunks[0][0], struct.pack(">IIBBBBB", *fields)), *chunks[1:]])


def png_chunks(data: bytes, rng: random.Random) -> bytes:
    chunks = _chunks(data)
    if len(chunks) < 2:
        return data
    _, b, done = _rearrange(chunks, rng)
    if not done:
        kind = rng.choice((b"tRNS", b"acTL", b"PLTE", b"iCCP", b"eXIf", b"zTXt", b"gAMA", b"sBIT", b"JUNK"))
        chunks.insert(b, (kind, rng.randbytes(rng.choice((0, 1, 6, 768)))))
    return _png(chunks)


def _rearrange(parts: list, rng: random.Random) -> tuple[int, int, bool]:
    """Exchange, leave out or repeat one of `parts`, three times of four. Returns two places, and whether it did."""
    a, b = rng.randrange(len(parts)), rng.randrange(len(parts))
    change = rng.randrange(4)
    if change == 0:
        parts[a], parts[b] = parts[b], parts[a]
    elif change == 1:
        del parts[a]
    elif change == 2:
        parts.insert(b, parts[a])
    return a, b, change != 3


def png_pixels(data: bytes, rng: random.Random) -> bytes:
    """Compressed pixels changed, the checksum right."""
    chunks = _chunks(data)
    damage = rng.choice((flip_bits, cut, cut_out, overwrite, _inflated_longer, _inflated_shorter))
    return _png([(kind, damage(body, rng) if kind == b"IDAT" else body) for kind, body in chunks])


def _inflated_longer(body: bytes, rng: random.Random) -> bytes:
    return zlib.compress(_inflated(body) + bytes(rng.choice((1, 1000, 20_000_000))))


def _inflated_shorter(body: bytes, rng: random.Random) -> bytes:
    inflated = _inflated(body)
    return zlib.compress(inflated[: rng.randrange(len(inflated) + 1)])


def _inflated(body: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(body, 2**24)
    except zlib.error:
        return body


def _jpeg_segments(data: bytes) -> list[bytes]:
    """Marker segments up to the first scan, then the rest as one."""
    segments, position = [data[:2]], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        segments.append(data[position:end])
        position = end
    return [*segments, data[position:]]


def jpeg_segments(data: bytes, rng: random.Random) -> bytes:
    segments = _jpeg_segments(data)
    a, _, done = _rearrange(segments, rng)
    if not done:
        segments[a] = flip_bits(segments[a], rng)
    return b"".join(segments)


def jpeg_frame(data: bytes, rng: random.Random) -> bytes:
    """Another size, number of channels, sampling or kind of frame."""
    start = next((place for mark in (0xC0, 0xC2) if (place := data.find(bytes((0xFF, mark)))) >= 0), -1)
    if start < 0 or start + 12 > len(data):
        return data
    changed = bytearray(data)
    change = rng.randrange(4)
    if change == 0:
        changed[start + 1] = rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xF7))
    elif change == 1:
        struct.pack_into(">H", changed, start + rng.choice((5, 7)), rng.choice(NUMBERS) & 0xFFFF)
    else:
        changed[start + rng.randrange(4, 12)] = rng.randrange(256)
    return bytes(changed)


def jpeg_scan(data: bytes, rng: random.Random) -> bytes:
    start = data.find(b"\xff\xda")
    if start < 0:
        return data
    damage = rng.choice((flip_bits, overwrite, cut_out, repeat, cut))
    return data[:start] + damage(data[start:-2], rng) + b"\xff\xd9"


def jpeg_exif(data: bytes, rng: random.Random) -> bytes:
    order, body = rng.choice((b"II*\0", b"MM\0*")), rng.randbytes(rng.choice((0, 4, 40)))
    entry = struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, rng.choice(NUMBERS) & 0xFFFFFFFF, 0)
    content = b"Exif\0\0" + order + rng.choice((entry, body))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


def bmp_header(data: bytes, rng: random.Random) -> bytes:
    if len(data) < 54:
        return data
    changed = bytearray(data)
    offset, code = rng.choice(((10, "I"), (14, "I"), (18, "I"), (22, "I"), (26, "H"), (28, "H"), (30, "I"), (46, "I")))
    number = rng.choice((*NUMBERS, 24, 40, 2**32 - SIZE[1]))
    struct.pack_into("<" + code, changed, offset, number & (0xFFFF if code == "H" else 0xFFFFFFFF))
    return bytes(changed)


def tiff_tags(data: bytes, rng: random.Random) -> bytes:
    """One field of one entry of the directory."""
    if len(data) < 16:
        return data
    changed, order = bytearray(data), "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    if start + 2 > len(data):
        return data
    entries = struct.unpack_from(order + "H", data, start)[0]
    entry = start + 2 + 12 * rng.randrange(max(1, min(entries, 40)))
    if entry + 12 > len(data):
        return data
    offset, code = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
    number = rng.choice((*NUMBERS, 3, 5, 6, 16, 258, 259, 273, 279, 32773, len(data)))
    struct.pack_into(order + code, changed, entry + offset, number & (0xFFFF if code == "H" else 0xFFFFFFFF))
    return bytes(changed)


def pgm_header(data: bytes, rng: random.Random) -> bytes:
    words = [*map(str, (*NUMBERS, *SIZE)), "-1", "+97", "1e3", "", "\u0661", "9" * 40, "0x61", "97.0", "# a\n97"]
    chosen = [str(SIZE[0]), str(SIZE[1]), "255"]
    chosen[rng.randrange(3)] = rng.choice(words)
    separator = rng.choice((" ", "\n", "\t", "\r\n", "\n# comment\n", "\0"))
    return ("P5\n" + separator.join(chosen) + "\n").encode() + data[13:]


_TAGS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("NumberOfFrames", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit"),
)
_DECIMALS = ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept")
_WORDS = {
    "PhotometricInterpretation": ("MONOCHROME1", "RGB", "PALETTE COLOR", "", "YBR_FULL"),
    "Modality": ("CT", "", "DX", "C" * 80),
    "PresentationIntentType": ("FOR PROCESSING",),
    "VOILUTFunction": ("SIGMOID", "LINEAR_EXACT", "NONSENSE"),
}
_SYNTAXES = (
    *(pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian, pydicom.uid.DeflatedExplicitVRLittleEndian),
    *(pydicom.uid.RLELossless, pydicom.uid.JPEG2000, pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGLSLossless, "1.2.3"),
)


def dicom_tags(data: bytes, rng: random.Random) -> bytes:
    """A tag with another value, or without."""

    def change(dataset: pydicom.Dataset) -> None:
        kind = rng.randrange(5)
        if kind == 0:
            setattr(dataset, rng.choice(_TAGS), rng.choice(NUMBERS) & 0xFFFF)
        elif kind == 1:
            setattr(dataset, rng.choice(_DECIMALS), rng.choice(("0", "-1", "1e30", "1e-30", "nan", "x", "1\\2")))
        elif kind == 2:
            tag = rng.choice(list(_WORDS))
            setattr(dataset, tag, rng.choice(_WORDS[tag]))
        elif kind == 3:
            dataset.pop(rng.choice(list(dataset.keys())), None)
        else:
            lut = pydicom.Dataset()
            lut.LUTDescriptor = [rng.choice((0, 1, 256, 4096)), rng.choice((0, 1, 65535)), rng.choice((8, 12, 16, 0))]
            lut.LUTData = rng.randbytes(rng.choice((0, 2, 512, 8192)))
            setattr(dataset, rng.choice(("VOILUTSequence", "ModalityLUTSequence")), [lut])

    return _rewritten(data, change)


def dicom_pixels(data: bytes, rng: random.Random) -> bytes:
    def change(dataset: pydicom.Dataset) -> None:
        damage = rng.choice((flip_bits, cut, cut_out, overwrite, append, another_format))
        dataset.PixelData = damage(dataset.PixelData, rng)

    return _rewritten(data, change)


def dicom_syntax(data: bytes, rng: random.Random) -> bytes:
    """Pixels that are compressed in another way than the file says."""
    found = data.find(b"1.2.840.10008.1.2", 132)
    if found < 0:
        return data
    word = str(rng.choice(_SYNTAXES)).encode()[:22]
    return data[:found] + word + data[found + len(word) :]


def _rewritten(data: bytes, change: Callable[[pydicom.Dataset], None]) -> bytes:
    file = io.BytesIO()
    try:
        with pydicom.config.disable_value_validation():
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            change(dataset)
            dataset.save_as(file)
    except Exception:  # damaged before, beyond what pydicom writes again
        return data
    return file.getvalue()


GENERAL = (flip_bits, flip_header_bits, cut, cut_out, repeat, overwrite, write_number, append, another_format)
OWN: dict[str, tuple[Mutation, ...]] = {
    "png": (png_header, png_chunks, png_pixels),
    "jpeg": (jpeg_segments, jpeg_frame, jpeg_scan, jpeg_exif),
    "bmp": (bmp_header,),
    "tiff": (tiff_tags,),
    "pgm": (pgm_header,),
    "dicom": (dicom_tags, dicom_pixels, dicom_syntax),
}
