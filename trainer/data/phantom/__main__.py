"""`python -m scaphoid.trainer.data.phantom`: radiograph-like phantoms with known lesions."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scaphoid.trainer.data.index import Index
from scaphoid.trainer.data.phantom.generate import (
    GENERATOR_VERSION,
    TEST,
    TRAINING,
    Frozen,
    Options,
    contact_sheet,
    generate,
)


@dataclass(frozen=True)
class Phantoms:
    """Draws phantoms: grey PNGs in the MURA folder layout, MURA's CSV files, and index.csv with the lesions' boxes.

    Seven body parts, studies of one to four views, about half of them abnormal (fracture, displacement, lytic or
    sclerotic lesion, metal). The same seed gives the same images, however many are drawn.

    Two sets are frozen, so that models can be compared:

      python -m scaphoid.trainer.data.phantom --out data/phantoms --frozen training

      python -m scaphoid.trainer.data.phantom --out data/phantoms-test --frozen test

    Your own, with letters that give the label away (what artefact suppression is for):

      python -m scaphoid.trainer.data.phantom --out data/letters --images 800 --marker-correlation 0.9

    A look first:

      python -m scaphoid.trainer.data.phantom --out data/look --seed 5 --sheet
    """

    out: Path
    """Folder to write to; created if need be, refused if it already holds an index.csv."""
    images: int = 1000
    """How many images (not studies)."""
    seed: int = 1
    """Series of the phantoms."""
    split: Literal["train", "valid"] = "train"
    """Folder of the MURA layout to write into."""
    frozen: Literal["training", "test"] | None = None
    """Draw a frozen set; its images, seed and split replace those above."""
    sheet: bool = False
    """Write one contact sheet (sheet.png) instead of a data set."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)


def main(arguments: list[str] | None = None) -> int:
    wanted = tyro.cli(Phantoms, args=arguments, prog="python -m scaphoid.trainer.data.phantom")
    console = Console(stderr=True)
    try:
        if wanted.sheet:
            console.print(f"wrote {contact_sheet(wanted.seed, wanted.out / 'sheet.png', options=wanted.options)}")
            return 0
        index = _draw(wanted, console)
    except (ValueError, OSError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    abnormal = sum(r.label for r in index.radiographs)
    console.print(f"{len(index)} images, {abnormal} of them of abnormal studies (generator {GENERATOR_VERSION})")
    console.print(f"wrote {wanted.out / 'index.csv'}")
    return 0


def _draw(wanted: Phantoms, console: Console) -> Index:
    if (wanted.out / "index.csv").exists():
        raise FileExistsError(f"--out {wanted.out}: already holds an index.csv; name another folder or delete this one")
    frozen = {"training": TRAINING, "test": TEST, None: Frozen(wanted.seed, wanted.images, wanted.split)}[wanted.frozen]
    columns = (TextColumn("phantoms"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("phantoms", total=frozen.images)
        return generate(
            wanted.out,
            frozen.images,
            frozen.seed,
            frozen.split,
            wanted.options,
            wanted.workers,
            lambda n: progress.advance(task, n),
        )


if __name__ == "__main__":
    sys.exit(main())
