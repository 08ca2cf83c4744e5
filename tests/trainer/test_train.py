"""Training runs end to end on a few small phantoms: resuming, the best checkpoint, what is frozen, the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scaphoid.trainer import train as training_module
from scaphoid.trainer.checkpoint import load_model, read_metadata
from scaphoid.trainer.config import PAPER, Schedule, TrainConfig
from scaphoid.trainer.data.index import Index, read_index, write_index
from scaphoid.trainer.data.phantom.generate import Options, generate
from scaphoid.trainer.losses import stage_loss
from scaphoid.trainer.models.kalm import KalmConfig
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.models.plain import PlainConfig
from scaphoid.trainer.train import Split, flip, jitter, load_splits, run_epoch, set_training, train

BACKBONE = "test_resnet"  # timm's resnet for tests: batch norm, stride 32, 0.4 million parameters
SIZE = 96
MODELS = {
    "plain": PlainConfig(BACKBONE, SIZE),
    "kalm": KalmConfig(BACKBONE, SIZE, 0.5, 48),
    "msfm": MsfmConfig(BACKBONE, SIZE, 64),
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return generate(tmp_path_factory.mktemp("phantoms"), 24, seed=5, options=Options(size=128))


@pytest.fixture
def config(index, tmp_path) -> TrainConfig:
    """Two epochs of a plain classifier, fast enough to change its answers."""
    schedule = Schedule((2,), 6, "adam", 1e-2, drop_after=0.5)
    return TrainConfig(index.root, tmp_path / "run", MODELS["plain"], schedule, validation=0.3, pretrained=False)


def with_schedule(config: TrainConfig, **changes: object) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, **changes))


def history(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, Tensor]:
    return load_model(path).state_dict()


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Let a function of the trainer stop the run at its `call`-th call, once."""
    original, calls = getattr(training_module, function), []

    def stopping(*args):
        calls.append(None)
        if len(calls) == call:
            raise Interrupted
        return original(*args)

    monkeypatch.setattr(training_module, function, stopping)


# -- runs


def test_a_plain_run_leaves_its_configuration_history_and_best_weights(config):
    best = train(config)
    assert best == config.out / "best.safetensors"
    resolved = json.loads((config.out / "config.json").read_text())
    assert resolved["schedule"]["learning_rate"] == 1e-2
    assert resolved["model"] == {"backbone": BACKBONE, "image_size": SIZE, "scale": 1.0}
    assert resolved["index"] == str(config.index)
    lines = history(config)
    assert [(line["phase"], line["epoch"]) for line in lines] == [("global", 1), ("global", 2)]
    assert all(np.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in lines)
    metadata = read_metadata(best)
    assert metadata["images"] + len(load_splits(config)[1].labels) == 24
    assert train(config) == best  # once more changes nothing
    assert history(config) == lines


def test_kalm_from_a_plain_classifier(config):
    start = train(with_schedule(config, epochs=(1,)))
    kalm = replace(with_schedule(config, epochs=(0, 1)), out=config.out / "kalm", model=MODELS["kalm"], start=start)
    state, plain = weights(train(kalm)), weights(start)
    for name, tensor in plain.items():
        assert torch.equal(state[name.replace("encoder.", "global_encoder.", 1)], tensor), name
    assert not torch.equal(state["local_encoder.classifier.weight"], plain["encoder.classifier.weight"])
    (line,) = history(kalm)
    assert (line["phase"], line["epoch"]) == ("local", 1)
    assert {"accuracy", "global_accuracy", "local_accuracy", "auroc"} <= line.keys()
    extents = [line["key_area_width"], line["key_area_height"]]
    assert extents == pytest.approx([0.5, 0.5], abs=0.1)
    assert extents != [0.5, 0.5]


