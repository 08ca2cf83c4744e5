"""What decoding costs: core-time of one radiograph of a detector's size through the flow's own preprocessing."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scaphoid.trainer.data.phantom.generate import planned_views
from scaphoid.trainer.data.phantom.render import render
from scaphoid.trainer.data.pipeline import decode_batch

HEIGHT, WIDTH = 2500, 2048  # of a detector's image, 5 megapixels
SIDE = 448  # of the image that preprocessing hands on
NOISE = 2.0  # grey levels: without it a PNG is smaller than any detector's
PNG, JPEG, PIXELS = "PNG", "JPEG", "pixels"
SECONDS = 3.0
SEED = 448


@dataclass(frozen=True)
class Form:
    """Of one radiograph as it is sent: its bytes, and the core-seconds that preprocessing spends on it."""

    name: str
    bytes: int
    core_s: float


def radiograph(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A phantom [height, width] uint8 with a detector's noise."""
    study, view = next(iter(planned_views(SEED, 1)))
    drawn = Image.fromarray(render(study, view).image).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(SEED).normal(0, NOISE, (height, width))
    return np.clip(np.asarray(drawn) + noise, 0, 255).round().astype(np.uint8)


def encoded(pixels: np.ndarray) -> dict[str, bytes]:
    """The radiograph as PNG, as JPEG, and as the PGM that DICOM pixels travel in, which needs no decoding."""
    files = {}
    for name, kind, options in (
        (PNG, "png", {"compress_level": 6}),
        (JPEG, "jpeg", {"quality": 90}),
        (PIXELS, "ppm", {}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **options)
        files[name] = file.getvalue()
    return files


def measured_forms(seconds: float = SECONDS) -> list[Form]:
    """Each form decoded over and over for about `seconds`, one image a batch."""
    return [
        Form(name, len(file), core_seconds(lambda file=file: decode_batch([file], SIDE), seconds))
        for name, file in encoded(radiograph()).items()
    ]


def core_seconds(run: Callable[[], object], seconds: float) -> float:
    """Core-time of one call: hardly depends on what else the machine does."""
    run()
    began, used, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - began < seconds:
        run()
        calls += 1
    return (time.process_time() - used) / calls
