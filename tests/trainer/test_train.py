"""Training runs end to end on a few small phantoms: resuming, the best checkpoint, what is refused."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scaphoid.trainer import train as training_module
from scaphoid.trainer.checkpoint import load_model, read_metadata
from scaphoid.trainer.config import Schedule, TrainConfig
from scaphoid.trainer.data.index import Index, read_index, write_index
from scaphoid.trainer.data.phantom.generate import Options, generate
from scaphoid.trainer.models.kalm import KalmConfig
from scaphoid.trainer.models.msfm import MsfmConfig
from scaphoid.trainer.models.plain import PlainConfig
from scaphoid.trainer.train import load_splits, train

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


def improving(monkeypatch: pytest.MonkeyPatch, accuracies: Iterable[float]) -> None:
    """Let validation tell these accuracies, one after the other."""
    original, told = training_module.validate, iter(accuracies)
    monkeypatch.setattr(training_module, "validate", lambda *args: original(*args) | {"accuracy": next(told)})


@pytest.mark.slow
def test_kalm_from_a_plain_classifier(config, monkeypatch):
    start = train(with_schedule(config, epochs=(1,)))
    improving(monkeypatch, (0.25, 0.5))
    kalm = replace(with_schedule(config, epochs=(0, 1)), out=config.out / "kalm", model=MODELS["kalm"], start=start)
    state, plain = weights(train(kalm)), weights(start)
    for name, tensor in plain.items():
        assert torch.equal(state[name.replace("encoder.", "global_encoder.", 1)], tensor), name
    assert not torch.equal(state["local_encoder.classifier.weight"], plain["encoder.classifier.weight"])
    before, line = history(kalm)
    assert (before["phase"], before["epoch"]) == ("local", 0)
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


@pytest.mark.slow
def test_what_a_run_starts_from_competes_as_epoch_0(config, monkeypatch):
    start = train(with_schedule(config, epochs=(1,)))
    improving(monkeypatch, (0.5, 0.5, 0.25))
    again = replace(with_schedule(config, epochs=(2,)), out=config.out / "again", start=start)
    assert same(train(again), start)
    assert [line["epoch"] for line in history(again)] == [0, 1, 2]


@pytest.mark.slow
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
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"model": PlainConfig(BACKBONE, 0)}, r"model.image-size: expected at least 32, got 0"),
        ({"schedule": Schedule((-1,), 6, "adam", 1e-2)}, r"schedule.epochs: expected at least 0, got -1"),
        ({"schedule": Schedule((0,), 6, "adam", 1e-2)}, r"schedule.epochs, in all: expected at least 1, got 0"),
        ({"schedule": Schedule((1,), 0, "adam", 1e-2)}, r"schedule.batch: expected at least 1, got 0"),
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


def test_the_learning_rate_falls_to_a_tenth(config, monkeypatch):
    rates = []

    def record(config, model, phase, epoch, training, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(training_module, "run_epoch", record)
    train(with_schedule(config, epochs=(6,), learning_rate=1e-3, drop_after=2 / 3))
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 2)
