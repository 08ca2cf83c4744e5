"""The radiographs that exported artefacts are held against eager fp32 on: drawn, or the user's own."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaphoid.trainer.data.index import Index, Radiograph, read_index, split_by_patient
from scaphoid.trainer.data.phantom.generate import GENERATOR_VERSION, Frozen, generate

PHANTOMS = Frozen(seed=52561, images=256, split="valid")  # neither trained nor tested on
FEW = 32  # drawn in this process: others take seconds to start


@dataclass(frozen=True)
class GateImages:
    """`encoded`: bytes of image files. `radiographs`: their labels, boxes and patients, or none where nobody knows
    them. `origin`: what they are, for the report; no name of a file, which might be a patient's."""

    encoded: Sequence[bytes]
    radiographs: Sequence[Radiograph]
    origin: str

    def __len__(self) -> int:
        return len(self.encoded)


@contextlib.contextmanager
def _drawn(images: int) -> Iterator[Index]:
    with tempfile.TemporaryDirectory(prefix="scaphoid-gate-") as folder:
        workers = 1 if images <= FEW else os.cpu_count() or 1
        yield generate(Path(folder), images, PHANTOMS.seed, PHANTOMS.split, workers=workers)


def gate_images(images: int = PHANTOMS.images, data: Path | None = None) -> GateImages:
    """`images` phantoms of the gate's own seed, or up to as many radiographs of the index `data`, whole patients, about
    as many abnormal ones as it has. Raises ValueError for fewer than one, InvalidIndexError and OSError for `data`."""
    if images < 1:
        raise ValueError(f"--gate-images: expected at least 1, got {images}: no artefact is published unchecked")
    if data is None:
        with _drawn(images) as index:
            return _of(index, f"phantoms of generator {GENERATOR_VERSION}, seed {PHANTOMS.seed}")
    index = read_index(data)
    if images < len(index):
        patients = len({radiograph.patient for radiograph in index.radiographs})
        if patients > 1:
            index = split_by_patient(index, images / len(index), PHANTOMS.seed)[1]
        index = Index(index.root, index.radiographs[:images])
    return _of(index, f"radiographs of the index {Path(data).name}")


def _of(index: Index, origin: str) -> GateImages:
    encoded = [index.path(radiograph).read_bytes() for radiograph in index.radiographs]
    return GateImages(encoded, index.radiographs, origin)


def of_files(paths: Sequence[Path]) -> GateImages:
    """Radiographs about which nothing is known, or those of one `index.csv`. Raises OSError."""
    if len(paths) == 1 and paths[0].suffix == ".csv":
        index = read_index(paths[0])
        return _of(index, f"radiographs of the index {paths[0].name}")
    return GateImages([path.read_bytes() for path in paths], (), "radiographs")
