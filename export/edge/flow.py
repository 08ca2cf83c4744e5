"""A flow in this process, without a server, torch or DALI: the Python API, and what runs on edge devices.

    flow = Flow.load(Path("artefacts"), "msfm")
    for result in flow.predict(["wrist.png", "hand.jpg"]):
        print(result.image, result.reason or (result.probability, result.box))

The wiring is that of trainer/flows.py. Encoders are OpenVINO's on a CPU, TensorRT's on a GPU; boxes and crops come from
the ops' C interface (`make edge` builds it).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from scaphoid.export.artefacts import MANIFEST, ManifestError, sha256, verify
from scaphoid.export.edge.decode import decode
from scaphoid.export.edge.ops import OpError, Ops, load_library
from scaphoid.export.edge.plan import Engine, HostPlan, decoded_tensors
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.data.guard import MAX_BYTES, RejectedImage
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.journal import Answer, answered

BATCH = 8  # images that go through the engines together

Image = str | os.PathLike | bytes


@dataclass(frozen=True, kw_only=True)
class Result(Answer):
    """What a flow says about one image, or in `reason` why it says nothing."""

    image: str
    reason: str | None = None


class Plan(Protocol):
    """A flow laid out for one batch size (plan.py)."""

    arrays: Mapping[str, np.ndarray]

    def __call__(self) -> None: ...


class Flow:
    """A flow over exported artefacts. Not for several threads at once."""

    def __init__(self, name: str, artefacts: Path, manifest: Mapping, threads: int, plan: Callable[..., Plan]) -> None:
        self.name, self.outputs = name, FLOWS[name].outputs
        self.version = sha256(artefacts / MANIFEST)[:8]
        self.threshold = float(manifest.get("thresholds", {}).get(name, 0.5))  # abnormal at this probability or above
        self._size = manifest["image_size"]
        self._decoders = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
        self._plan, self._plans = plan, dict[tuple[tuple[str, ...], int], Plan]()

    @classmethod
    def load(cls, artefacts: Path, flow: str = "msfm", engines: str = "openvino", threads: int = 0) -> "Flow":
        """`engines`: openvino, or tensorrt, whose engines lie in the folder `engines` beside the artefacts. `threads`
        limits decoding and each engine (0: all cores).

        Raises ManifestError when the artefacts are damaged, edited or lack the flow, OpError without the op library,
        or without TensorRT, a GPU or engines that were built on it.
        """
        artefacts = Path(artefacts)
        manifest = verify(artefacts)
        if flow not in manifest["flows"]:
            raise ManifestError(f"{artefacts} has no flow {flow}: it has {', '.join(manifest['flows'])}")
        glue = [name for name in FLOWS[flow].stages if STAGES[name].kind == "glue"]
        if missing := [name for name in glue if "settings" not in manifest["stages"][name]]:
            raise ManifestError(f"{artefacts} holds no settings of {missing[0]}: export the weights again")
        return cls(flow, artefacts, manifest, threads, BACKENDS[engines](artefacts, manifest, flow, threads))

    def predict(self, images: Sequence[Image], wanted: Iterable[str] | None = None) -> list[Result]:
        """A result for each image, in order: files by path, or the bytes of one. An image that cannot be used has a
        reason instead of answers, and its neighbours theirs. `wanted`: outputs of the flow (None: all); steps that
        nobody asked for do not run. Raises ValueError for an unknown output, and what an engine raises."""
        asked = set(self.outputs if wanted is None else wanted)
        FLOWS[self.name].steps_for(asked)
        chosen = tuple(name for name in self.outputs if name in asked)
        chunks = [range(start, min(start + BATCH, len(images))) for start in range(0, len(images), BATCH)]
        results: list[Result] = []
        ahead = self._load([images[index] for index in chunks[0]]) if chunks else ()
        for number, chunk in enumerate(chunks):
            loaded = list(ahead)
            following = chunks[number + 1] if number + 1 < len(chunks) else ()
            ahead = self._load([images[index] for index in following])  # while the engines run
            names = [f"image {index}" if _is_bytes(images[index]) else str(images[index]) for index in chunk]
            results += self._run(names, loaded, chosen)
        return results

    def _load(self, images: Sequence[Image]) -> Iterable:
        return self._decoders.map(lambda image: _loaded(image, self._size), images)

    def _run(self, names: Sequence[str], loaded: Sequence, wanted: tuple[str, ...]) -> list[Result]:
        good = [index for index, each in enumerate(loaded) if not isinstance(each, str)]
        answers = {}
        if good:
            plan = self._plan_for(wanted, len(good))
            columns = zip(*(loaded[index] for index in good), strict=True)
            for tensor, column in zip(decoded_tensors(FLOWS[self.name]), columns, strict=True):
                for row, value in zip(plan.arrays[tensor], column, strict=True):
                    row[...] = value
            plan()
            answers = {index: {name: plan.arrays[name][row] for name in wanted} for row, index in enumerate(good)}
        return [
            _result(name, each[1], answers[index]) if index in answers else Result(image=name, reason=each)
            for index, (name, each) in enumerate(zip(names, loaded, strict=True))
        ]

    def _plan_for(self, wanted: tuple[str, ...], batch: int) -> Plan:
        if (wanted, batch) not in self._plans:
            self._plans[wanted, batch] = self._plan(wanted, batch)
        return self._plans[wanted, batch]


def _is_bytes(image: Image) -> bool:
    return isinstance(image, bytes | bytearray | memoryview)


def _loaded(image: Image, size: int) -> tuple[np.ndarray, tuple[int, int]] | str:
    """The decoded image and its original height and width, or why there is none."""
    try:
        if _is_bytes(image):
            return decode(bytes(image), size)
        path = Path(image)
        if path.stat().st_size > MAX_BYTES:
            raise RejectedImage(f"more than {MAX_BYTES >> 20} MB")
        return decode(path.read_bytes(), size)
    except RejectedImage as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror or type(error).__name__}"
    except Exception as error:  # a hostile file may trip any decoder; its message may quote the file
        return f"cannot be read ({type(error).__name__})"


def _result(name: str, size: Sequence[int], outputs: Mapping[str, np.ndarray]) -> Result:
    """The answer about one image from the flow's outputs, each a row."""
    height, width = size
    try:
        return Result(image=name, width=width, height=height, **answered(outputs))
    except ValueError as error:
        return Result(image=name, width=width, height=height, reason=f"the engines {error}")


