"""Train a plain classifier, KALM or MSFM from image-level labels.

    scaphoid-train plain --index phantoms --out runs/plain --model.backbone tf_efficientnet_lite0 --model.scale 0.5
    scaphoid-train msfm  --index phantoms --out runs/msfm  --start runs/plain/best.safetensors --schedule.epochs 0 2

The defaults are the papers' settings. The checkpoint with the best image-level accuracy on a patient-disjoint part of
the training set is kept; what a run starts from competes as epoch 0. Give the same command again to continue an
interrupted run.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from scaphoid.trainer.checkpoint import SYSTEMS, Model, load_model, save_model
from scaphoid.trainer.config import PAPER, Schedule, TrainConfig
from scaphoid.trainer.data.index import Index, read_index, split_by_patient
from scaphoid.trainer.data.phantom.generate import generator_of
from scaphoid.trainer.data.pipeline import load_images
from scaphoid.trainer.losses import body_part_weights, image_weights, stage_loss
from scaphoid.trainer.metrics import classification_metrics

SUMMARIES = {
    "plain": "a plain classifier: the baseline, and what MSFM starts from",
    "kalm": "KALM, with the paper's settings",
    "msfm": "MSFM, with the paper's settings",
}
console = Console(stderr=True)


@dataclasses.dataclass
class Split:
    """Decoded radiographs uint8 [N, 1, S, S], their labels [N] and the weights [N] of the weighted losses."""

    images: np.ndarray
    labels: Tensor
    weights: Tensor


def main() -> None:
    configs = {
        system: (SUMMARIES[system], TrainConfig(tyro.MISSING, tyro.MISSING, model, schedule))
        for system, (model, schedule) in PAPER.items()
    }
    config = tyro.extras.overridable_config_cli(configs, description=__doc__)
    try:
        train(config)
    except (ValueError, OSError) as error:
        sys.exit(f"scaphoid-train: {error}")


def train(config: TrainConfig) -> Path:
    """Run every phase; returns the path of the best checkpoint. Raises ValueError when the configuration cannot run."""
    torch.manual_seed(config.seed)
    check_numbers(config)
    model = create_model(config)
    if len(config.schedule.epochs) != len(model.phases):
        raise ValueError(f"schedule.epochs: {model.system} has the phases {model.phases}, got {config.schedule.epochs}")
    open_run(config)
    model.to(memory_format=torch.channels_last)
    best = config.out / "best.safetensors"
    done = resume(config, model)
    if done["phase"] == len(model.phases) and best.exists():
        console.print(f"{config.out} is a finished run; to train again, choose another --out")
        return best
    training, validation = load_splits(config)
    for number, phase in enumerate(model.phases):
        if config.schedule.epochs[number] and number >= done["phase"]:
            run_phase(config, model, number, training, validation, done)
            done = {"phase": number + 1, "epoch": 0, "best": -1.0}
            # The next phase, and the run's result, build on the phase's best epoch.
            model.load_state_dict(load_model(best_path(config, phase)).state_dict())
            save_progress(config, done, model, None)
    drawn = generator_of(config.index if config.index.is_dir() else config.index.parent)
    save_model(
        best, model, images=len(training.labels), index=config.index.name, **({"phantoms": drawn} if drawn else {})
    )
    return best


def check_numbers(config: TrainConfig) -> None:
    """Raises ValueError for a number that no run can have, before anything is built from it."""
    smallest = {
        "schedule.batch": (config.schedule.batch, 1),
        "schedule.epochs": (min(config.schedule.epochs, default=0), 0),
        "schedule.epochs, in all": (sum(config.schedule.epochs), 1),
        "model.image-size": (config.model.image_size, 32),
        "images": (config.images if config.images is not None else 1, 1),
    }
    for name, (given, least) in smallest.items():
        if given < least:
            raise ValueError(f"{name}: expected at least {least}, got {given}")


def open_run(config: TrainConfig) -> None:
    """Create the run's folder, or check that what was trained in it had the same configuration."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "config.json"
    if (config.out / "last.pt").exists():
        before, now = json.loads(path.read_text()), json.loads(config.to_json())
        if changed := [name for name in now if before.get(name) != now[name]]:
            differ = f"is of a run with another {', '.join(changed)}"
            raise ValueError(f"{path} {differ}; give the same settings, choose another --out or delete that run")
    path.write_text(config.to_json())


