"""From a DICOM radiograph to the 8-bit grey pixels that a reader would be shown, on the client's side.

In the order of the standard (PS3.3 C.11, PS3.4 N.2): modality LUT or rescale, then VOI LUT or the first window, then
scaled to 0-255, then MONOCHROME1 inverted, so that bone is bright. An image of 8 bits without a window is shown as it
is stored; one of more bits, between its 0.5th and 99.5th percentile. Pixel padding is left out of those and painted
black. Uncompressed, RLE, JPEG and JPEG 2000 files are read, each as far as a decoder for it is installed; a compressed
frame whose own header disagrees with the file's is refused before it is decoded.

No tag leaves this module: `read_dicom` returns pixels and a pseudonym that tells which images share a study. Reasons
for rejection name technical attributes alone (sizes, modality, compression), and pydicom's warnings, which quote
values, are kept silent.
"""

import hashlib
import io
import logging
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

from scaphoid.trainer.data.guard import RejectedImage, check_blank, check_size
from scaphoid.trainer.data.jpeg import declared_size

RADIOGRAPH_MODALITIES = ("CR", "DX", "RG", "RF", "OT")  # OT: film scans and exports; a missing modality passes too
PERCENTILES = (0.5, 99.5)  # shown range where the file defines none
_JPEG_FAMILY = (
    *pydicom.uid.JPEGTransferSyntaxes,
    *pydicom.uid.JPEGLSTransferSyntaxes,
    *pydicom.uid.JPEG2000TransferSyntaxes,
    *(pydicom.uid.HTJ2K, pydicom.uid.HTJ2KLossless, pydicom.uid.HTJ2KLosslessRPCL),
)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_SILENCE = threading.Lock()  # warnings are silenced for the process: two threads would undo it for each other
logging.getLogger("pydicom").propagate = False  # it logs what it warns of


@dataclass(frozen=True)
class DicomRadiograph:
    pixels: np.ndarray  # uint8 [H, W], bone bright
    study: str | None  # the same for images of one study under one salt; None where the file names no study


def is_dicom(data: bytes | memoryview) -> bool:
    """True if the bytes begin as a DICOM file does (a preamble of 128 bytes, then DICM)."""
    return bytes(data[128:132]) == b"DICM"


