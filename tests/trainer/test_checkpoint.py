"""Weights files: what goes in comes out, compact ones to the quantisation step; foreign ones are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaphoid.trainer.checkpoint import METADATA_KEY, Model, load_model, read_metadata, save_model
from scaphoid.trainer.models.backbone import PACKAGED
from scaphoid.trainer.models.kalm import Kalm, KalmConfig
from scaphoid.trainer.models.msfm import Msfm, MsfmConfig
from scaphoid.trainer.models.plain import Plain, PlainConfig

BACKBONE = "test_resnet"


def shaken(model: Model) -> Model:
    """No tensor is left at what a fresh model has: a load that skips one shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator)
            else:
                tensor += 3
    return model


MODELS = {
    "plain": lambda: Plain(PlainConfig(BACKBONE, 96, 0.5)),
    "kalm": lambda: Kalm(KalmConfig(BACKBONE, 96, 0.5, 48, 0.3)),
    "msfm": lambda: Msfm(MsfmConfig(BACKBONE, 96, 64, fma=True, theta=0.7, r=0.2, gamma=0.4)),
}


@pytest.fixture(params=MODELS)
def model(request) -> Model:
    torch.manual_seed(1)
    return shaken(MODELS[request.param]())


def test_round_trip_is_exact(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, model, images=12)
    loaded = load_model(path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    metadata = read_metadata(path)
    assert (metadata["system"], metadata["images"]) == (model.system, 12)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def steps(path: Path) -> dict[str, Tensor]:
    """Each channel's quantisation step, by tensor name."""
    return {name.removesuffix(".scale"): scale for name, scale in load_file(path).items() if name.endswith(".scale")}


def test_compact_is_within_half_a_step_of_each_channel(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, model, compact=True)
    loaded, sizes = load_model(path).state_dict(), steps(path)
    assert sizes.keys() == {name for name, tensor in model.state_dict().items() if tensor.ndim > 1}
    for name, tensor in model.state_dict().items():
        if name not in sizes:
            assert torch.equal(loaded[name], tensor), name
            continue
        error = (loaded[name] - tensor).flatten(1).abs().amax(1)
        assert (error <= 0.5001 * sizes[name].float()).all(), name
        assert error.max() > 0, name
        assert (sizes[name].float() <= 1.01 * tensor.flatten(1).abs().amax(1) / 127).all(), name


def test_compact_twice_is_compact_once(model, tmp_path):
    once, twice = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_model(once, model, compact=True)
    save_model(twice, load_model(once), compact=True)
    assert once.read_bytes() == twice.read_bytes()


def test_compact_is_a_quarter(model, tmp_path):
    save_model(tmp_path / "full.safetensors", model)
    save_model(tmp_path / "compact.safetensors", model, compact=True)
    full, compact = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "compact"))
    assert compact < 0.32 * full


def test_a_channel_of_zeros_stays_zeros(tmp_path):
    model = MODELS["plain"]()
    with torch.no_grad():
        model.encoder.classifier.weight[1] = 0
    save_model(tmp_path / "m.safetensors", model, compact=True)
    assert (load_model(tmp_path / "m.safetensors").encoder.classifier.weight[1] == 0).all()


def test_packaged_fma_weights_are_not_stored_and_come_back(tmp_path):
    model, path = Msfm(MsfmConfig(PACKAGED, 96, 64)), tmp_path / "m.safetensors"
    save_model(path, model)
    with safe_open(path, "pt") as file:
        assert not [name for name in file.keys() if name.startswith("fma_encoder.")]  # noqa: SIM118
    loaded = load_model(path)
    for part in ("encoder", "fma_encoder.backbone"):
        ours, theirs = (one.get_submodule(part).state_dict() for one in (model, loaded))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part


def refused(path: Path, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_foreign_files_are_refused_by_name(tmp_path):
    refused(tmp_path / "none.safetensors", "no weights file at")
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    refused(text, "is not a safetensors file written by scaphoid-train")
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.zeros(1)}, bare)
    refused(bare, "is not a safetensors file written by scaphoid-train")
    save_model(tmp_path / "good.safetensors", MODELS["plain"]())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "good.safetensors").read_bytes()[:-1000])
    refused(cut, "is not a safetensors file")


def rewritten(path: Path, system: str | None = None, drop: str = "", **config: object) -> Path:
    """A good plain file at `path`, its metadata or tensors changed."""
    save_model(path, MODELS["plain"]())
    metadata, tensors = read_metadata(path), load_file(path)
    metadata["system"] = system or metadata["system"]
    metadata["config"] |= config
    save_file({n: t for n, t in tensors.items() if n != drop}, path, {METADATA_KEY: json.dumps(metadata)})
    return path


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "m.safetensors"
    refused(rewritten(path, system="gmic"), "system or an option that this version does not know: 'gmic'")
    refused(rewritten(path, dropout=0.5), "system or an option that this version does not know.*dropout")
    refused(rewritten(path, drop="encoder.classifier.bias"), r"missing \['encoder.classifier.bias'\]")
    refused(rewritten(path, backbone="test_efficientnet"), "does not fit plain")
    refused(rewritten(path, backbone="resnet18"), "does not fit plain")
    refused(rewritten(path, image_size=0), r"m\.safetensors: its image_size is 0, expected pixels from 32 to 4096")
    refused(rewritten(path, image_size="big"), "its image_size is 'big'")
    refused(rewritten(path, backbone=7), r"m\.safetensors: no plain can be made of its options")
