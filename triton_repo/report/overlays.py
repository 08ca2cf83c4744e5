"""Overlay PNGs: each radiograph with its boxes and probabilities burnt in."""

import re
from pathlib import Path

from scaphoid.trainer.data.index import Radiograph
from scaphoid.trainer.journal import Prediction
from scaphoid.trainer.pictures import load_radiograph, overlay


def write_overlay(folder: Path, prediction: Prediction, truth: Radiograph | None = None) -> Path:
    """Write one predicted radiograph's overlay and return its path. The abnormal box (KALM: key area) is drawn when the
    image is called abnormal. Raises OSError or ValueError when the radiograph is no longer there to be read."""
    abnormal = prediction.verdict == "abnormal"
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in prediction.stages.items())
    if prediction.first_stage_only:
        stages = f"first stage only (outside the band), no box was asked for: {stages}"
    picture = overlay(
        load_radiograph(prediction.image),
        caption=f"{prediction.score:.2f} {prediction.verdict} (threshold {prediction.threshold:g})\n{stages}",
        box=prediction.box if abnormal else None,
        main_box=prediction.main_box,
        windows=[window["box"] for window in prediction.windows] if abnormal else [],
        truth=(truth.boxes or ()) if truth else (),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / overlay_name(prediction)
    picture.save(path)
    return path


def overlay_name(prediction: Prediction) -> str:
    """The image's last folders and name, and a piece of its content hash: two images never share a file."""
    readable = "_".join((*Path(prediction.image).parts[-4:-1], Path(prediction.image).stem))
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', readable).strip('-.')[-100:]}-{prediction.sha256[:8]}.png"
