"""A contact sheet: to see whether the phantoms read as radiographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from scaphoid.trainer.data.phantom.render import Phantom, render
from scaphoid.trainer.data.phantom.study import DEFAULTS, Options, plan_study


def contact_sheet(
    seed: int, path: Path, columns: int = 6, tile: int = 256, boxes: bool = True, options: Options = DEFAULTS
) -> Path:
    """Writes a PNG with a row per body part: the left half normal, the right half abnormal (`boxes`: with the lesions'
    boxes)."""
    rows = []
    for row, part in enumerate(options.body_parts):
        only = replace(options, body_parts=(part,))
        tiles: dict[bool, list[np.ndarray]] = {False: [], True: []}
        wanted, number = {False: columns - columns // 2, True: columns // 2}, 1000 * row
        while any(len(tiles[k]) < wanted[k] for k in tiles):
            study, number = plan_study(seed, number, only), number + 1
            if len(tiles[study.abnormal]) == wanted[study.abnormal]:
                continue
            phantom = render(study, number % len(study.views), only)
            if phantom.box is not None or not study.abnormal:
                tiles[study.abnormal].append(_captioned(phantom, tile, boxes))
        rows.append(np.hstack(tiles[False] + tiles[True]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.vstack(rows)):
        raise OSError(f"{path}: could not be written; check the folder's permissions and that the name ends in .png")
    return path


def _captioned(phantom: Phantom, tile: int, boxes: bool) -> np.ndarray:
    picture = cv2.cvtColor(cv2.resize(phantom.image, (tile, tile), interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    if boxes and phantom.box is not None:
        x0, y0, x1, y1 = (round(c * tile / phantom.image.shape[0]) for c in phantom.box)
        cv2.rectangle(picture, (x0, y0), (x1, y1), (0, 190, 255), 1, cv2.LINE_AA)
    text = f"{phantom.study.body_part} {phantom.view.name}" + (f" {phantom.kind}" if boxes and phantom.box else "")
    cv2.putText(picture, text, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (90, 200, 90), 1, cv2.LINE_AA)
    return picture