def create_model(config: TrainConfig) -> Model:
    system = next(name for name, (_, kind) in SYSTEMS.items() if isinstance(config.model, kind))
    replaced = config.start is not None and not getattr(config.model, "fma", False)  # no download for nothing
    model = SYSTEMS[system][0](config.model, pretrained=config.pretrained and not replaced)
    if config.start is not None:
        start = load_model(config.start)
        if start.system != "plain" or start.config.backbone != config.model.backbone:
            raise ValueError(
                f"start: expected a plain {config.model.backbone}, got {start.system} {start.config.backbone}"
            )
        encoders = (model.global_encoder, model.local_encoder) if system == "kalm" else (model.encoder,)
        for encoder in encoders:
            encoder.load_state_dict(start.encoder.state_dict())
    return model


def load_splits(config: TrainConfig) -> tuple[Split, Split]:
    """Training and validation radiographs, patient-disjoint, decoded by the pipeline that serves them later."""
    whole = read_index(config.index)
    index = whole.where(split="train")
    if not len(index):
        splits = sorted({radiograph.split for radiograph in whole.radiographs})
        raise ValueError(f"index: {config.index} has no radiograph of the split 'train'; it has {', '.join(splits)}")
    training, validation = split_by_patient(index, config.validation, config.seed)
    if config.images is not None and config.images > len(training):
        raise ValueError(f"images: expected at most {len(training)}, all but the validation's, got {config.images}")
    if config.images is not None and config.images < len(training):
        _, training = split_by_patient(training, config.images / len(training), config.seed)
    weights = body_part_weights(training)

    def load(part: Index) -> Split:
        images, _ = load_images([part.path(radiograph) for radiograph in part.radiographs], config.model.image_size)
        labels = torch.tensor([radiograph.label for radiograph in part.radiographs])
        return Split(images, labels, image_weights(weights, [r.body_part for r in part.radiographs], labels))

    return load(training), load(validation)


def resume(config: TrainConfig, model: Model) -> dict:
    """Where the run stopped: the phase, the epoch within it, and the best accuracy so far in it."""
    path = config.out / "last.pt"
    if not path.exists():
        return {"phase": 0, "epoch": 0, "best": -1.0}
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    return {**state["done"], "optimizer": state["optimizer"]}


def save_progress(config: TrainConfig, done: dict, model: Model, optimizer: torch.optim.Optimizer | None) -> None:
    """Write what `resume` reads, in one move: an interruption leaves the state before or the state after."""
    state = {"done": done, "model": model.state_dict(), "optimizer": optimizer.state_dict() if optimizer else None}
    torch.save(state, config.out / "last.partial")
    (config.out / "last.partial").replace(config.out / "last.pt")


def run_phase(config: TrainConfig, model: Model, number: int, training: Split, validation: Split, done: dict) -> None:
    phase, schedule = model.phases[number], config.schedule
    set_training(model, phase, schedule)
    optimizer = create_optimizer(model, schedule)
    if done.get("optimizer"):
        optimizer.load_state_dict(done["optimizer"])
    best = done["best"]
    if config.start is not None and best < 0:  # what the phase starts from is trained already: it competes as epoch 0
        scores = validate(config, model, phase, validation)
        best = scores["accuracy"]
        save_model(best_path(config, phase), model)
        save_progress(config, {"phase": number, "epoch": 0, "best": best}, model, optimizer)
        record(config, {"phase": phase, "epoch": 0, **scores})
    for epoch in range(done["epoch"], schedule.epochs[number]):
        started = time.time()
        dropped = epoch >= schedule.drop_after * schedule.epochs[number]
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * (0.1 if dropped else 1.0)
        set_training(model, phase, schedule)
        loss = run_epoch(config, model, phase, epoch, training, optimizer)
        scores = validate(config, model, phase, validation)
        if scores["accuracy"] > best:
            best = scores["accuracy"]
            save_model(best_path(config, phase), model)
        save_progress(config, {"phase": number, "epoch": epoch + 1, "best": best}, model, optimizer)
        took = time.time() - started
        record(config, {"phase": phase, "epoch": epoch + 1, "loss": loss, **scores, "seconds": took})


