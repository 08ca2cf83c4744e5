"""The radiographs that exported artefacts are held against eager fp32 on: drawn, or the user's own."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scaphoid.export.disk import SCRATCH, room_in
from scaphoid.trainer.data.index import Index, Radiograph, read_index, split_by_patient
from scaphoid.trainer.data.phantom.generate import GENERATOR_VERSION, Frozen, generate

PHANTOMS = Frozen(seed=52561, images=256, split="valid")  # neither trained nor tested on
FEW = 32  # drawn in this process: others take seconds to start


@dataclass(frozen=True)
class GateImages:
    """`encoded`: bytes of image files. `names`: what an error on the terminal calls them, the path that the index or
    the user gave. `places`: what the report calls them, which travels with the artefacts: no path, for it might hold a
    patient's name. `radiographs`: their labels, boxes and patients, or none where nobody knows them. `origin`: what
    they are, for the report."""

    encoded: Sequence[bytes]
    names: Sequence[str]
    places: Sequence[str]
    radiographs: Sequence[Radiograph]
    origin: str

    def __len__(self) -> int:
        return len(self.encoded)


@contextlib.contextmanager
def _drawn(images: int) -> Iterator[Index]:
    with tempfile.TemporaryDirectory(prefix="scaphoid-gate-") as folder, room_in(Path(folder), SCRATCH):
        workers = 1 if images <= FEW else os.cpu_count() or 1
        yield generate(Path(folder), images, PHANTOMS.seed, PHANTOMS.split, workers=workers)


def gate_images(images: int = PHANTOMS.images, data: Path | None = None) -> GateImages:
    """`images` phantoms of the gate's own seed, or up to as many radiographs of the index `data`, whole patients, about
    as many abnormal ones as it has. Raises ValueError for fewer than one, InvalidIndexError and OSError for `data`."""
    if images < 1:
        raise ValueError(f"--gate-images: expected at least 1, got {images}: no artefact is published unchecked")
    if data is None:
        with _drawn(images) as index:
            drawn = _of(index, index, f"phantoms of generator {GENERATOR_VERSION}, seed {PHANTOMS.seed}")
        # their paths are made like MURA's, and would read like those of patients
        names = [f"phantom {number}" for number in range(1, len(drawn) + 1)]
        return replace(drawn, names=names, places=names)
    index = whole = read_index(data)
    if images < len(index):
        patients = len({radiograph.patient for radiograph in index.radiographs})
        if patients > 1:
            index = split_by_patient(index, images / len(index), PHANTOMS.seed)[1]
        index = Index(index.root, index.radiographs[:images])
    return _of(index, whole, f"radiographs of the index {Path(data).name}")


def _of(index: Index, whole: Index, origin: str) -> GateImages:
    """All of `index`, which is part of the `whole` one."""
    encoded = [index.path(radiograph).read_bytes() for radiograph in index.radiographs]
    place = {radiograph.image: f"radiograph {number}" for number, radiograph in enumerate(whole.radiographs, 1)}
    names = [radiograph.image for radiograph in index.radiographs]
    return GateImages(encoded, names, [place[name] for name in names], index.radiographs, origin)


def of_files(paths: Sequence[Path]) -> GateImages:
    """Radiographs about which nothing is known, or those of one `index.csv`. Raises OSError."""
    if len(paths) == 1 and paths[0].suffix == ".csv":
        index = read_index(paths[0])
        return _of(index, index, f"radiographs of the index {paths[0].name}")
    places = [f"image {number}" for number in range(1, len(paths) + 1)]
    return GateImages([path.read_bytes() for path in paths], list(map(str, paths)), places, (), "radiographs")
