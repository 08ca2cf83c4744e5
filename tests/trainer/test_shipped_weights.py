"""The weights in the repository: small, loadable, and better than a coin on phantoms that they were not trained on."""

import statistics
from pathlib import Path

import pytest
import torch

from scaphoid.trainer.checkpoint import load_model, read_metadata
from scaphoid.trainer.data.phantom.generate import GENERATOR_VERSION, TEST
from scaphoid.trainer.data.phantom.render import twin
from scaphoid.trainer.data.phantom.study import Options, planned_views

WEIGHTS = sorted((Path(__file__).parents[2] / "trainer" / "weights").glob("*.safetensors"))


def test_there_is_a_file_for_each_system():
    assert [path.stem for path in WEIGHTS] == ["kalm", "msfm"]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_a_file_is_small_and_says_what_it_was_trained_on(path: Path):
    assert path.stat().st_size < 10e6
    assert read_metadata(path)["phantoms"] == GENERATOR_VERSION


@pytest.mark.slow
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_the_probability_falls_when_the_lesion_is_removed(path: Path):
    options = Options(size=448)
    pairs = [twin(study, view, options) for study, view in list(planned_views(TEST.seed, 40, options))]
    pairs = [(shown.image, clean.image) for shown, clean in pairs if shown.box][:8]
    model = load_model(path)
    with torch.inference_mode():
        shown, clean = (
            model.probabilities(model.phases[-1], torch.stack([torch.from_numpy(image)[None] for image in images]))
            for images in zip(*pairs, strict=True)
        )
    drops = (shown["probability"] - clean["probability"]).flatten().tolist()
    assert statistics.median(drops) >= 0.3, drops
