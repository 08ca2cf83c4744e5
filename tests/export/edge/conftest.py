"""Small artefacts of every flow, exported once."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 160  # of `image` in these artefacts


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory) -> Path:
    """MSFM and KALM with random weights; SIDE pixels, maps of 5 x 5."""
    import torch

    from scaphoid.export.export import export
    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig
    from scaphoid.trainer.models.msfm import Msfm, MsfmConfig

    torch.manual_seed(3)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("edge")
    models = {
        "msfm": Msfm(MsfmConfig("test_resnet", image_size=SIDE, part_size=96)),
        "kalm": Kalm(KalmConfig("test_resnet", image_size=SIDE, key_size=96)),
    }
    for name, model in models.items():
        save_model(folder / f"{name}.safetensors", model)
    weights = [folder / f"{name}.safetensors" for name in models]
    export(weights, folder / "artefacts", formats=("onnx",), images=2, accept="random weights")
    return folder / "artefacts"


@pytest.fixture(scope="session")
def radiograph() -> Callable[..., bytes]:
    """radiograph(seed, format="png", **options): an encoded picture of soft blobs, 151 x (203 + seed) pixels."""

    def draw(seed: int, format: str = "png", **options) -> bytes:
        small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((203 + seed, 151), Image.Resampling.BICUBIC).save(file, format, **options)
        return file.getvalue()

    return draw
