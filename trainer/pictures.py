"""Pictures of a radiograph and what was found in it.

Boxes are `(x0, y0, x1, y1)`, half-open, in pixels of the radiograph with its EXIF orientation applied. Needs Pillow,
numpy and matplotlib; imports no torch, so the client draws with it too.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, ImageOps

from scaphoid.trainer.data.dicom import is_dicom, read_dicom

Box = Sequence[float]

# Told apart by lightness and by line style too, on black and on white, whatever the viewer's colour vision.
BOX_COLOUR = "#ffb000"  # abnormal box: thick
MAIN_BOX_COLOUR = "#5ab4ff"  # main-stage box: thin
WINDOW_COLOUR = "#e8e8e8"  # windows: hairline
TRUTH_COLOUR = "#59e39a"  # annotated box: dashed
HALO = "#000000"


def load_radiograph(path: Path | str) -> np.ndarray:
    """The radiograph to show: uint8 [height, width], grey, EXIF orientation applied, DICOM windowed. Raises OSError or
    ValueError when it cannot be read."""
    data = Path(path).read_bytes()
    if is_dicom(data):
        return read_dicom(data, salt=b"").pixels
    try:
        with Image.open(io.BytesIO(data)) as stored:
            image = ImageOps.exif_transpose(stored)
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scaling
                return np.rint(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8)
            return np.asarray(image.convert("L"))
    except (SyntaxError, EOFError, struct.error) as error:  # what Pillow makes of some damaged files
        raise ValueError(f"{path} cannot be decoded") from error


def shrink(image: np.ndarray, longest_side: int) -> tuple[np.ndarray, float]:
    """`image` [H, W] uint8 with its longer side at most `longest_side`, and the factor that its boxes scale by."""
    scale = min(1.0, longest_side / max(image.shape))
    if scale == 1.0:
        return image, scale
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=2)), scale


def overlay(
    image: np.ndarray,
    caption: str = "",
    box: Box | None = None,
    main_box: Box | None = None,
    windows: Sequence[Box] = (),
    truth: Sequence[Box] = (),
    longest_side: int = 1024,
) -> Image.Image:
    """An RGB picture of `image` [H, W] uint8 with its boxes, and the caption in a bar below, off the anatomy."""
    small, scale = shrink(image, longest_side)
    picture = Image.fromarray(small).convert("RGB")
    unit = max(picture.size) / 512  # line widths follow the picture's size
    draw = ImageDraw.Draw(picture)
    for window in windows:
        _draw_box(draw, window, scale, WINDOW_COLOUR, unit * 0.6)
    if main_box is not None:
        _draw_box(draw, main_box, scale, MAIN_BOX_COLOUR, unit * 1.2)
    for lesion in truth:
        _draw_box(draw, lesion, scale, TRUTH_COLOUR, unit * 1.5, dash=unit * 6)
    if box is not None:
        _draw_box(draw, box, scale, BOX_COLOUR, unit * 2.4)
    return _captioned(picture, caption) if caption else picture


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, scale: float, colour: str, width: float, dash: float = 0.0) -> None:
    """A box with a dark halo, so that it is seen on bright bone and on black background alike."""
    width = max(1, round(width))
    limit = (draw.im.size[0] - 1, draw.im.size[1] - 1)
    x0, y0, x1, y1 = (min(max(round(corner * scale), 0), limit[i % 2]) for i, corner in enumerate(box))
    x1, y1 = max(x0, x1), max(y0, y1)
    if not dash:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=HALO, width=width + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        return
    for start, end in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        draw.line((*start, *end), fill=HALO, width=width + 2)
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        direction = np.sign([end[0] - start[0], end[1] - start[1]])
        for position in np.arange(0, length, 2 * dash):
            begin = start + direction * position
            finish = start + direction * min(position + dash, length)
            draw.line((*begin, *finish), fill=colour, width=width)


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    lines = caption.splitlines()
    size = max(12, round(max(picture.size) / 48))
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    bar = round(size * (1.45 * len(lines) + 0.6))
    framed = Image.new("RGB", (picture.width, picture.height + bar), "#111111")
    framed.paste(picture, (0, 0))
    draw = ImageDraw.Draw(framed)
    for number, line in enumerate(lines):
        draw.text((size * 0.6, picture.height + size * (0.35 + 1.45 * number)), line, font=font, fill="#f2f2f2")
    return framed