def read_dicom(source: str | Path | bytes, salt: bytes) -> DicomRadiograph:
    """Pixels of one DICOM radiograph, given as a path or as the file's bytes.

    `study` is the StudyInstanceUID hashed with `salt` (at most 64 bytes; draw it at random for every run, or the hash
    of a known UID could be looked up). Raises RejectedImage with a one-line reason, or OSError for an unreadable path.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with _SILENCE, warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            dataset = _parse(data)
            _check(dataset)
            pixels = _to_uint8(dataset, _decode(dataset))
            uid = dataset.get("StudyInstanceUID")
    except RejectedImage:
        raise
    except Exception:  # pydicom reads elements when they are asked for, and raises whatever a damaged one leads to
        raise RejectedImage("damaged: an element of the DICOM file cannot be read") from None
    check_blank(pixels)
    study = hashlib.blake2b(str(uid).encode(), key=salt, digest_size=8).hexdigest() if uid else None
    return DicomRadiograph(pixels, study)


def to_pgm(pixels: np.ndarray) -> bytes:
    """uint8 [H, W] as a binary PGM file: DICOM pixels travel to the server so, since PGM costs nothing to decode."""
    height, width = pixels.shape
    return b"P5\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(pixels, np.uint8).tobytes()


def _parse(data: bytes) -> pydicom.Dataset:
    if not any(data):
        raise RejectedImage(f"empty: {len(data)} bytes, all zero" if data else "empty: 0 bytes")
    if not is_dicom(data):
        raise RejectedImage("not a DICOM file: it lacks the DICM mark")
    if _DEFLATED in data[:4096]:  # pydicom inflates such a file whole, without a limit
        raise RejectedImage("a deflated DICOM file: save it uncompressed or as JPEG 2000")
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except InvalidDicomError:
        raise RejectedImage("not a DICOM file: its header cannot be read") from None
    except Exception:  # pydicom raises whatever a damaged element leads to; its message may quote the element
        raise RejectedImage("damaged: the DICOM file's elements cannot be read") from None


def _check(dataset: pydicom.Dataset) -> None:
    """Everything that can be known before the pixels are decoded."""
    if not dataset.get("PixelData") or "Rows" not in dataset or "Columns" not in dataset:
        raise RejectedImage("a DICOM file without pixels")
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel", 1))
        bits, allocated = int(dataset.BitsStored), int(dataset.BitsAllocated)
        modality, photometric = dataset.get("Modality"), dataset.get("PhotometricInterpretation")
    except (AttributeError, TypeError, ValueError):
        raise RejectedImage("damaged: the DICOM file does not describe its pixels") from None
    if modality and modality not in RADIOGRAPH_MODALITIES:
        raise RejectedImage(f"a DICOM file of modality {modality}: expected {', '.join(RADIOGRAPH_MODALITIES)}")
    if dataset.get("PresentationIntentType") == "FOR PROCESSING":
        raise RejectedImage("raw detector data (FOR PROCESSING): send the image FOR PRESENTATION")
    if frames > 1:
        raise RejectedImage(f"a DICOM file of {frames} frames: expected one")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise RejectedImage("a colour DICOM file: expected MONOCHROME1 or MONOCHROME2")
    if allocated not in (8, 16) or not 8 <= bits <= allocated:
        raise RejectedImage(f"a DICOM file of {bits} bits in {allocated}: expected 8 to 16 bits")
    check_size(columns, rows)


def _decode(dataset: pydicom.Dataset) -> np.ndarray:
    """Stored values, integers [H, W]."""
    transfer = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if transfer is None:
        raise RejectedImage("damaged: the DICOM file does not say how its pixels are compressed")
    if not transfer.is_transfer_syntax:
        raise RejectedImage("damaged: the DICOM file's transfer syntax is none")
    if transfer in (*_JPEG_FAMILY, pydicom.uid.RLELossless):
        _check_frame(dataset, transfer)
    try:
        stored = dataset.pixel_array
    except Exception:  # decoders raise whatever they like
        decoder = pydicom.pixels.get_decoder(transfer) if transfer.is_compressed else None
        if decoder is not None and not decoder.is_available:
            raise RejectedImage(f"no decoder is installed for {transfer.name}") from None
        raise RejectedImage("damaged: the DICOM file's pixels cannot be decoded") from None
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise RejectedImage("damaged: the DICOM file's pixels differ in size from its header")
    return stored


def _check_frame(dataset: pydicom.Dataset, transfer: pydicom.uid.UID) -> None:
    """Hold what the compressed frame says of itself against the header: decoders allocate what the frame says."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    try:
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    except Exception:  # pydicom raises whatever damaged fragments lead to
        raise RejectedImage("damaged: the DICOM file's compressed pixels cannot be found") from None
    if transfer == pydicom.uid.RLELossless:  # tells no size; the worst encoder takes two bytes for one
        if len(frame) > 64 + (2 * rows * columns + 2) * int(dataset.BitsAllocated) // 8:
            raise RejectedImage("damaged: the DICOM file holds more compressed bytes than its pixels need")
    elif (found := declared_size(frame)) != (columns, rows, 1):
        shown = "no size" if found is None else "{} x {} pixels in {} channels".format(*found)
        raise RejectedImage(
            f"damaged: the DICOM file's compressed pixels say {shown}, its header {columns} x {rows} in 1"
        )


def _to_uint8(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Stored values -> uint8 as shown, padding black."""
    padding = _padding(dataset, stored)
    try:
        values = apply_modality_lut(stored, dataset)
        shown, low, high = _apply_voi(dataset, values)
    except Exception:
        raise RejectedImage("damaged: the DICOM file's LUT or window cannot be applied") from None
    if shown is None:
        inside = values[~padding]
        if not inside.size:
            raise RejectedImage("a blank DICOM image: padding alone")
        shown, (low, high) = values, np.percentile(inside, PERCENTILES)
        if int(dataset.BitsStored) == 8 and values is stored:
            low, high = (-128, 127) if dataset.PixelRepresentation else (0, 255)
    scaled = np.clip((shown.astype(np.float64) - low) * (255 / max(high - low, 1e-9)), 0, 255)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # Presentation LUT Shape repeats this, it does not add to it
        scaled = 255 - scaled
    scaled[padding] = 0
    return np.rint(scaled).astype(np.uint8)


def _apply_voi(dataset: pydicom.Dataset, values: np.ndarray) -> tuple[np.ndarray | None, float, float]:
    """Values after the VOI LUT or first window and the range they can take; None where the file defines neither."""
    if dataset.get("VOILUTSequence"):
        lut = dataset.VOILUTSequence[0]
        entries, first = lut.LUTDescriptor[0] or 2**16, lut.LUTDescriptor[1]
        lut.LUTDescriptor = [entries, first, 16]  # pydicom indexes in the entries' width: 8 bits would wrap at 256
        table = apply_voi(np.arange(first, first + entries), dataset, index=0)
        chosen = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.intp)
        return table[chosen], float(table.min()), float(table.max())
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return None, 0, 0
    # black and white of the output: what values far outside the window become
    low, high = apply_windowing(np.array([-1e9, 1e9]), dataset, index=0)
    return apply_windowing(values, dataset, index=0), float(low), float(high)


def _padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels outside the exposed field, by Pixel Padding Value and Range Limit."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    return (stored >= low) & (stored <= high)