@pytest.mark.parametrize("fma", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_msfm_in_two_phases(config, fma):
    model = replace(MODELS["msfm"], fma=fma)
    msfm = replace(with_schedule(config, epochs=(1, 1), optimizer="sgd", loss="alpha-wfl"), model=model)
    assert load_model(train(msfm)).config == model
    main, joint = history(msfm)
    assert (main["phase"], joint["phase"]) == ("main", "joint")
    assert {"main_accuracy", "object_accuracy", "parts_accuracy", "probability_with_parts_accuracy"} & joint.keys()
    assert "object_accuracy" in joint
    assert "object_accuracy" not in main
    assert (msfm.out / "best_main.safetensors").exists()


# -- interrupted runs


@pytest.mark.parametrize(
    ("system", "epochs", "function", "call"),
    [
        ("plain", (2,), "save_progress", 2),
        pytest.param("plain", (3,), "run_epoch", 2, marks=pytest.mark.slow),
        pytest.param("plain", (3,), "validate", 3, marks=pytest.mark.slow),
        pytest.param("kalm", (1, 2), "run_epoch", 2, marks=pytest.mark.slow),  # between the phases
        pytest.param("kalm", (1, 2), "run_epoch", 3, marks=pytest.mark.slow),
        pytest.param("msfm", (1, 2), "run_epoch", 3, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, monkeypatch, system, epochs, function, call):
    whole = replace(with_schedule(config, epochs=epochs), model=MODELS[system])
    halved = replace(whole, out=config.out.with_name("halved"))
    train(whole)
    with monkeypatch.context() as patch:
        interrupt(patch, function, call)
        with pytest.raises(Interrupted):
            train(halved)
    assert not (halved.out / "best.safetensors").exists()
    torch.manual_seed(99)  # where the process that was stopped had left the global generator is forgotten
    train(halved)
    assert same(whole.out / "best.safetensors", halved.out / "best.safetensors")
    last = [torch.load(one.out / "last.pt", weights_only=True) for one in (whole, halved)]
    assert last[0]["done"] == last[1]["done"]

    def told(lines: list[dict]) -> list[dict]:
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

    assert told(history(whole)) == told(history(halved))


def test_a_finished_run_is_not_trained_again(config, monkeypatch):
    best = train(config)
    interrupt(monkeypatch, "load_splits", 1)
    assert train(config) == best


def test_a_changed_configuration_is_refused(config):
    config = with_schedule(config, epochs=(1,))
    train(config)
    before = (config.out / "config.json").read_text()
    with pytest.raises(ValueError, match="is of a run with another schedule, seed; ") as caught:
        train(replace(with_schedule(config, learning_rate=1e-3), seed=4))
    assert str(config.out / "config.json") in str(caught.value)
    assert (config.out / "config.json").read_text() == before


def test_a_run_that_never_trained_leaves_nothing_in_the_way(config):
    with pytest.raises(FileNotFoundError, match="no such index"):
        train(replace(config, index=config.out / "nowhere"))
    train(with_schedule(config, epochs=(1,)))


# -- the best checkpoint


def test_the_first_epoch_of_the_best_accuracy_is_kept(config, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.75, 0.25])
    states = []

    def scored(config, model, phase, validation):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"accuracy": next(accuracies), "auroc": 0.5}

    monkeypatch.setattr(training_module, "validate", scored)
    state = weights(train(with_schedule(config, epochs=(4,))))
    assert all(torch.equal(state[name], tensor) for name, tensor in states[1].items())
    assert not all(torch.equal(state[name], tensor) for name, tensor in states[2].items())


def test_a_phase_goes_on_from_the_best_epoch_of_the_one_before(config, monkeypatch):
    accuracies, states = iter([0.75, 0.25, 0.5]), []

    def scored(config, model, phase, validation):
        states.append({name: tensor.clone() for name, tensor in model.global_encoder.state_dict().items()})
        return {"accuracy": next(accuracies), "auroc": 0.5}

    monkeypatch.setattr(training_module, "validate", scored)
    train(replace(with_schedule(config, epochs=(2, 1)), model=MODELS["kalm"]))
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_validation_shares_no_patient_with_training(config, monkeypatch):
    loaded: list[list[str]] = []

    def load(paths, size):
        loaded.append([str(Path(path).relative_to(config.index)) for path in paths])
        return np.zeros((len(paths), 1, size, size), np.uint8), None

    monkeypatch.setattr(training_module, "load_images", load)
    patient = {radiograph.image: radiograph.patient for radiograph in read_index(config.index).radiographs}
    judges = []
    for images in (None, 10):
        loaded.clear()
        training, validation = load_splits(replace(config, images=images))
        for part, names in zip((training, validation), loaded, strict=True):
            assert len(part.labels) == len(part.weights) == len(names)
        trained, held = ({patient[name] for name in names} for names in loaded)
        assert trained
        assert held
        assert not trained & held
        judges.append(loaded[1])
    assert judges[0] == judges[1]  # the same radiographs judge every point of a learning curve


def test_radiographs_of_other_splits_are_left_alone(config, index, tmp_path):
    radiographs = [replace(r, split="valid" if i % 3 == 0 else "train") for i, r in enumerate(index.radiographs)]
    path = write_index(Index(index.root, tuple(radiographs)), index.root / "split.csv")
    training, validation = load_splits(replace(config, index=path))
    assert len(training.labels) + len(validation.labels) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 23}, r"images: expected at most \d+, all but the validation's, got 23"),
        ({"model": MODELS["kalm"]}, r"schedule.epochs: kalm has the phases \('global', 'local'\), got \(2,\)"),
        ({"validation": 1.5}, "fraction: expected a number between 0 and 1"),
    ],
)
def test_what_cannot_run_is_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **changes))


