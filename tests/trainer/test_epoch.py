"""One epoch of training: its loss, feature-map augmentation, flip and jitter."""

from dataclasses import replace

import pytest
import torch

from scaphoid.trainer import train as training_module
from scaphoid.trainer.config import Schedule, TrainConfig
from scaphoid.trainer.losses import stage_loss
from scaphoid.trainer.models.kalm import KalmConfig
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.models.plain import PlainConfig
from scaphoid.trainer.train import Split, flip, jitter, run_epoch, set_training

BACKBONE = "test_resnet"  # timm's resnet for tests: batch norm, stride 32, 0.4 million parameters
SIZE = 96
MODELS = {
    "plain": PlainConfig(BACKBONE, SIZE),
    "kalm": KalmConfig(BACKBONE, SIZE, 0.5, 48),
    "msfm": MsfmConfig(BACKBONE, SIZE, 64),
}


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A plain classifier; its data come from `split`."""
    return TrainConfig(
        tmp_path, tmp_path / "run", MODELS["plain"], Schedule((1,), 6, "adam", 1e-2, 0.5), pretrained=False
    )


def with_schedule(config: TrainConfig, **changes: object) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, **changes))


def split(count: int = 6) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator).numpy()
    return Split(images, torch.arange(count) % 2, torch.linspace(0.2, 0.8, count))


@pytest.mark.parametrize("system", MODELS)
def test_the_loss_is_the_sum_of_its_terms(config, system):
    torch.manual_seed(0)
    config = replace(with_schedule(config, augment=False, loss="wce"), model=MODELS[system])
    model, data = training_module.create_model(config), split()
    phase = model.phases[-1]
    set_training(model, phase, config.schedule)
    terms = model.training_logits(phase, torch.from_numpy(data.images))
    wanted = sum(stage_loss(logits, data.labels, data.weights, "wce").item() for logits in terms)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    assert run_epoch(config, model, phase, 0, data, optimizer) == pytest.approx(wanted, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    model = training_module.create_model(config)
    model.encoder.classifier.bias.data[:] = torch.nan
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="global epoch 1: the loss is nan; lower"):
        run_epoch(config, model, "global", 0, split(), optimizer)


def test_feature_map_augmentation_does_not_depend_on_flip_and_jitter(config):
    """It is a part of the model: a run without augmentation trains on what inference will see."""
    config = replace(with_schedule(config, augment=False), model=replace(MODELS["msfm"], fma=True))
    model, data, seen = training_module.create_model(config), split(), []
    model.eval()
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    optimizer = torch.optim.SGD(model.encoder.parameters(), 0.0)
    run_epoch(config, model, "main", 0, data, optimizer)
    with torch.no_grad():
        dimmed = model.augment(torch.from_numpy(data.images))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], dimmed[order])
    assert not torch.equal(dimmed, torch.from_numpy(data.images))


# -- augmentation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_mirrors_about_half_of_the_radiographs():
    image = torch.randint(0, 256, (400, 1, 3, 5), dtype=torch.uint8, generator=seeded())
    flipped = flip(image, seeded(1))
    assert flipped.dtype == torch.uint8
    mirrored = (flipped == image.flip(-1)).flatten(1).all(1)
    kept = (flipped == image).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250
    assert torch.equal(flipped, flip(image, seeded(1)))


def test_jitter_stays_within_its_strength():
    image = torch.full((300, 1, 4, 6), 60, dtype=torch.uint8)
    image[:, :, :, 3:] = 140
    jittered = jitter(image, seeded(1))
    assert (jittered.dtype, jittered.shape) == (torch.uint8, image.shape)
    assert torch.equal(jittered, jitter(image, seeded(1)))
    assert not torch.equal(jittered, jitter(image, seeded(2)))
    pixels = jittered.double()
    brightness = pixels.mean((1, 2, 3)) / 100
    contrast = (pixels[..., -1] - pixels[..., 0]).mean((1, 2)) / (80 * brightness)
    for factor in (brightness, contrast):  # rounded to whole grey levels
        assert 0.78 < factor.min() < 0.83
        assert 1.17 < factor.max() < 1.22
        assert factor.mean() == pytest.approx(1.0, abs=0.03)
    assert abs(torch.corrcoef(torch.stack((brightness, contrast)))[0, 1]) < 0.2
    bright = jitter(torch.full((50, 1, 2, 2), 255, dtype=torch.uint8), seeded(1))
    assert bright.max() == 255
    assert bright.min() >= 203
