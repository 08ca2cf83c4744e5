"""What artefacts carry for the GPU repository beside the ONNX: the preprocessing that decodes on the GPU, and one
sample of every stage's inputs, with which the server warms its models up.

A sample has the sizes, types and range of what a stage sees, not the values: these would differ in their last bits from
one machine to the next. Its image is a drawn radiograph, never one of a user's, as a JPEG: what a GPU decodes.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scaphoid.export.artefacts import GPU_FILES, WARMUP
from scaphoid.export.gate_images import gate_images
from scaphoid.export.pipeline_to_dali import pipeline_to_dali
from scaphoid.export.runner import PREPROCESS_BATCH
from scaphoid.trainer.contracts import ENCODED, ORIGINAL_SIZE
from scaphoid.trainer.data.pipeline import decode_batch


def write_gpu_files(artefacts: Path, stages: Mapping[str, Mapping], image_size: int) -> None:
    """Write both. `stages`: those of the artefacts' manifest."""
    folder = artefacts / GPU_FILES
    folder.mkdir()
    pipeline_to_dali(folder / "model.dali", image_size, PREPROCESS_BATCH, "mixed")
    encoded = sample_jpeg()
    images, sizes = decode_batch([encoded], image_size)
    for name, stage in stages.items():
        (folder / WARMUP / name).mkdir(parents=True)
        for tensor in stage["inputs"]:
            whole = {ENCODED.name: encoded, ORIGINAL_SIZE.name: sizes[0].tobytes()}.get(tensor["name"])
            content = whole or sample(tensor["dtype"], tensor["dims"], images[0, 0]).tobytes()
            (folder / WARMUP / name / tensor["name"]).write_bytes(content)


def sample_jpeg() -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(gate_images(1).encoded[0])).convert("L").save(file, "jpeg", quality=90)
    return file.getvalue()


def sample(dtype: str, dims: Sequence[int], image: np.ndarray) -> np.ndarray:
    """One row of a tensor: of pixels, parts of `image` [H, W]; of a map, a hill; of boxes, the middle half of `image`;
    of anything else, numbers that fall from 1."""
    if dtype == "UINT8":
        height, width = dims[-2:]
        return np.broadcast_to(np.resize(image[:height, :width], (height, width)), dims).copy()
    if dims[-1] == 4 and len(dims) <= 2:
        middle = [image.shape[1] // 4, image.shape[0] // 4, image.shape[1] * 3 // 4, image.shape[0] * 3 // 4]
        return np.broadcast_to(np.float32(middle), dims).copy()
    if len(dims) == 2:
        y, x = np.indices(dims)
        return (1 / (1 + (y - dims[0] // 2) ** 2 + (x - dims[1] // 3) ** 2)).astype(np.float32)
    return (1 / np.arange(1, np.prod(dims) + 1)).astype(np.float32).reshape(dims)
