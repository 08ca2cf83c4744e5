"""Runs a flow in this process: the wiring table over eager stages, or over exported artefacts without a server.

runner = Runner(Path("artefacts"), "msfm")
answer = runner([Path("wrist.png").read_bytes()], wanted=["probability", "box"])
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scaphoid.export.artefacts import OPS_LIBRARY, ManifestError, verify
from scaphoid.export.edge.openvino_engine import compiled
from scaphoid.export.formats import FORMATS, SERVED
from scaphoid.trainer.checkpoint import load_model
from scaphoid.trainer.contracts import ENCODED, STAGES, Stage
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.trainer.data.pipeline import Decoder, decode_batch
from scaphoid.trainer.flows import FLOWS, Flow
from scaphoid.trainer.models.kalm import Kalm
from scaphoid.trainer.models.msfm import Msfm
from scaphoid.trainer.models.plain import Plain

PREPROCESS_BATCH = 8  # images that an exported pipeline decodes at once; at least the server's max_batch_size

StageFunction = Callable[..., Tensor | tuple[Tensor, ...]]


def run(
    flow: Flow, stages: Mapping[str, StageFunction], encoded: Sequence[bytes], wanted: Iterable[str]
) -> dict[str, Tensor]:
    """Every tensor of `flow`, batch first, that was computed for the `wanted` outputs. Raises ValueError on an output
    that the flow does not have, RejectedImage for the first image that cannot be decoded."""
    with torch.inference_mode():
        return flow.run(stages, {ENCODED.name: list(encoded)}, wanted)


def load_served(path: Path) -> Kalm | Msfm:
    """The model of a weights file, in eval mode. Raises ValueError when it does not load, or when no flow serves it."""
    model = load_model(path)
    if isinstance(model, Plain):
        raise ValueError(f"{path} is a plain classifier, which no flow serves; train msfm or kalm from it with --start")
    return model


def eager_stages(model: nn.Module, image_size: int) -> dict[str, StageFunction]:
    """A model's stages with preprocessing in front: what every engine is held against."""

    def preprocess(encoded: Sequence[bytes]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in decode_batch(encoded, image_size))

    return {"preprocess": preprocess, **model.stages()}


def preprocess_stage(pipeline: Path) -> StageFunction:
    """An exported `model.dali` as a function from a list of encoded images to `image` and `original_size`.

    Raises RejectedImage for the first image that cannot be decoded: in process, the caller owns every image of the
    batch.
    """
    decoder = Decoder(pipeline.read_bytes(), PREPROCESS_BATCH)

    def preprocess(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        answers = decoder.decode(encoded)
        for answer in answers:
            if isinstance(answer, RejectedImage):
                raise answer
        return (
            torch.from_numpy(np.stack([answer.image for answer in answers])),
            torch.from_numpy(np.stack([answer.original_size for answer in answers])),
        )

    return preprocess


class OpenVinoStage:
    """An encoder engine as a function. `precision` is the one that it really runs in (of int8: beside its int8)."""

    def __init__(self, path: Path, stage: Stage, precision: str, threads: int = 0) -> None:
        engine = compiled(path, precision, threads)
        self.precision = engine.get_property("INFERENCE_PRECISION_HINT").to_string()
        self._request = engine.create_infer_request()
        self._inputs = [tensor.name for tensor in stage.inputs]
        self._outputs = [tensor.name for tensor in stage.outputs]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = {name: tensor.numpy() for name, tensor in zip(self._inputs, inputs, strict=True)}
        self._request.infer(arrays, share_inputs=True)
        return tuple(torch.from_numpy(self._request.get_tensor(name).data.copy()) for name in self._outputs)


class Runner:
    """A flow over exported artefacts: `runner(encoded, wanted)` takes the bytes of image files, returns arrays by name.

    `threads` limits each engine (0: all cores). Raises ManifestError when the artefacts are damaged or lack the flow.
    """

    def __init__(self, artefacts: Path, flow: str, threads: int = 0) -> None:
        manifest = verify(artefacts)
        if flow not in manifest["flows"]:
            raise ManifestError(
                f"{artefacts} has no flow {flow}: it has {', '.join(manifest['flows'])}; export its weights too"
            )
        self.flow = FLOWS[flow]
        if not hasattr(
            torch.ops.scaphoid, "object_box"
        ):  # a process takes one op library; training modules load theirs
            torch.ops.load_library(str(artefacts / OPS_LIBRARY))
        self.stages: dict[str, StageFunction] = {
            name: load_stage(artefacts, STAGES[name], manifest, threads) for name in self.flow.stages
        }

    def __call__(self, encoded: Sequence[bytes], wanted: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        wanted = tuple(self.flow.outputs if wanted is None else wanted)
        tensors = run(self.flow, self.stages, encoded, wanted)
        return {name: tensors[name].numpy() for name in wanted}


def load_stage(artefacts: Path, stage: Stage, manifest: dict, threads: int) -> StageFunction:
    """One exported stage as a function of the contract's tensors."""
    if stage.kind == "preprocess":
        return preprocess_stage(artefacts / stage.name / "model.dali")
    served = FORMATS[SERVED[stage.kind]]
    (suffix,) = served.files
    return served.load(served.path(artefacts, stage, suffix), stage, manifest["precision"], threads)
