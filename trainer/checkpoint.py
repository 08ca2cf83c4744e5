"""A trained model as one safetensors file: the weights, and in its metadata the system and its configuration."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from scaphoid.trainer.models.backbone import PACKAGED
from scaphoid.trainer.models.kalm import Kalm, KalmConfig
from scaphoid.trainer.models.msfm import Msfm, MsfmConfig
from scaphoid.trainer.models.plain import Plain, PlainConfig

SYSTEMS = {"plain": (Plain, PlainConfig), "kalm": (Kalm, KalmConfig), "msfm": (Msfm, MsfmConfig)}
Model = Plain | Kalm | Msfm
METADATA_KEY = "scaphoid"
SIZES, SIDES = ("image_size", "part_size", "key_size"), (32, 4096)  # options in pixels, and their range
SCALE = ".scale"  # beside an int8 tensor: what to multiply its output channels by


def _comes_with_a_package(name: str, backbone: str) -> bool:
    """The frozen ImageNet encoder of feature-map augmentation is not stored when a package carries its weights."""
    return backbone == PACKAGED and name.startswith("fma_encoder.")


def save_model(path: Path, model: Model, compact: bool = False, **facts: object) -> None:
    """Write `model` to `path`; `compact` stores weights as int8, a quarter of the size, with a scale for each output
    channel. `facts` (data set, metrics) go into the metadata."""
    state = {}
    for name, tensor in model.state_dict().items():
        if _comes_with_a_package(name, model.config.backbone):
            continue
        if compact and tensor.ndim > 1:
            scale = (tensor.flatten(1).abs().amax(1) / 127).clamp(min=1e-12)
            state[name + SCALE] = scale
            tensor = (tensor / scale.view(-1, *[1] * (tensor.ndim - 1))).round().to(torch.int8)
        state[name] = tensor.contiguous()
    metadata = {"system": model.system, "config": dataclasses.asdict(model.config), **facts}
    partial = path.with_suffix(".partial")
    save_file(state, partial, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    partial.replace(path)


def read_metadata(path: Path) -> dict:
    """The metadata that `save_model` wrote. Raises ValueError when `path` is not such a file."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])
    except FileNotFoundError:
        raise ValueError(f"no weights file at {path}; train one with scaphoid-train") from None
    except Exception as error:
        reason = "it has no metadata of ours" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a safetensors file written by scaphoid-train: {reason}") from error


def load_model(path: Path) -> Model:
    """The model of a weights file, in eval mode and float32. Raises ValueError naming what does not fit."""
    metadata = read_metadata(path)
    try:
        model_class, config_class = SYSTEMS[metadata["system"]]
        config = config_class(**metadata["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is of a system or an option that this version does not know: {error}") from error
    for name, side in dataclasses.asdict(config).items():
        if name in SIZES and (type(side) is not int or not SIDES[0] <= side <= SIDES[1]):
            raise ValueError(f"{path}: its {name} is {side!r}, expected pixels from {SIDES[0]} to {SIDES[1]}")
    try:
        model = model_class(config, pretrained=config.backbone == PACKAGED)
    except Exception as error:  # whatever an option out of range meets in timm or torch
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: no {metadata['system']} can be made of its options ({line})") from error
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    for name in [name for name, tensor in state.items() if tensor.dtype == torch.int8]:
        if (scale := state.pop(name + SCALE, None)) is None:
            raise ValueError(f"{path}: {name} is int8 but has no {name + SCALE}")
        state[name] = state[name] * scale.view(-1, *[1] * (state[name].ndim - 1))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[:2][-1].strip()
        raise ValueError(f"{path} does not fit {metadata['system']}: {first}") from error
    missing = [name for name in missing if not _comes_with_a_package(name, config.backbone)]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {metadata['system']}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()
