"""A flow in this process, decoding included: eager fp32, and the exported engines through export/runner.py."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from scaphoid.bench.timing import Rate, measure
from scaphoid.export.runner import Runner, eager_stages, run
from scaphoid.trainer.checkpoint import SYSTEMS, load_model, save_model
from scaphoid.trainer.flows import FLOWS

BatchFunction = Callable[[Sequence[bytes]], object]


@dataclass
class StageTime:
    """The images that one stage took so far, and its seconds."""

    images: int = 0
    seconds: float = 0.0

    def reset(self) -> None:
        self.images, self.seconds = 0, 0.0


def untrained_weights(path: Path, flow: str, backbone: str) -> None:
    """A weights file of a model for `flow` with random weights, at the papers' sizes: speed does not need training.
    Nothing is downloaded. Raises ValueError for an unknown flow or backbone."""
    if flow not in FLOWS:
        raise ValueError(f"unknown flow {flow!r}: expected one of {', '.join(FLOWS)}")
    model_class, config_class = SYSTEMS["kalm" if flow == "kalm" else "msfm"]
    torch.manual_seed(0)
    save_model(path, model_class(config_class(backbone=backbone), pretrained=False))


def eager_flow(weights: Path, flow: str, wanted: Sequence[str]) -> BatchFunction:
    """The eager fp32 model of a weights file as a function of a batch of encoded images."""
    model = load_model(weights).eval()
    stages = eager_stages(model, model.config.image_size)
    return lambda encoded: run(FLOWS[flow], stages, encoded, wanted)


def engine_flow(artefacts: Path, flow: str, wanted: Sequence[str]) -> tuple[BatchFunction, dict[str, StageTime]]:
    """The exported flow as a function of a batch of encoded images, and its stages' times, which grow as it runs."""
    runner = Runner(artefacts, flow)
    times = {name: StageTime() for name in runner.stages}
    runner.stages = timed(runner.stages, times)
    return lambda encoded: runner(encoded, wanted), times


def timed(stages: Mapping[str, Callable], times: Mapping[str, StageTime]) -> dict[str, Callable]:
    """`stages` that keep account in `times`."""

    def keep(stage: Callable, account: StageTime) -> Callable:
        def call(*inputs):
            began = time.perf_counter()
            outputs = stage(*inputs)
            account.seconds += time.perf_counter() - began
            account.images += len(inputs[0])
            return outputs

        return call

    return {name: keep(stage, times[name]) for name, stage in stages.items()}


def gflop_an_image(flow: BatchFunction, image: bytes) -> float:
    """Operations of an eager flow's convolutions and products for one image, in 10^9; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        flow([image])
    return counter.get_total_flops() / 1e9


def sweep(flow: BatchFunction, images: Sequence[bytes], batches: Sequence[int], seconds: float) -> dict[int, Rate]:
    """The rate at each batch size, each measured for about `seconds`."""
    return {batch: measure(flow, images, batch, seconds) for batch in batches}
