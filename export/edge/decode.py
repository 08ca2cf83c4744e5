"""From encoded bytes to `image` and `original_size` where there is no DALI: what trainer/data/pipeline.py computes, by
Pillow, which the guard needs anyway, and numpy.

JPEG gives its luma channel through the same library as DALI's, to the bit; other colour becomes BT.601 luma, 16 bits
become 8, both rounded. The resize repeats DALI's arithmetic, for a model whose decisions are hard (`>=`, argmax) can
answer quite differently when a hundredth of the pixels is off by one level, which is what Pillow's own triangle filter
gives; OpenCV's area and linear filters are off by tens of levels at edges.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from scaphoid.trainer.data.guard import RejectedImage, check_decoded, check_encoded

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM")  # Pillow's names


def decode(encoded: bytes, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """One encoded radiograph to uint8 [1, size, size] and its height, width in pixels, EXIF orientation applied.

    Raises RejectedImage for what the guard refuses and for pixels that cannot be decoded.
    """
    header = check_encoded(encoded)
    try:
        upright = _grey(encoded)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise RejectedImage(f"damaged: the {header.format} file's pixels cannot be decoded") from None
    image = resize(upright, size)[None]
    check_decoded(encoded, header, image)
    return image, upright.shape


def _grey(encoded: bytes) -> np.ndarray:
    """The radiograph as it is shown: uint8 [height, width]."""
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
        opened.draft("L", opened.size)  # a JPEG's luma; nothing for the others
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):  # 16 bits
        pixels = np.array(upright, np.int32)
        pixels += 128
        pixels //= 257
        return pixels.astype(np.uint8)
    if upright.mode not in ("L", "RGB"):  # palettes and CMYK first become colours
        upright = upright.convert("RGB")
    return np.asarray(upright if upright.mode == "L" else upright.convert("L"))


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [height, width] to uint8 [size, size]: linear interpolation with half-pixel centres, its triangle as wide
    as the shrinkage, the border repeated outwards; in float32, one axis after the other, rounded half to even."""
    height, width = pixels.shape
    if height >= width:  # the axis that leaves less to do comes first
        resized = _resize_columns(_resize_rows(pixels, size), size)
    else:
        resized = _resize_rows(_resize_columns(pixels, size), size)
    return np.rint(resized, out=resized).clip(0, 255).astype(np.uint8)


def _resize_columns(pixels: np.ndarray, size: int) -> np.ndarray:
    return _resize_rows(np.ascontiguousarray(pixels.T), size).T


def _resize_rows(pixels: np.ndarray, size: int) -> np.ndarray:
    """[length, n] to float32 [size, n]; taps are added in order, as DALI adds them."""
    places, weights = _taps(len(pixels), size)
    resized = np.zeros((size, pixels.shape[1]), np.float32)
    product = np.empty_like(resized)
    for place, weight in zip(places, weights, strict=True):
        np.multiply(pixels[place], weight[:, None], out=product)
        resized += product
    return resized


@lru_cache(maxsize=64)
def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `length` pixels make each of `size`, and how much of each: [taps, size] int64 and float32. In float32
    throughout: the position of a pixel far from the start is rounded as DALI rounds it."""
    scale = np.float32(length) / np.float32(size)
    reach = max(scale, np.float32(1))
    start = np.arange(size, dtype=np.float32) * scale + (np.float32(0.5) * scale - np.float32(0.5) - reach)
    first = np.ceil(start)
    taps = np.arange(int(np.ceil(2 * reach)), dtype=np.float32)[:, None]
    distance = ((first - start) + taps) * (1 / reach)  # from the triangle's left end; its peak is at 1
    weights = np.maximum(np.where(distance < 1, distance, 1 - (distance - 1)), 0)
    total = np.zeros(size, np.float32)
    for weight in weights:
        total += weight
    return (first + taps).clip(0, length - 1).astype(np.int64), weights / total
