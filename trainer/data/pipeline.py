"""From encoded bytes to `image` and `original_size`: the one place that decodes and resizes, for training and serving.

One DALI pipeline, `preprocess_pipeline`: decode to grey (ITU-R BT.601 luma; 16 bits to 8), apply the EXIF
orientation, resize without keeping the aspect ratio (bilinear with antialiasing, rounded to uint8). Training and
evaluation run it through `load_images`; the exporter writes it with `serialize`, and the server runs that file.
Normalisation is not here: it is part of the encoder's graph.

`Decoder` runs the pipeline over untrusted bytes. What guard.py rejects never reaches DALI; should DALI itself fail,
which invalidates the whole pipeline, the pipeline is built anew and the batch is retried one by one, so that a bad
image fails alone. DALI is imported when a pipeline is built, not before.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.data.guard import ImageHeader, RejectedImage, check_decoded, check_encoded

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

BATCH = 32  # images decoded at once when nobody else decides


class Decoded(NamedTuple):
    image: np.ndarray  # uint8 [1, size, size]
    original_size: np.ndarray  # int32 [2]: height, width, EXIF orientation applied


def preprocess_pipeline(size: int, batch_size: int, device: str = "cpu", num_threads: int | None = None) -> "Pipeline":
    """The pipeline, built: `encoded` uint8 [bytes] -> `image` uint8 [1, size, size], `original_size` int32 [2].

    `device` is `cpu`, or `mixed`: decoding begins on the CPU and ends on the GPU, where `image` stays (needs CUDA).
    `batch_size` is the most images a run may have; `num_threads` defaults to the cores this process may use.
    """
    pipeline = _definition(size, batch_size, device, num_threads or _cores(), None if device == "cpu" else 0)
    pipeline.build()
    return pipeline


def _definition(size: int, batch_size: int, device: str, num_threads: int, device_id: int | None) -> "Pipeline":
    if device not in ("cpu", "mixed"):
        raise ValueError(f"device must be 'cpu' or 'mixed', got {device!r}")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1)
    def preprocess():
        encoded = fn.external_source(name=ENCODED.name, device="cpu", dtype=types.UINT8, ndim=1)
        decoded = fn.decoders.image(encoded, device=device, output_type=types.GRAY, adjust_orientation=True)
        original_size = fn.cast(decoded.shape()[:2], dtype=types.INT32)
        image = fn.resize(
            decoded, resize_x=size, resize_y=size, interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.UINT8
        )
        return fn.reshape(image, shape=[1, size, size], layout="CHW"), original_size

    return preprocess()


def serialize(path: str | Path, size: int, max_batch_size: int, device: str = "cpu") -> None:
    """Writes the pipeline as the `model.dali` that Triton's DALI backend loads. No GPU is needed for `mixed` either:
    the backend says which one when it loads the file, and how many threads (its `num_threads`), so that the file is the
    same on every machine."""
    _definition(size, max_batch_size, device, 1, None).serialize(filename=str(path))


class Decoder:
    """Runs a serialised pipeline over untrusted bytes, `batch_size` at a time. Not for several threads at once."""

    def __init__(self, serialized: bytes, batch_size: int):
        self._serialized, self._batch_size = serialized, batch_size
        self._pipeline = self._build()

    def _build(self) -> "Pipeline":
        from nvidia.dali import Pipeline

        # from the serialised form: rebuilt from the Python definition, memory grows a little every time
        pipeline = Pipeline.deserialize(self._serialized, num_threads=_cores())
        pipeline.build()
        return pipeline

    def decode(self, encoded: Sequence[bytes | memoryview]) -> list[Decoded | RejectedImage]:
        """One answer for each image, in order: the picture, or why there is none."""
        answers: list[Decoded | RejectedImage] = [_check(data) for data in encoded]
        good = [index for index, answer in enumerate(answers) if isinstance(answer, ImageHeader)]
        for start in range(0, len(good), self._batch_size):
            chosen = good[start : start + self._batch_size]
            headers = [answers[index] for index in chosen]
            for index, answer in zip(chosen, self._run([encoded[i] for i in chosen], headers), strict=True):
                answers[index] = answer
        return answers

    def _run(self, encoded: list[bytes | memoryview], headers: list[ImageHeader]) -> list[Decoded | RejectedImage]:
        try:
            outputs = self._pipeline.run(**{ENCODED.name: [np.frombuffer(data, np.uint8) for data in encoded]})
        except RuntimeError:
            self._pipeline = self._build()
            if len(encoded) == 1:
                return [RejectedImage(f"damaged: the {headers[0].format} file's pixels cannot be decoded")]
            return [self._run([data], [header])[0] for data, header in zip(encoded, headers, strict=True)]
        # copied: DALI writes the next run into the same memory
        images, sizes = (np.array(output.as_cpu().as_array()) for output in outputs)
        return [_check_decoded(*each) for each in zip(encoded, headers, images, sizes, strict=True)]


def _check(data: bytes | memoryview) -> ImageHeader | RejectedImage:
    try:
        return check_encoded(data)
    except RejectedImage as rejected:
        return rejected
    except Exception as error:  # whatever the guard trips over fails alone; the message may quote the file
        return RejectedImage(f"cannot be read ({type(error).__name__})")


def _check_decoded(
    data: bytes | memoryview, header: ImageHeader, image: np.ndarray, original_size: np.ndarray
) -> Decoded | RejectedImage:
    try:
        check_decoded(data, header, image)
    except RejectedImage as rejected:
        return rejected
    return Decoded(image, original_size)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@lru_cache(maxsize=2)
def _decoder(size: int) -> Decoder:
    return Decoder(preprocess_pipeline(size, BATCH).serialize(), BATCH)


def decode_batch(encoded: Sequence[bytes | memoryview], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Any number of encoded images -> `images` uint8 [N, 1, size, size] and `original_sizes` int32 [N, 2].

    Raises RejectedImage for the first image that cannot be decoded, naming its place; use `Decoder` to keep the others.
    """
    return _stack(_decoder(size).decode(encoded), size, [f"image {index}" for index in range(len(encoded))])


def load_images(paths: Sequence[str | Path], size: int, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Every file decoded: images uint8 [N, 1, size, size] and original sizes int32 [N, 2].

    Raises RejectedImage, or OSError, naming the first file that cannot be read.
    """
    from rich.progress import track

    images = np.empty((len(paths), 1, size, size), np.uint8)
    sizes = np.empty((len(paths), 2), np.int32)
    for start in track(range(0, len(paths), BATCH), "decoding images", disable=not progress):
        names = paths[start : start + BATCH]
        answers = _decoder(size).decode([Path(name).read_bytes() for name in names])
        images[start : start + BATCH], sizes[start : start + BATCH] = _stack(answers, size, names)
    return images, sizes


def _stack(answers: list[Decoded | RejectedImage], size: int, names: Sequence) -> tuple[np.ndarray, np.ndarray]:
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, RejectedImage):
            raise RejectedImage(f"{name}: {answer.reason}")
    if not answers:
        return np.empty((0, 1, size, size), np.uint8), np.empty((0, 2), np.int32)
    return np.stack([answer.image for answer in answers]), np.stack([answer.original_size for answer in answers])