def encoders(flow: str) -> list[str]:
    """The stages of `flow` that engines carry."""
    return [name for name in FLOWS[flow].stages if STAGES[name].kind == "encoder"]


def _openvino(artefacts: Path, manifest: Mapping, flow: str, threads: int) -> Callable[..., Plan]:
    from scaphoid.export.edge.openvino_engine import OpenVinoEngine

    ops = Ops(load_library())
    engines: dict[str, Engine] = {
        name: OpenVinoEngine(artefacts / name / "model.xml", manifest["precision"], threads) for name in encoders(flow)
    }
    return lambda wanted, batch: HostPlan(flow, manifest, wanted, batch, ops, engines)


def _tensorrt(artefacts: Path, manifest: Mapping, flow: str, threads: int) -> Callable[..., Plan]:
    from scaphoid.export.edge.cuda_plan import CudaPlan
    from scaphoid.export.edge.cuda_runtime import CudaRuntime
    from scaphoid.export.edge.tensorrt_engine import TensorrtEngine
    from scaphoid.export.tensorrt_engines.build_engines import BuildError
    from scaphoid.export.tensorrt_engines.load_engines import EngineError, load_engine

    runtime, library = CudaRuntime(), load_library()
    stages, folder = encoders(flow), artefacts.parent / "engines"
    try:
        precision = built_precision(artefacts, folder, manifest, stages[0])
        loaded = {name: load_engine(artefacts, folder, name, precision) for name in stages}
    except (BuildError, EngineError) as error:
        raise OpError(str(error)) from None
    engines = {name: TensorrtEngine(engine, name, runtime.stream) for name, engine in loaded.items()}
    return lambda wanted, batch: CudaPlan(flow, manifest, wanted, batch, library, engines, runtime)


def built_precision(artefacts: Path, engines: Path, manifest: Mapping, stage: str) -> str:
    """What `engines` were built in from the ONNX of the artefacts: f16 before f32 before int8. Without engines of
    theirs the first of which there is an ONNX, for loading to say what is missing. Raises ManifestError without ONNX,
    BuildError for a damaged list of engines."""
    from scaphoid.export.tensorrt_engines.build_engines import PRECISIONS, no_onnx, onnx_file, read_entries

    present = [each for each in PRECISIONS if onnx_file(stage, each) in manifest["files"]]
    if not present:
        raise ManifestError(no_onnx(artefacts, stage, PRECISIONS[0]))
    keys = [entry["key"] for entry in read_entries(engines).values() if entry["stage"] == stage]
    built = {(key["precision"], key["onnx"]) for key in keys}
    fitting = [each for each in present if (each, manifest["files"][onnx_file(stage, each)]) in built]
    return [*fitting, *present][0]


BACKENDS = {"openvino": _openvino, "tensorrt": _tensorrt}