def test_a_start_of_another_backbone_is_refused(config, tmp_path):
    start = train(with_schedule(config, epochs=(1,)))
    other = replace(config, out=tmp_path / "other", start=start, model=PlainConfig("test_efficientnet", SIZE))
    with pytest.raises(ValueError, match="start: expected a plain test_efficientnet, got plain test_resnet"):
        train(other)


# -- an epoch


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


def test_the_learning_rate_falls_to_a_tenth(config, monkeypatch):
    rates = []

    def record(config, model, phase, epoch, training, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(training_module, "run_epoch", record)
    train(with_schedule(config, epochs=(6,), learning_rate=1e-3, drop_after=2 / 3))
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 2)


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


# -- the command line

PROGRAM = "import sys; from scaphoid.trainer.train import main; sys.argv[0] = 'scaphoid-train'; main()"


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=300)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["scaphoid-train", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        training_module.main()
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_help_lists_the_systems(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, "--help")
    assert all(system in text for system in PAPER)


@pytest.mark.parametrize(
    ("system", "defaults"),
    [
        ("plain", ["resnet50", "(default: 64)", "(default: adam)", "(default: 1e-05)", "(default: 30)"]),
        ("kalm", ["resnet18", "(default: 64)", "(default: adam)", "(default: 1e-05)", "(default: 30 30)"]),
        ("msfm", ["resnet50", "(default: 5)", "(default: sgd)", "(default: 0.0001)", "(default: 1 29)", "alpha-wfl"]),
    ],
)
def test_help_shows_the_papers_settings(monkeypatch, capsys, system, defaults):
    text = shown(monkeypatch, capsys, system, "--help")
    for default in defaults:
        assert default in text
    assert all(name in text for name in ("--index", "--out", "--schedule.frozen", "--model.backbone"))


def test_the_papers_settings():
    (_, kalm), (config, msfm) = PAPER["kalm"], PAPER["msfm"]
    assert (kalm.optimizer, kalm.learning_rate, kalm.batch, kalm.epochs) == ("adam", 1e-5, 64, (30, 30))
    assert kalm.drop_after * 30 == pytest.approx(20)
    assert kalm.loss == "ce"
    assert (msfm.optimizer, msfm.learning_rate, msfm.batch, sum(msfm.epochs)) == ("sgd", 1e-4, 5, 30)
    assert (msfm.momentum, msfm.weight_decay, msfm.loss) == (0.9, 1e-4, "alpha-wfl")
    assert (config.theta, config.r, config.gamma, config.image_size, config.part_size) == (0.6, 0.15, 0.5, 448, 224)


def test_a_mistake_is_one_line_and_a_failing_exit_code(tmp_path):
    small = ("--model.backbone", BACKBONE, "--no-pretrained")
    done = command("plain", "--index", str(tmp_path / "none"), "--out", str(tmp_path / "run"), *small)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("scaphoid-train: ")
    assert "no such index" in done.stderr
    assert "Traceback" not in done.stderr
