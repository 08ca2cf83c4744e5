"""Write index.csv for a data set as it is published.

python -m scaphoid.trainer.data mura FOLDER              the folder that holds MURA-v1.1
python -m scaphoid.trainer.data fracatlas FOLDER --validation 0.2
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from scaphoid.trainer.data.fracatlas import read_fracatlas
from scaphoid.trainer.data.index import FILE_NAME, Index, split_by_patient, write_index
from scaphoid.trainer.data.mura import read_mura


@dataclass(frozen=True)
class Arguments:
    """Read a published data set and write the index.csv that training, prediction and evaluation take."""

    kind: tyro.conf.Positional[Literal["mura", "fracatlas"]]
    """Which layout the folder has."""
    root: tyro.conf.Positional[Path]
    """Folder of the data set; for MURA the one that holds MURA-v1.1. The index is written into it."""
    name: str = FILE_NAME
    """File name of the index, which must not exist yet."""
    validation: float = 0.2
    """FracAtlas has no splits: this share of its blocks of ids becomes the split "valid", the rest "train"."""


def read(arguments: Arguments) -> Index:
    if arguments.kind == "mura":
        return read_mura(arguments.root)
    parts = split_by_patient(read_fracatlas(arguments.root), arguments.validation, seed=0)
    named = zip(("train", "valid"), parts, strict=True)
    return Index(arguments.root, tuple(replace(r, split=split) for split, part in named for r in part.radiographs))


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m scaphoid.trainer.data", description=__doc__)
    try:
        if (path := arguments.root / arguments.name).exists():
            raise FileExistsError(f"{path} exists already; give another --name, or move it away")
        index = read(arguments)
        print(
            f"{write_index(index, path)}: {len(index)} radiographs, {sum(r.label for r in index.radiographs)} abnormal"
        )
    except (ValueError, OSError) as error:
        sys.exit(f"scaphoid.trainer.data: {error}")


if __name__ == "__main__":
    main()
