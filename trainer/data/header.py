"""What the readers of file headers (guard.py, jpeg.py) share: the header, its limits, and the rejection. Imports
nothing heavy."""

from dataclasses import dataclass

MAX_PIXELS = 50_000_000  # the largest stitched long-leg and mammography images have about 30 million
MAX_BYTES = 512 * 2**20  # of a file: 50 million uncompressed pixels of 3 channels and 16 bits are 286 MiB
MIN_SIDE = 32  # pixels


class RejectedImage(ValueError):
    """An image that is not decoded. `reason` is one line without the file's name, which only the caller knows."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ImageHeader:
    """What the header declares; `width` and `height` in stored pixels, before any EXIF orientation."""

    format: str
    width: int
    height: int
    channels: int
    bits: int  # per channel


def check_size(width: int, height: int) -> None:
    """Raises RejectedImage when a side is under MIN_SIDE or there are more than MAX_PIXELS. For DICOM headers too."""
    if min(width, height) < MIN_SIDE:
        raise RejectedImage(f"too small: {width} x {height} pixels, each side must have at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise RejectedImage(f"too large: {width} x {height} pixels, at most {MAX_PIXELS:,} are decoded")
