"""What the soak sends: good radiographs with their stored answers, and files that must be refused.

The stored answers come from the artefacts' engines in process, so that no mistake of the server is held against itself.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scaphoid.export.runner import Runner

RTOL = ATOL = 2e-3  # of fp32 engines, whose sums depend on what else is in the batch
Answer = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Good:
    """An image file and, by flow, what a server has to answer."""

    encoded: bytes
    answers: Mapping[str, Answer]


def differences(answer: Answer, stored: Answer) -> list[str]:
    """Names of the outputs that are absent, of another shape, or further off than fp32 sums may be."""
    return [
        name
        for name, value in stored.items()
        if name not in answer
        or answer[name].shape != value.shape
        or not np.allclose(answer[name], value, rtol=RTOL, atol=ATOL)
    ]


def good_images(artefacts: Path, flows: Sequence[str], phantoms: Sequence[bytes], seed: int) -> list[Good]:
    """The phantoms, as PNG, JPEG and PGM of other sizes too, with the engines' answers. An image is left out when its
    answer within a batch is another than alone: a decision so near to flipping says nothing about the server."""
    files = [form for number, phantom in enumerate(phantoms) for form in _forms(phantom, seed + number)]
    kept = {number: {} for number in range(len(files))}
    for flow in flows:
        runner = Runner(artefacts, flow, threads=1)
        alone = [{name: value[0] for name, value in runner([file]).items()} for file in files]
        for start in range(0, len(files), 3):
            together = runner(files[start : start + 3])
            for place, number in enumerate(range(start, min(start + 3, len(files)))):
                if not differences({name: value[place] for name, value in together.items()}, alone[number]):
                    kept[number][flow] = alone[number]
    return [Good(files[number], answers) for number, answers in kept.items() if len(answers) == len(flows)]


def _forms(png: bytes, seed: int) -> list[bytes]:
    """A phantom as it is, and smaller as JPEG and PGM."""
    image = Image.open(io.BytesIO(png)).convert("L")
    size = tuple(int(side) for side in np.random.default_rng(seed).integers(180, 420, 2))
    small, jpeg, pgm = image.resize(size, Image.Resampling.BICUBIC), io.BytesIO(), io.BytesIO()
    small.save(jpeg, "jpeg", quality=90)
    small.save(pgm, "ppm")
    return [png, jpeg.getvalue(), pgm.getvalue()]


def bad_images(png: bytes) -> dict[str, bytes]:
    """Files that a server must refuse, by what is wrong with them; all made from one sound PNG."""
    image = Image.open(io.BytesIO(png)).convert("L")
    jpeg, gif = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "jpeg")
    image.save(gif, "gif")
    middle = len(png) // 2
    return {
        "png cut": png[:middle],
        "png bit flipped": png[:middle] + bytes([png[middle] ^ 1]) + png[middle + 1 :],
        "png of garbage": png[:41] + bytes(reversed(png[41:])),
        "png too large": _png_header(60_000, 60_000),
        "jpeg cut": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "gif": gif.getvalue(),
        "text": b"not a radiograph, however long it gets " * 50,
        "zeros": bytes(5000),
        "pgm cut": b"P5\n200 200\n255\n" + bytes(range(200)),
        "blank": _blank(),
    }


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _blank() -> bytes:
    file = io.BytesIO()
    Image.new("L", (90, 70), 128).save(file, "png")
    return file.getvalue()