def record(config: TrainConfig, line: dict[str, object]) -> None:
    """Append an epoch to history.jsonl and show it."""
    with open(config.out / "history.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    words = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items())
    console.print(" ".join(words))


def run_epoch(
    config: TrainConfig, model: Model, phase: str, epoch: int, training: Split, optimizer: torch.optim.Optimizer
) -> float:
    """One pass over the training radiographs; returns the mean loss."""
    phase_seed = config.seed * len(model.phases) + model.phases.index(phase)
    generator = torch.Generator().manual_seed(phase_seed * 1000 + epoch)
    order = torch.randperm(len(training.labels), generator=generator)
    total, batches = 0.0, order.split(config.schedule.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{phase} epoch {epoch + 1}", total=len(batches))
        for chosen in batches:
            image = torch.from_numpy(training.images[chosen.numpy()])
            if config.schedule.augment:
                image = flip(image, generator)
            image = suppress(model, image)
            if config.schedule.augment:
                image = jitter(image, generator)
            labels, weights = training.labels[chosen], training.weights[chosen]
            terms = model.training_logits(phase, image)
            loss = torch.stack([stage_loss(logits, labels, weights, config.schedule.loss) for logits in terms]).sum()
            if not torch.isfinite(loss):
                raise ValueError(f"{phase} epoch {epoch + 1}: the loss is {loss.item()}; lower schedule.learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
            progress.update(task, advance=1, description=f"{phase} epoch {epoch + 1}, loss {loss.item():.3f}")
    return total / len(order)


def suppress(model: Model, image: Tensor) -> Tensor:
    """Feature-map augmentation, for the one model that has it; it stands between flip and jitter. A part of the model
    rather than of the augmentation: inference does it too."""
    return model.augment(image) if model.system == "msfm" else image


def flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the radiographs left to right."""
    chosen = torch.rand(len(image), generator=generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), image.flip(-1), image)


def jitter(image: Tensor, generator: torch.Generator, strength: float = 0.2) -> Tensor:
    """Brightness, then contrast about the radiograph's mean, each by a factor in 1 +- `strength`; rounded to uint8."""
    brightness, contrast = (
        (1 + strength * (2 * torch.rand(len(image), 1, 1, 1, generator=generator) - 1)).to(image.device)
        for _ in range(2)
    )
    pixels = (image * brightness).clamp(0, 255)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return ((pixels - mean) * contrast + mean).clamp(0, 255).round().byte()


@torch.inference_mode()
def validate(config: TrainConfig, model: Model, phase: str, validation: Split) -> dict[str, float]:
    """Accuracy and AUROC of every probability that the phase gives (`accuracy` and `auroc` are of the final one), and
    the mean of anything else that it tells, such as KALM's w and h."""
    model.eval()
    batches = [
        model.probabilities(phase, torch.from_numpy(images))
        for images in np.array_split(validation.images, max(1, len(validation.images) // config.schedule.batch))
    ]
    scores = {}
    for name in batches[0]:
        values = torch.cat([batch[name] for batch in batches]).squeeze(1).numpy()
        if "probability" not in name:
            scores[name] = float(values.mean())
            continue
        metrics = classification_metrics(validation.labels.numpy(), values, resamples=0)
        prefix = "" if name == "probability" else name.removesuffix("_probability") + "_"
        scores |= {f"{prefix}{metric}": float(metrics[metric].value) for metric in ("accuracy", "auroc")}
    return scores


def set_training(model: Model, phase: str, schedule: Schedule) -> None:
    """Gradients and running statistics for what the phase trains, and for nothing else."""
    model.eval().requires_grad_(False)
    for module in model.trained(phase):
        module.train().requires_grad_(True)
        for name in schedule.frozen if hasattr(module, "backbone") else ():
            try:
                module.backbone.get_submodule(name).eval().requires_grad_(False)
            except AttributeError as error:
                parts = ", ".join(child for child, _ in module.backbone.named_children())
                raise ValueError(f"schedule.frozen: the backbone has no module {name!r}; it has {parts}") from error
        for layer in module.modules() if schedule.frozen_statistics else ():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()


def create_optimizer(model: Model, schedule: Schedule) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    if schedule.optimizer == "adam":
        return torch.optim.Adam(parameters, **settings)
    return torch.optim.SGD(parameters, momentum=schedule.momentum, **settings)


def best_path(config: TrainConfig, phase: str) -> Path:
    return config.out / f"best_{phase}.safetensors"


if __name__ == "__main__":
    main()
